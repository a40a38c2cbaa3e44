"""What can go wrong, in the client's words.

    OnebaseError
    ├── InvalidArgumentError      the request itself is wrong; `field` names what
    ├── NotFoundError             no such adapter, session or file
    ├── AlreadyExistsError        the name or the path is taken
    ├── PermissionDeniedError     another's adapter, a scope the token lacks, or a path outside the server's roots
    ├── UnauthenticatedError      the server wants to know who asks
    ├── FailedPreconditionError   the request is fine, the state is not
    ├── AbortedError              a version or a lease moved on; `retry_after` says when to ask again
    ├── ResourceExhaustedError    a queue or a limit is full
    ├── DeadlineExceededError     the call took longer than its timeout
    ├── CancelledError            the call was cancelled, or the client was closed
    ├── UnavailableError          no server answers, or it drains
    ├── DataLossError             a file on the server is not what its hash says
    ├── UnimplementedError        the server does not know the method: it is older than this client
    └── InternalError             a bug; the server's log has the story under the id in the message

Every gRPC status becomes one of these in `translate`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo  # type: ignore[import-untyped]
from grpc import StatusCode
from grpc_status import rpc_status  # type: ignore[import-untyped]

M = TypeVar("M", bound=Message)


class OnebaseError(Exception):
    """Something that a server, or the way to it, refused.

    Attributes:
        reason: why, in UPPER_SNAKE, stable, for programs; "" if the server gave none.
        field: path of the request's field that is to blame ("sequences[3].prompt"), or "".
        retry_after: seconds after which asking again may succeed, or None.
        method: the method that failed ("InferenceService/Reward"), or "" if none was called.
    """

    def __init__(
        self, message: str, *, reason: str = "", field: str = "", retry_after: float | None = None, method: str = ""
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.retry_after = retry_after
        self.method = method


class InvalidArgumentError(OnebaseError):
    """The request itself is wrong; sending it again cannot help."""


class NotFoundError(OnebaseError):
    """No such adapter, session or file."""


class AlreadyExistsError(OnebaseError):
    """The name or the path is taken."""


class PermissionDeniedError(OnebaseError):
    """The thing is there, and this client may not do that with it."""


class UnauthenticatedError(OnebaseError):
    """The server wants to know who asks."""


class FailedPreconditionError(OnebaseError):
    """The request is fine, but the state it needs is not there."""


class AbortedError(OnebaseError):
    """A version or a lease moved on; look again and repeat."""


class ResourceExhaustedError(OnebaseError):
    """A queue, a limit or the memory is full."""


class DeadlineExceededError(OnebaseError):
    """The call took longer than its timeout."""


class CancelledError(OnebaseError):
    """The call was cancelled, or the client was closed."""


class UnavailableError(OnebaseError):
    """No server answers, or it does not take work now."""


class DataLossError(OnebaseError):
    """A file on the server does not hold what its manifest says."""


class UnimplementedError(OnebaseError):
    """The server does not know the method."""


class InternalError(OnebaseError):
    """A bug, in the server or in its answer."""


ERRORS: Mapping[StatusCode, type[OnebaseError]] = MappingProxyType(
    {
        StatusCode.CANCELLED: CancelledError,
        StatusCode.UNKNOWN: InternalError,
        StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
        StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        StatusCode.NOT_FOUND: NotFoundError,
        StatusCode.ALREADY_EXISTS: AlreadyExistsError,
        StatusCode.PERMISSION_DENIED: PermissionDeniedError,
        StatusCode.UNAUTHENTICATED: UnauthenticatedError,
        StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
        StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
        StatusCode.ABORTED: AbortedError,
        StatusCode.OUT_OF_RANGE: InvalidArgumentError,
        StatusCode.UNIMPLEMENTED: UnimplementedError,
        StatusCode.INTERNAL: InternalError,
        StatusCode.UNAVAILABLE: UnavailableError,
        StatusCode.DATA_LOSS: DataLossError,
    }
)
"""The exception of every status but OK."""


def translate(error: grpc.RpcError, method: str) -> OnebaseError:
    """The exception of a failed call, with what its rich details say (google.rpc ErrorInfo, BadRequest, RetryInfo)."""
    code = code_of(error)
    reason, field, retry_after = "", "", None
    for detail in _details(error):
        if info := _unpack(detail, ErrorInfo):
            reason = info.reason
        elif (bad := _unpack(detail, BadRequest)) and bad.field_violations:
            field = bad.field_violations[0].field
        elif retry := _unpack(detail, RetryInfo):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    return ERRORS.get(code, InternalError)(
        _message(error, code, reason, method), reason=reason, field=field, retry_after=retry_after, method=method
    )


def code_of(error: grpc.RpcError) -> StatusCode:
    """The status of a failed call. gRPC's core calls some connections that break under a call UNKNOWN."""
    code: StatusCode = error.code()
    broken = code is StatusCode.UNKNOWN and (error.details() or "").startswith("Stream removed")
    return StatusCode.UNAVAILABLE if broken else code


def _message(error: grpc.RpcError, code: StatusCode, reason: str, method: str) -> str:
    # gRPC's own words for a deadline name neither the call nor the way out.
    if code is StatusCode.DEADLINE_EXCEEDED and not reason:
        return f"{method} was not answered within its timeout; give it a longer one, or fewer sequences"
    return error.details() or f"{method} failed with {code.name}"


def _details(error: grpc.RpcError) -> Iterator[Any]:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details contradict the status, so a proxy made one of them: the status is the truth
        return
    if status is not None:
        yield from status.details


def _unpack(detail: Any, kind: type[M]) -> M | None:
    message = kind()
    return message if detail.Unpack(message) else None
