from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from onebase.server import errors
from onebase.server.status import CODES, code_of, rpc_status


def all_errors():
    found, todo = [], [errors.OnebaseError]
    while todo:
        for one in todo.pop().__subclasses__():
            if one.__module__ == "onebase.server.errors":
                found.append(one)
                todo.append(one)
    return found


def test_every_error_has_a_code_and_every_code_is_used_once():
    assert set(CODES) == {one for one in all_errors() if one.__base__ is errors.OnebaseError}
    assert len(set(CODES.values())) == len(CODES)
    assert grpc.StatusCode.UNKNOWN not in CODES.values()


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_an_error_carries_its_name_in_its_code(kind):
    code = code_of(kind("REASON", "what and why"))
    words = "".join(word.capitalize() for word in code.name.split("_"))
    assert words in {one.__name__ for one in kind.__mro__[: kind.__mro__.index(errors.OnebaseError)]}
    assert rpc_status(kind("REASON", "what and why")).code == code.value[0]


def details(error):
    status = rpc_status(error)
    return status.message, {any_.TypeName().removeprefix("google.rpc."): any_ for any_ in status.details}


def unpacked(kind, any_):
    message = kind()
    assert any_.Unpack(message)
    return message


def test_an_error_info_and_nothing_else_without_field_and_retry():
    message, found = details(errors.NotFound("ADAPTER_NOT_FOUND", "there is no 'x'"))
    assert message == "there is no 'x'"
    assert list(found) == ["ErrorInfo"]
    info = unpacked(error_details_pb2.ErrorInfo, found["ErrorInfo"])
    assert (info.reason, info.domain) == ("ADAPTER_NOT_FOUND", "onebase")


def test_a_field_is_a_bad_request():
    _, found = details(errors.InvalidArgument("BAD", "it is 7: use 8", field="sequences[3].prompt"))
    violation = unpacked(error_details_pb2.BadRequest, found["BadRequest"]).field_violations[0]
    assert (violation.field, violation.description) == ("sequences[3].prompt", "it is 7: use 8")


@pytest.mark.parametrize(("seconds", "millis"), [(1.5, 1500), (0.0001, 1), (0.0, 0), (-3.0, 0)])
def test_a_retry_is_never_shorter_than_said_and_never_negative(seconds, millis):
    _, found = details(errors.ResourceExhausted("QUEUE_FULL", "full", retry_after=seconds))
    assert unpacked(error_details_pb2.RetryInfo, found["RetryInfo"]).retry_delay.ToMilliseconds() == millis
