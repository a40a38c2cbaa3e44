"""What users see of the package, and what importing it costs them."""

import inspect
import json
import subprocess
import sys
import time

import pytest

import onebase.client as onebase

SURFACE = """
AbortedError AdamW Adapter AdapterKind AdapterVersion AlreadyExistsError BASE BaseModel CancelledError Client
Completion CompletionChunk Content CrossEntropyLoss CustomLoss DataLossError DeadlineExceededError DpoLoss
FailedPreconditionError FinishReason ForwardBackward ImportanceSamplingLoss InternalError InvalidArgumentError
Logprobs LoraSpec Loss NotFoundError OnebaseError OptimStep PermissionDeniedError Policy Pooling PpoLoss QueueStatus
ResourceExhaustedError Reward RewardTerm SamplingParams SavedAdapter Score ScoreOutput Sequence ServerInfo
ServerLimits ServerStatus Session SessionInfo SessionStatus Stream Tokens TrainingSequence UnauthenticatedError
UnavailableError UnimplementedError ValueLoss connect
"""
READING = {"generate", "stream", "logprob", "reference_logprob", "reward"}
ADAPTERS = {"adapter", "adapters", "create_adapter", "load_adapter", "save_adapter", "delete_adapter"}
METHODS = {
    onebase.Client: READING | ADAPTERS | {"info", "status", "open_session", "close"},
    onebase.Session: READING
    | ADAPTERS
    | {"id", "label", "ppo_adapter_name", "score", "forward_backward", "optim_step", "policy"}
    | {"set_active", "refresh", "close"},
    onebase.Policy: {"generate", "logprob", "score", "forward_backward", "optim_step", "save", "facts"},
    onebase.Stream: {"close"},
}


def public(kind):
    return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_surface_is_pinned():
    assert set(onebase.__all__) == set(SURFACE.split())
    assert all(hasattr(onebase, name) for name in onebase.__all__)


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
def test_the_methods_are_pinned_and_documented(kind):
    assert public(kind) == METHODS[kind]
    for name in METHODS[kind]:
        assert inspect.getdoc(getattr(kind, name)), name


@pytest.mark.parametrize("name", sorted(READING | {"score"}))
def test_every_call_takes_a_timeout(name):
    for kind in (onebase.Client, onebase.Session):
        if hasattr(kind, name):
            assert inspect.signature(getattr(kind, name)).parameters["timeout"].default is None


def test_the_defaults_are_those_of_the_contract():
    assert inspect.signature(onebase.connect).parameters["target"].default == "127.0.0.1:7070"
    assert inspect.signature(onebase.Client.generate).parameters["adapter"].default is inspect.Parameter.empty
    assert inspect.signature(onebase.Session.generate).parameters["adapter"].default == ""
    assert inspect.signature(onebase.Session.forward_backward).parameters["loss"].default == onebase.PpoLoss()


def test_no_protobuf_is_in_the_surface():
    for name in onebase.__all__:
        value = getattr(onebase, name)
        if inspect.isclass(value):
            assert not any(base.__module__.startswith("google.protobuf") for base in value.__mro__)


def test_importing_is_light_and_quick():
    program = (
        "import json, sys, time\n"
        "begin = time.process_time()\n"
        "import onebase.client\n"
        "print(json.dumps([time.process_time() - begin, sorted(sys.modules)]))"
    )
    best, loaded = 10.0, []
    for _ in range(3):  # CPU seconds, the best of three: what others do on the machine does not count
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        seconds, loaded = json.loads(out)
        best = min(best, seconds)

    heavy = {"torch", "transformers", "peft", "datasets", "pandas", "rich", "typer", "click", "yaml"}
    assert not heavy & {module.split(".")[0] for module in loaded}
    assert not [module for module in loaded if module.startswith(("onebase.server", "onebase.trainer"))]
    assert best < 1.0


def test_a_process_that_forgets_to_close_ends_at_once_and_in_silence(server):
    program = (
        "import sys, onebase.client as onebase\n"
        "client = onebase.connect(sys.argv[1])\n"
        "session = client.open_session('policy_1')\n"
        "stream = client.stream('ab', adapter='base')\n"
        "print(next(stream).text)\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, server.target], capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "a\n", "")
    assert time.monotonic() - begin < 30
