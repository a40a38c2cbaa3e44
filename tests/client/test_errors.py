import pickle
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from client.wire import Failure
from grpc import StatusCode

from onebase.client import errors
from onebase.client.errors import ERRORS, OnebaseError, translate


def test_every_status_but_ok_has_its_exception():
    assert set(ERRORS) == set(StatusCode) - {StatusCode.OK}


def test_every_exception_is_the_exception_of_some_status():
    tree = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, OnebaseError)}
    assert tree - {OnebaseError} == set(ERRORS.values())


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")}
    assert drawn == {kind.__name__ for kind in ERRORS.values()} | {"OnebaseError"}


@pytest.fixture
def failing():
    """Calls a server that fails as it is told, and gives the client's gRPC error."""
    planned = []

    def handle(request, context):
        context.abort_with_status(planned.pop().status())

    handler = grpc.method_handlers_generic_handler("x.Y", {"Z": grpc.unary_unary_rpc_method_handler(handle)})
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    def fail(failure):
        planned.append(failure)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/x.Y/Z")(b"")
        return caught.value

    yield fail
    server.stop(0).wait()


@pytest.mark.parametrize("code", sorted(ERRORS, key=lambda code: code.value[0]))
def test_a_status_becomes_its_exception(failing, code):
    error = translate(failing(Failure(code, "why and what now")), "Y/Z")

    assert type(error) is ERRORS[code]
    assert error.method == "Y/Z"
    if code is not StatusCode.DEADLINE_EXCEEDED:
        assert str(error) == "why and what now"


def test_rich_details_are_read(failing):
    failure = Failure(
        StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", field="sequences[3].prompt", retry_after=1.25
    )

    error = translate(failing(failure), "Y/Z")

    assert (error.reason, error.field, error.retry_after) == ("QUEUE_FULL", "sequences[3].prompt", 1.25)


def test_without_details_there_is_no_reason_no_field_and_no_time(failing):
    error = translate(failing(Failure(StatusCode.ABORTED)), "Y/Z")

    assert (error.reason, error.field, error.retry_after) == ("", "", None)


def test_details_that_contradict_the_status_are_not_believed():
    error = translate(_Contradicting(), "Y/Z")

    assert type(error) is errors.UnavailableError
    assert error.reason == ""


class _Contradicting(grpc.RpcError):
    """What a client sees when a proxy replaces the status but passes on the details."""

    def code(self):
        return StatusCode.UNAVAILABLE

    def details(self):
        return "proxy"

    def trailing_metadata(self):
        return Failure(StatusCode.NOT_FOUND, reason="ADAPTER_NOT_FOUND").status().trailing_metadata


def test_a_bare_deadline_says_which_call_and_what_helps(failing):
    error = translate(failing(Failure(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")), "Y/Z")

    assert str(error) == "Y/Z was not answered within its timeout; give it a longer one, or fewer sequences"


def test_a_connection_that_breaks_under_a_call_is_unavailable_whatever_grpc_calls_it(failing):
    broken = translate(failing(Failure(StatusCode.UNKNOWN, "Stream removed (Socket closed)")), "Y/Z")
    assert type(broken) is ERRORS[StatusCode.UNAVAILABLE]
    other = translate(failing(Failure(StatusCode.UNKNOWN, "something else")), "Y/Z")
    assert type(other) is ERRORS[StatusCode.UNKNOWN]


def test_a_status_without_words_is_still_told(failing):
    assert str(translate(failing(Failure(StatusCode.DATA_LOSS, "")), "Y/Z")) == "Y/Z failed with DATA_LOSS"


def test_an_exception_survives_pickling():
    error = errors.AbortedError("moved on", reason="VERSION", field="expected_version", retry_after=2.0, method="A/B")

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is errors.AbortedError
    assert (str(copy), vars(copy)) == ("moved on", vars(error))
