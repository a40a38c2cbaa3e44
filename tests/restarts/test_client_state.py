"""A client that is killed with the server has its own generator's state back, and goes on bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from restarts.conftest import Start
from restarts.plain import STEP, Plain, refused

from onebase.client import AdamW, CrossEntropyLoss, LoraSpec, SamplingParams, Session, TrainingSequence, connect
from onebase.v1 import adapters_pb2

pytestmark = pytest.mark.e2e


def learn(session: Session, generator: np.random.Generator, steps: int) -> list[list[int]]:
    """Steps on what the policy writes, with seeds that the client draws; the generator is kept with each version."""
    drawn = []
    for _ in range(steps):
        sampling = SamplingParams(max_new_tokens=6, seed=int(generator.integers(2**31)), ignore_eos=True)
        [one] = session.generate("w5 w6", sampling=sampling)
        drawn.append(one.tokens.tolist())
        row = TrainingSequence(prompt=np.array([5, 6]), completion=one.tokens)
        session.forward_backward(row, CrossEntropyLoss())
        state = json.dumps(generator.bit_generator.state).encode()
        session.optim_step(AdamW(learning_rate=0.05), client_state=state)
    return drawn


def begin(address: str, name: str, steps: int) -> tuple[str, list[list[int]]]:
    """A client that leaves without a word: its session's id, which it has written down somewhere, and what it drew."""
    session = connect(address).open_session(ttl=600)
    session.create_adapter(name, LoraSpec(rank=4, target_modules=("all-linear",)), seed=1)
    session.set_active(name)
    drawn = learn(session, np.random.default_rng(7), steps)
    session._keepalive.stop(1.0)
    return session.id, drawn


def hashes(address: str, name: str) -> dict[str, bytes]:
    with Plain(address) as client:
        return client.weights(name)


def test_draws_steps_and_the_clients_generator_go_on_as_if_nothing_had_happened(start: Start) -> None:
    """No generator lives in the server: a draw depends on its request's seed and on the weights alone."""
    with start(*STEP) as server:
        _, wanted = begin(server.address, "undisturbed", 4)
        session_id, found = begin(server.address, "killed", 2)
        assert found == wanted[:2]
        server.process.kill()
        server.process.wait()
    with start(*STEP) as server, connect(server.address) as client:
        kept = client.client_state("killed")
        assert (kept.adapter.version, client.adapter("killed").durable_version) == (2, 2)
        generator = np.random.default_rng()
        generator.bit_generator.state = json.loads(kept.data)
        with client.open_session(resume=session_id) as session:
            assert found + learn(session, generator, 2) == wanted
        assert hashes(server.address, "killed") == hashes(server.address, "undisturbed")


def test_a_save_that_was_answered_is_answered_the_same_after_a_kill(start: Start, tmp_path: Path) -> None:
    """Exactly once: the retry finds the answer, and not its own directory in its way."""
    root = ("--root", str(tmp_path / "root"))
    request = adapters_pb2.SaveAdapterRequest(request_id="save", name="p", path="there", with_optimizer=True)
    again = adapters_pb2.SaveAdapterRequest(request_id="again", name="p", path="there")
    with start(*root) as server, Plain(server.address) as client:
        client.open()
        client.create()
        answer = client.adapters.SaveAdapter(request)
        server.process.kill()
        server.process.wait()
    with start(*root) as server, Plain(server.address) as client:
        assert client.adapters.SaveAdapter(request) == answer
        assert refused(client.adapters.SaveAdapter, again)[1] == "PATH_TAKEN"
        assert (tmp_path / "root" / "there" / "onebase.json").is_file()
