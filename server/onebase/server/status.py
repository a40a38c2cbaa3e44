"""An error becomes a gRPC status here and nowhere else.

The table is total: every class of `errors` has its code, or is a kind of one that has. Every status carries one
google.rpc.ErrorInfo (reason, domain `onebase`); a BadRequest if a field is to blame; a RetryInfo if a later retry may
succeed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from onebase.server import errors

DOMAIN = "onebase"

CODES: Mapping[type[errors.OnebaseError], grpc.StatusCode] = MappingProxyType(
    {
        errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
        errors.NotFound: grpc.StatusCode.NOT_FOUND,
        errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
        errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
        errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
        errors.Aborted: grpc.StatusCode.ABORTED,
        errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
        errors.Cancelled: grpc.StatusCode.CANCELLED,
        errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
        errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
        errors.DataLoss: grpc.StatusCode.DATA_LOSS,
        errors.Internal: grpc.StatusCode.INTERNAL,
    }
)


def code_of(error: errors.OnebaseError) -> grpc.StatusCode:
    """The code of an error, or of what it is a kind of."""
    return next(CODES[one] for one in type(error).__mro__ if one in CODES)


def rpc_status(error: errors.OnebaseError) -> status_pb2.Status:
    """The google.rpc.Status that tells `error` to a client."""
    code: int = code_of(error).value[0]
    return status_pb2.Status(code=code, message=error.message, details=[_any(detail) for detail in _details(error)])


def _details(error: errors.OnebaseError) -> list[message.Message]:
    metadata = {"field": error.field} if error.field else {}
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(max(0, math.ceil(error.retry_after * 1000)))
        details.append(retry)
    return details


def _any(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
