"""Bits of the contract that the fake server's services are made of."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from onebase.v1 import types_pb2


@dataclass
class Failure:
    """A status to fail a call with."""

    code: grpc.StatusCode
    message: str = "as planned"
    reason: str = ""
    field: str = ""
    retry_after: float | None = None
    after_the_work: bool = False
    """Do the work first, then lose the answer."""

    def status(self):
        details = [error_details_pb2.ErrorInfo(reason=self.reason, domain="onebase")] if self.reason else []
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after * 1000))
            details.append(retry)
        packed = [Any() for _ in details]
        for box, detail in zip(packed, details, strict=True):
            box.Pack(detail)
        return rpc_status.to_status(status_pb2.Status(code=self.code.value[0], message=self.message, details=packed))


def floats(*numbers, shape=None):
    array = np.array(numbers, "<f4")
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=shape or array.shape, data=array.tobytes())


def ids(*numbers):
    array = np.array(numbers, "<i4")
    return types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=array.shape, data=array.tobytes())


def length(content):
    if content.HasField("chat"):
        return sum(len(message.content) for message in content.chat.messages)
    return len(content.text) if content.HasField("text") else content.tokens.shape[0]


def version(name, number=7):
    return types_pb2.AdapterVersion(name=name, version=number)
