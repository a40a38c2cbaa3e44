"""Adapters that nobody uses leave the memory of a real server, and come back bit for bit when somebody does."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from restarts.conftest import Start
from restarts.plain import STEP, Code, Plain, damage, newest, tokens

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, types_pb2
from server import harness

pytestmark = pytest.mark.e2e
IDLE = ("--evict-idle-seconds", "0.5")
NEVER = ("--evict-idle-seconds", "0")


def adapter(client: Plain, name: str = "p") -> types_pb2.Adapter:
    """An adapter as the server's status has it."""
    status = client.server.GetStatus(server_pb2.GetStatusRequest())
    return next(one for one in status.adapters if one.name == name)


def taken(client: Plain, name: str = "p") -> int:
    memory = adapter(client, name).memory
    return memory.weights_bytes + memory.gradient_bytes + memory.optimizer_bytes + memory.old_version_bytes


def wait_evicted(client: Plain, name: str = "p") -> None:
    until = time.monotonic() + 30
    while adapter(client, name).resident:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert taken(client, name) == 0


def generate(client: Plain, name: str = "p") -> list[bytes]:
    request = inference_pb2.GenerateRequest(
        adapter=name,
        prompts=[tokens(5, 6)],
        sampling=inference_pb2.SamplingParams(max_new_tokens=6, seed=4, ignore_eos=True),
        return_logprobs=True,
    )
    return [chunk.SerializeToString(deterministic=True) for chunk in client.inference.Generate(request)]


def score(client: Plain, name: str = "p") -> bytes:
    sequence = types_pb2.Sequence(prompt=tokens(5, 6), completion=tokens(7, 8, 9))
    request = inference_pb2.LogprobRequest(adapter=name, sequences=[sequence])
    return client.inference.Logprob(request).SerializeToString(deterministic=True)


def work(client: Plain, *, idle: bool) -> list[object]:
    """Everything that a client is told of a training; with `idle`, the policy is evicted before each part of it."""
    client.open()
    client.create()
    told: list[object] = []
    parts = (client.train, lambda: generate(client), lambda: score(client), lambda: client.train(number=1))
    for part in (*parts, lambda: client.train(number=2)):
        if idle:
            wait_evicted(client)
        told.append(part())
    if idle:
        wait_evicted(client)
    told.append(client.weights())
    return told


def test_a_training_whose_policy_leaves_and_comes_back_is_one_that_was_not_disturbed(start: Start, state: Path) -> None:
    with start(*STEP, *NEVER) as server, Plain(server.address) as client:
        undisturbed = work(client, idle=False)
        assert adapter(client).resident
    shutil.rmtree(state)  # versions of a name go on over a deletion
    with start(*STEP, *IDLE) as server, Plain(server.address) as client:
        disturbed = work(client, idle=True)
        assert adapter(client).version == 3
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert one == other


def test_all_who_ask_while_it_comes_back_are_answered_and_a_kill_while_it_is_away_loses_nothing(
    start: Start, state: Path
) -> None:
    with start(*STEP, *IDLE) as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.train()
        weights, scored, generated = client.weights(), score(client), generate(client)
        wait_evicted(client)
        with ThreadPoolExecutor(8) as pool:
            scores = [pool.submit(score, client) for _ in range(12)]
            generations = [pool.submit(generate, client) for _ in range(4)]
            assert {one.result(30) for one in scores} == {scored}
            assert all(one.result(30) == generated for one in generations)
        assert adapter(client).resident
        wait_evicted(client)
        server.process.kill()
        server.process.wait()
        session = client.session
    with start(*STEP, *IDLE) as server, Plain(server.address) as client:
        client.session = session
        wait_evicted(client)
        assert client.weights() == weights
        assert score(client) == scored
        client.train(number=1)
        assert client.version() == 2


@pytest.mark.fault(29, times=2)
@pytest.mark.parametrize("kept", [1, 2])
def test_damage_while_it_is_away_is_data_loss_and_the_server_goes_on(start: Start, state: Path, kept: int) -> None:
    """Fault 29, noticed when the adapter is used; the client is told which checkpoint is whole, or that none is."""
    with start(*STEP, *IDLE, "--keep-checkpoints", str(kept)) as server, Plain(server.address) as client:
        client.open()
        client.create("q")
        client.create()
        client.train()
        wait_evicted(client)
        damage(newest(state, "p") / "adapter_model.safetensors")
        for call in (lambda: score(client), lambda: generate(client), client.forward):
            told = harness.refused(call)
            assert (told.code, told.reason) == (Code.DATA_LOSS, "CHECKPOINT_DAMAGED")
            assert ("--restore p=0" if kept == 2 else "no older one is whole") in told.message
        assert not adapter(client).resident
        score(client, "q")
        client.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(session_id=client.session, name="p"))
        client.create()
        client.train()


def test_a_budget_holds_the_least_recently_used_on_disk(start: Start, state: Path) -> None:
    budget = ("--adapter-memory", "1", *NEVER)
    with start(*budget) as server, Plain(server.address) as client:
        client.open()
        client.create()
        client.train()
        wait_evicted(client)  # it was made durable first
        reward = adapter(client, "reward")
        assert reward.resident  # the settings loaded it
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=client.session))
        client.open()
        client.train(number=1)
        assert client.version() == 2
