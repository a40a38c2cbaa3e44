"""What is awaited, and what is entered by `async with`: found in all modules before one is changed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from twins.modules import Function, Module, Refused

RENAMED = {"Client": "AsyncClient", "Session": "AsyncSession", "Policy": "AsyncPolicy", "Stream": "AsyncStream"}
OPENED = {"Client", "Session"}
ENTERED = {*OPENED, "Stream"}


@dataclass
class Facts:
    """What must be known of all modules before one can be changed."""

    methods: set[str]
    """Methods that are awaited."""
    functions: set[str]
    """Functions of modules that are awaited."""
    given: dict[str, str]
    """By function: "Client", "Session" or "Stream", if that is what it returns."""
    twins: dict[str, set[str]]
    """By module: what its asyncio twin defines, of the made ones under their sync names."""
    transport: set[str]
    """What the asyncio transport has."""

    def awaited(self, module: Module, node: ast.AST) -> bool:
        """Whether a node is a call of a coroutine."""
        if not isinstance(node, ast.Call):
            return False
        if isinstance(node.func, ast.Name):
            return node.func.id in self.functions
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in self.methods:
            return False
        receiver = node.func.value
        return not (isinstance(receiver, ast.Name) and receiver.id in module.imported())

    def gives(self, module: Module, node: ast.AST, local: Mapping[str, str]) -> str:
        """Which of `ENTERED` an expression is, or ""."""
        if isinstance(node, ast.Name):
            return local.get(node.id, "")
        if not isinstance(node, ast.Call):
            return ""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") in module.imported():
            return ""
        return name if name in ENTERED else self.given.get(name, "")

    def locals(self, module: Module, function: Function) -> dict[str, str]:
        """The function's variables that are of a class in `ENTERED`."""
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        found = {one.arg: kind for one in arguments if (kind := class_of(one.annotation)) in ENTERED}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name, value = node.targets[0].id, node.value
            elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
                name, value = node.optional_vars.id, node.context_expr
            else:
                continue
            if kind := self.gives(module, value, found):
                found[name] = kind
        return found


def class_of(annotation: ast.expr | None) -> str:
    """The name of an annotation's class: "Stream" of `Stream[Item]`."""
    outer = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return outer.id if isinstance(outer, ast.Name) else ""


def gather(modules: list[Module], by_hand: Mapping[str, str]) -> Facts:
    """The facts of all modules; `by_hand` has the texts of the twins that are written by hand, by name.

    Raises:
        Refused: a name is a coroutine in one class and a plain method in another.
    """
    facts = Facts(methods=set(), functions=set(), given={}, twins={}, transport=set())
    plain = set[str]()
    for name, text in by_hand.items():
        plain |= _read_by_hand(facts, name, ast.parse(text))
    every = [(module, function, owner) for module in modules for function, owner in module.functions()]
    facts.given.update(
        {function.name: kind for _, function, _ in every if (kind := class_of(function.returns)) in ENTERED}
    )
    for module in modules:
        facts.twins[module.name] = {n.name for n in module.tree.body if isinstance(n, ast.ClassDef | Function)}
    known = -1
    while known != (known := len(facts.methods) + len(facts.functions)):
        for module, function, owner in every:
            if not function.name.startswith("__") and awaits(facts, module, function):
                (facts.methods if owner else facts.functions).add(function.name)
    if mixed := plain & facts.methods:
        raise Refused(f"{', '.join(sorted(mixed))}: a coroutine in one class and a plain method in another: rename")
    for module, function, owner in every:
        if owner and function.name in facts.methods and not awaits(facts, module, function):
            raise module.refuse(function, f"{function.name} awaits nothing here, but is a coroutine elsewhere: rename")
    return facts


def _read_by_hand(facts: Facts, name: str, tree: ast.Module) -> set[str]:
    """Adds what a twin written by hand defines; its plain methods."""
    names = {new: old for old, new in RENAMED.items()}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    facts.twins[name] = {node.name for node in tree.body if isinstance(node, ast.ClassDef | Function)}
    parts = [part for node in classes.values() for part in node.body]
    facts.methods |= {p.name for p in parts if isinstance(p, ast.AsyncFunctionDef) and not p.name.startswith("__")}
    plain = [part for part in parts if isinstance(part, Function)]
    facts.given.update({p.name: names[kind] for p in plain if (kind := class_of(p.returns)) in names})
    if "Transport" in classes:
        for node in ast.walk(classes["Transport"]):
            if isinstance(node, Function | ast.AsyncFunctionDef):
                facts.transport.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                facts.transport.add(node.attr)
    return {part.name for part in plain}


def awaits(facts: Facts, module: Module, function: Function) -> bool:
    """Whether a function awaits something."""
    local = facts.locals(module, function)
    for node in ast.walk(function):
        if facts.awaited(module, node):
            return True
        for item in node.items if isinstance(node, ast.With) else ():
            if facts.gives(module, item.context_expr, local):
                return True
        loops = isinstance(node, ast.For | ast.comprehension)
        if loops and facts.gives(module, node.iter, local):  # type: ignore[attr-defined]
            return True
    return False
