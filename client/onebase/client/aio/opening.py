"""What opens something: awaited, it gives the thing; in `async with`, it opens the thing and closes it at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Generator
from functools import wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar


class Closable(Protocol):
    """What can be opened: a client or a session."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Parameters = ParamSpec("Parameters")
Opened = TypeVar("Opened", bound=Closable)


class Opening(Generic[Opened]):
    """`thing = await opening`, or `async with opening as thing`; once."""

    def __init__(self, coroutine: Coroutine[Any, Any, Opened]) -> None:
        self._coroutine = coroutine
        self._opened: Opened | None = None

    def __await__(self) -> Generator[Any, Any, Opened]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> Opened:
        self._opened = await self._coroutine
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(kind, error, trace)


def opens(function: Callable[Parameters, Coroutine[Any, Any, Opened]]) -> Callable[Parameters, Opening[Opened]]:
    """A coroutine function, changed so that `async with` takes what it returns without an `await`."""

    @wraps(function)
    def opening(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Opening[Opened]:
        return Opening(function(*args, **kwargs))

    signature = inspect.signature(function)
    shown = signature.replace(return_annotation=f"Opening[{signature.return_annotation}]")
    opening.__signature__ = shown  # type: ignore[attr-defined]  # what help() shows
    return opening
