"""A sync module: its syntax tree, and where its parts stand in the text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

Function = ast.FunctionDef


class Refused(Exception):
    """A line that has no asyncio twin under the rules."""


@dataclass
class Module:
    """A sync module, and where its parts stand in the text."""

    name: str
    text: str
    tree: ast.Module = field(init=False)
    starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        self.starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                child.parent = node  # type: ignore[attr-defined]

    def start(self, node: ast.AST) -> int:
        """The offset of a node's first character."""
        return self._offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """The offset after a node's last character."""
        return self._offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def source(self, node: ast.AST) -> str:
        """A node's text."""
        return self.text[self.start(node) : self.end(node)]

    def _offset(self, line: int, column: int) -> int:
        start = self.starts[line - 1]
        encoded = self.text[start : self.starts[line]].encode()
        return start + len(encoded[:column].decode())

    def refuse(self, node: ast.AST, why: str) -> Refused:
        """The error of a line."""
        return Refused(f"{self.name}.py:{node.lineno}: {why}")  # type: ignore[attr-defined]

    def functions(self) -> Iterator[tuple[Function, str]]:
        """The functions and methods, each with the name of its class or ""."""
        for node in self.tree.body:
            if isinstance(node, Function):
                yield node, ""
            elif isinstance(node, ast.ClassDef):
                yield from ((part, node.name) for part in node.body if isinstance(part, Function))

    def imported(self) -> set[str]:
        """Names that imports bind: a call of theirs is a module's function, never a method of ours."""
        imports = [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        return {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
