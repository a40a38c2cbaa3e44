"""What a call is: a method, a request, and how to read the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

Request = TypeVar("Request", bound=Message)
Answer = TypeVar("Answer", bound=Message)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rpc(Generic[Request, Answer]):
    """A method of the contract."""

    method: str
    """Service and method, such as "InferenceService/Reward"."""
    request: type[Request]
    answer: type[Answer]
    repeatable: bool
    """Whether sending the same request again does no harm: it changes nothing (more), or carries a request_id."""

    @property
    def path(self) -> str:
        """The method's path on the wire."""
        return f"/onebase.v1.{self.method}"

    def call(
        self,
        request: Request,
        read: Callable[[Answer], Result],
        body: Callable[[], Iterator[Request]] | None = None,
    ) -> Call[Result]:
        """A call of this method, ready to be sent; with a `body` its request is a stream."""
        return Call(rpc=self, request=request, read=read, body=body)


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A request of a method, and how its answer (or each message of its stream) is read."""

    rpc: Rpc[Any, Any]
    request: Message
    read: Callable[[Any], Result]
    body: Callable[[], Iterator[Message]] | None = None
    """For a method whose request is a stream: the messages after `request`, anew for each attempt."""
