"""The edits that turn a sync module into its asyncio twin."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping

from twins.facts import OPENED, RENAMED, Facts, awaits, class_of
from twins.modules import Function, Module, Refused

PACKAGE = "onebase.client"
DUNDERS = {"__enter__": "__aenter__", "__exit__": "__aexit__"}
LOCKS = ("threading.Lock", "threading.RLock")


class Change:
    """The edits that make a module's twin."""

    def __init__(self, module: Module, facts: Facts) -> None:
        self.module, self.facts = module, facts
        self._edits: list[tuple[int, int, str]] = []
        self._opens = False

    def made(self) -> str:
        """The twin's text, not yet formatted."""
        self._refuse_threads()
        for function, owner in self.module.functions():
            self._function(function, owner)
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.ImportFrom):
                self._import(node)
        self._words()
        text, last = "", 0
        for start, end, new in sorted(self._edits, key=lambda edit: edit[:2]):
            if start < last:
                line = self.module.text.count("\n", 0, start) + 1
                raise Refused(f"{self.module.name}.py:{line}: too much at once for the rules: write it in two steps")
            text, last = text + self.module.text[last:start] + new, end
        text += self.module.text[last:]
        if self._opens:
            imports = rf"\g<0>\nfrom {PACKAGE}.aio.opening import opens\n"
            text = re.sub(r"^from __future__.*\n", imports, text, count=1, flags=re.MULTILINE)
        return text

    def _edit(self, start: int, end: int, new: str) -> None:
        self._edits.append((start, end, new))

    def _insert(self, before: int, new: str) -> None:
        self._edit(before, before, new)

    # ------------------------------------------------------------------------------------------- functions

    def _function(self, function: Function, owner: str) -> None:
        module, facts, start = self.module, self.facts, self.module.start(function)
        known = facts.methods if owner else facts.functions
        if function.name in known or function.name in DUNDERS:
            if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(function)):
                raise module.refuse(function, "a generator that awaits: return a stream or a list")
            if function.decorator_list:
                raise module.refuse(function, "a decorated function that awaits, such as a property: make it a method")
            opens = class_of(function.returns) in OPENED and function.name not in DUNDERS
            self._opens |= opens
            self._insert(start, f"@opens\n{' ' * function.col_offset}async " if opens else "async ")
        elif awaits(facts, module, function):
            raise module.refuse(function, f"{function.name} cannot await")
        local = facts.locals(module, function)
        for node in ast.walk(function):
            if facts.awaited(module, node):
                self._await(node, function)
            elif isinstance(node, ast.With):
                self._with(node, local)
            elif isinstance(node, ast.For) and facts.gives(module, node.iter, local):
                self._insert(module.start(node), "async ")
            elif isinstance(node, ast.comprehension) and facts.gives(module, node.iter, local):
                self._insert(module.text.rindex("for", 0, module.start(node.target)), "async ")
            elif isinstance(node, ast.Call) and self._lists_stream(node, local):
                self._edit(module.start(node), module.start(node.args[0]), "[item async for item in ")
                self._edit(module.end(node) - 1, module.end(node), "]")

    def _lists_stream(self, call: ast.Call, local: Mapping[str, str]) -> bool:
        lists = isinstance(call.func, ast.Name) and call.func.id == "list" and len(call.args) == 1
        return lists and self.facts.gives(self.module, call.args[0], local) == "Stream"

    def _await(self, call: ast.AST, function: Function) -> None:
        above = parent = call.parent  # type: ignore[attr-defined]
        while above is not function:
            if isinstance(above, ast.Lambda | ast.GeneratorExp | ast.FunctionDef | ast.JoinedStr):
                raise self.module.refuse(call, "a call that is awaited, in a function of its own or in a text")
            above = above.parent
        if isinstance(parent, ast.withitem) and self.facts.gives(self.module, call, {}):
            return  # an opening: `async with` awaits it
        bound = isinstance(parent, ast.Attribute | ast.Subscript) or (
            isinstance(parent, ast.Call) and parent.func is call
        )
        self._insert(self.module.start(call), "(await " if bound else "await ")
        if bound:
            self._insert(self.module.end(call), ")")

    def _with(self, node: ast.With, local: Mapping[str, str]) -> None:
        entered = [self.facts.gives(self.module, item.context_expr, local) for item in node.items]
        if all(entered):
            self._insert(self.module.start(node), "async ")
        elif any(entered):
            raise self.module.refuse(node, "a stream or a session beside something else in one `with`: nest them")
        elif any(self.module.source(item.context_expr) in self._locks() for item in node.items):
            if len(node.items) > 1 or any(self.facts.awaited(self.module, part) for part in ast.walk(node)):
                raise self.module.refuse(node, "a lock beside something else, or around a call that is awaited")
            self._edit(self.module.starts[node.lineno - 1], self.module.starts[node.lineno], "")
            for line in range(node.lineno, node.end_lineno or 0):
                start = self.module.starts[line]
                if self.module.text.startswith("    ", start):
                    self._edit(start, start + 4, "")

    # --------------------------------------------------------------------------------------- locks, threads

    def _locks(self) -> set[str]:
        """Such as "self._lock"."""
        assigns = [node for node in ast.walk(self.module.tree) if isinstance(node, ast.Assign)]
        return {self.module.source(node.targets[0]) for node in assigns if self._makes_lock(node)}

    def _makes_lock(self, node: ast.Assign) -> bool:
        return self.module.source(node.value).removesuffix("()") in LOCKS

    def _refuse_threads(self) -> None:
        for node in ast.walk(self.module.tree):
            if isinstance(node, ast.Assign) and self._makes_lock(node):
                self._edit(self.module.starts[node.lineno - 1], self.module.starts[node.end_lineno or 0], "")
            if not isinstance(node, ast.Attribute):
                continue
            source = self.module.source(node)
            foreign = source.startswith("threading.") and source not in LOCKS
            if foreign or source == "time.sleep":
                raise self.module.refuse(node, f"{source} has no twin here: give the transport a method that has one")
            if self.module.source(node.value) == "self._transport" and node.attr not in self.facts.transport:
                raise self.module.refuse(node, f"aio/transport.py has no Transport.{node.attr}")

    # ------------------------------------------------------------------------------------- imports and words

    def _import(self, node: ast.ImportFrom) -> None:
        package, _, name = (node.module or "").rpartition(".")
        if package != PACKAGE or name not in self.facts.twins:
            return
        if any(alias.asname for alias in node.names):
            raise self.module.refuse(node, "an import under another name")
        names = {alias.name for alias in node.names}
        here = {one for one in names if RENAMED.get(one, one) in self._defined(name)}
        lines = [f"from {PACKAGE}.aio.{name} import {', '.join(RENAMED.get(one, one) for one in sorted(here))}"]
        if names - here:
            lines.append(f"from {node.module} import {', '.join(sorted(names - here))}")
        if here:
            self._edit(self.module.start(node), self.module.end(node), ("\n" + " " * node.col_offset).join(lines))

    def _defined(self, name: str) -> set[str]:
        return {RENAMED.get(one, one) for one in self.facts.twins[name]}

    def _words(self) -> None:
        """New names for classes and dunders, new words in texts and comments; outside of what is edited already."""
        before = ""
        for token in tokenize.generate_tokens(io.StringIO(self.module.text).readline):
            start = self.module.starts[token.start[0] - 1] + token.start[1]
            end = self.module.starts[token.end[0] - 1] + token.end[1]
            new = token.string
            if token.type == tokenize.NAME and before != ".":
                new = {**RENAMED, **DUNDERS}.get(new, new)
            elif token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                new = prose(new)
            if new != token.string and not any(a <= start and end <= b for a, b, _ in self._edits):
                self._edit(start, end, new)
            before = token.string


def prose(text: str) -> str:
    """A comment, docstring or message, for the asyncio client."""
    text = re.sub(rf"(?<=[`<])({'|'.join(RENAMED)})\b", lambda name: RENAMED[name[0]], text)
    text = re.sub(r"\b([Tt])hread(s?)\b", lambda word: ("T" if word[1] == "T" else "t") + "ask" + word[2], text)
    return text.replace("a `with`", "an `with`").replace("`with`", "`async with`")
