"""Lists what users of the packages may build on, one line per symbol, sorted.

    python tools/public_api.py            # writes tests/client/public_api.txt
    python tools/public_api.py --check    # shows what has changed since, and fails if anything has

A line has a function's parameters with their types and defaults, and a class's as far as programs make it themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("onebase.client", "onebase.client.aio", "onebase.client.trl", "onebase.trainer")
LIST = Path(__file__).parents[1] / "tests" / "client" / "public_api.txt"
PROTOCOLS = {"__enter__", "__iter__", "__next__", "__aenter__", "__aiter__", "__anext__", "__await__"}
"""Special methods that a program calls without their names: `with`, `for`, `await`."""
HANDED_OUT = {"Client", "Session", "Policy", "Stream", "Opening"}
"""Classes that programs get and never make: their constructors are nobody's business."""


class Again(str):
    """The first name of what is exported twice."""

    def __repr__(self) -> str:
        return str(self)


def symbols() -> dict[str, Any]:
    """Every public symbol by its full name: what packages export, and the public members of exported classes.

    A class or function that a second package exports too stands there as `Again`.
    """
    found: dict[str, Any] = {}
    names: dict[int, str] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in (f"{package}.{exported}" for exported in module.__all__):
            value = getattr(module, name.rpartition(".")[2])
            named = inspect.isclass(value) or inspect.isfunction(value)
            if named and id(value) in names:
                found[name] = Again(names[id(value)])
                continue
            found[name] = value
            names[id(value)] = name
            if inspect.isclass(value):
                found.update({f"{name}.{one}": inspect.getattr_static(value, one) for one in _members(value)})
    return found


def _members(kind: type) -> Iterator[str]:
    """Public names that a class or a base of ours defines; not the fields of a dataclass, which its line has."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for base in kind.__mro__:
        if base.__module__.startswith("onebase."):
            yield from (name for name in vars(base) if not name.startswith("_") and name not in fields)
            yield from PROTOCOLS & vars(base).keys()


def line(name: str, value: Any) -> str:
    """A symbol's line: what it is, its parameters and what it gives."""
    if isinstance(value, property):
        return f"property {name}: {_written(inspect.signature(value.fget).return_annotation)}"  # type: ignore[arg-type]
    if inspect.isclass(value):
        return f"class {name}{'' if value.__name__.removeprefix('Async') in HANDED_OUT else _signature(value)}"
    if isinstance(value, classmethod):
        return f"classmethod {line(name, value.__func__)}"
    if inspect.isfunction(value):
        return f"{'async def' if inspect.iscoroutinefunction(value) else 'def'} {name}{_signature(value)}"
    return f"{name} = {value!r}"


def _signature(value: Any) -> str:
    """Parameters with their types and defaults, as they are written in the source."""
    found = inspect.signature(value)
    parameters = [
        one.replace(annotation=_Text.of(one.annotation, _written), default=_Text.of(one.default, _default))
        for one in found.parameters.values()
    ]
    returned = inspect.Signature.empty if inspect.isclass(value) else found.return_annotation
    return str(found.replace(parameters=parameters, return_annotation=_Text.of(returned, _written)))


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(value: Any) -> str:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    # Only what differs from the settings' own defaults, which stand in their class's line.
    defaults = inspect.signature(type(value)).parameters
    given = {name: there for name, there in vars(value).items() if not _is_default(defaults[name].default, there)}
    return f"{type(value).__name__}({', '.join(f'{name}={there!r}' for name, there in given.items())})"


def _is_default(default: Any, value: Any) -> bool:
    made = repr(default) == "<factory>"  # an empty collection, in all of our settings
    return not value if made else bool(default == value)


@dataclasses.dataclass(frozen=True)
class _Text:
    """Stands in a signature in the place of a value, and is shown as it is."""

    text: str

    @classmethod
    def of(cls, value: Any, show: Callable[[Any], str]) -> Any:
        """A value's text; where there is no value, nothing."""
        return value if value is inspect.Parameter.empty else cls(show(value))

    def __repr__(self) -> str:
        return self.text


def public_api() -> str:
    """The whole list."""
    return "".join(f"{line(name, value)}\n" for name, value in sorted(symbols().items()))


def changes() -> list[str]:
    """Lines that have come (+) or gone (-) since the list was written."""
    then = LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []
    found = difflib.unified_diff(then, public_api().splitlines(), lineterm="", n=0)
    return [one for one in found if one[0] in "+-" and not one.startswith(("+++", "---"))]


def main() -> int:
    """Writes the list, or with --check compares it; the exit code."""
    if "--check" in sys.argv:
        print("\n".join(changes()) or "the public API is as listed")
        return 1 if changes() else 0
    LIST.write_text(public_api(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
