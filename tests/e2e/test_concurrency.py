"""Sixteen threads of sixteen sessions mix every RPC; each answer is, bit for bit, the one it gets alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from e2e.conftest import READERS, REWARDS, TRAINEES
from support import RunningServer

from onebase.client import (
    AdamW,
    Client,
    DeadlineExceededError,
    NotFoundError,
    OnebaseError,
    PpoLoss,
    SamplingParams,
    Sequence,
    Session,
    TrainingSequence,
    connect,
)

pytestmark = pytest.mark.e2e
ROUNDS = 12


def sequences(chance: random.Random, count: int) -> list[Sequence]:
    def tokens(shortest: int, longest: int) -> list[int]:
        return [chance.randrange(4, 120) for _ in range(chance.randint(shortest, longest))]

    return [Sequence(tokens(1, 20), tokens(1, 30)) for _ in range(count)]


@dataclass(frozen=True)
class Ask:
    """One call: made with a session, or with the client alone."""

    name: str
    run: Callable[[Session], Any]
    becomes: str = ""  # the session's active adapter afterwards, if the call changes it


def ask(seed: int) -> Ask:
    """A random call that reads."""
    chance = random.Random(seed)
    adapter = chance.choice([*READERS, "base"])
    policy = chance.choice(READERS)
    some = sequences(chance, chance.randint(1, 6))
    kind = chance.choice(["generate", "stream", "logprob", "reference", "reward", "score"])
    if kind in ("generate", "stream"):
        prompts = [s.prompt for s in some]
        sampling = SamplingParams(
            max_new_tokens=chance.randint(1, 24),
            n=chance.randint(1, 3),
            seed=seed,
            temperature=chance.choice([0.0, 0.8, 1.0]),
            top_k=chance.choice([0, 5]),
            top_p=chance.choice([1.0, 0.9]),
        )
        if kind == "generate":
            return Ask(kind, lambda s: s.generate(prompts, adapter=adapter, sampling=sampling, logprobs=True))
        return Ask(kind, lambda s: joined(s.stream(prompts, adapter=adapter, sampling=sampling)))
    if kind == "logprob":
        return Ask(kind, lambda s: s.logprob(some, adapter=adapter, entropy=True))
    if kind == "reference":
        return Ask(kind, lambda s: s.reference_logprob(some))
    if kind == "reward":
        rewards = chance.sample(REWARDS, chance.randint(1, 2))
        return Ask(kind, lambda s: s.reward(some, rewards, per_token=True, ppo_adapter_name=policy), policy)
    weights = {name: chance.uniform(-2, 2) for name in REWARDS}
    return Ask(kind, lambda s: s.score(some, rewards=weights, ppo_adapter_name=policy), policy)


def joined(chunks: Any) -> dict[tuple[int, int], tuple[list[int], str]]:
    found: dict[tuple[int, int], tuple[list[int], str]] = {}
    for chunk in chunks:
        tokens, text = found.setdefault((chunk.prompt_index, chunk.completion_index), ([], ""))
        found[chunk.prompt_index, chunk.completion_index] = ([*tokens, *chunk.tokens.tolist()], text + chunk.text)
    return found


def plain(answer: Any) -> Any:
    """An answer as nested lists, floats kept to the bit."""
    if isinstance(answer, np.ndarray):
        return answer.dtype.str, answer.tobytes()
    if isinstance(answer, dict):
        return {key: plain(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [plain(one) for one in answer]
    return plain(vars(answer)) if hasattr(answer, "__dataclass_fields__") else answer


def trouble(session: Session, chance: random.Random) -> None:
    """A call that fails, is too late, or is cancelled."""
    some = sequences(chance, 3)
    kind = chance.choice(["unknown adapter", "bad token", "deadline", "cancel"])
    if kind == "unknown adapter":
        with pytest.raises(NotFoundError):
            session.score(some, ppo_adapter_name="nobody")
    elif kind == "bad token":
        with pytest.raises(OnebaseError, match="120"):
            session.reward([Sequence([5], [120])], REWARDS)
    elif kind == "deadline":
        with pytest.raises(DeadlineExceededError):
            session.generate([[5]] * 8, sampling=SamplingParams(max_new_tokens=100, n=8, ignore_eos=True), timeout=0.02)
    else:
        stream = session.stream([[5]], sampling=SamplingParams(max_new_tokens=100, ignore_eos=True))
        next(stream)
        stream.close()  # type: ignore[attr-defined]


def read(address: str, number: int, answers: dict[int, Any]) -> None:
    """One reader's thread: random calls and troubles, and its active adapter is its own after each of them."""
    chance = random.Random(1000 + number)
    with connect(address) as client, client.open_session(READERS[number], label=f"reader {number}") as session:
        active = READERS[number]
        for _ in range(ROUNDS):
            if chance.random() < 0.3:
                trouble(session, chance)
            else:
                seed = chance.choice(list(answers))
                call = ask(seed)
                assert plain(call.run(session)) == answers[seed], (call.name, seed)
                active = call.becomes or active
            assert session.refresh().ppo_adapter_name == active == session.ppo_adapter_name


def train(client: Client, name: str, seed: int) -> Any:
    """A little training: its numbers, and the policy's logprobs afterwards."""
    chance, numbers = random.Random(seed), np.random.default_rng(seed)
    found = []
    with client.open_session(name, label=name) as session:
        for _ in range(3):
            batch = []
            for s in sequences(chance, 5):
                t = len(s.completion)
                arrays = [numbers.normal(size=t).astype(np.float32) for _ in range(4)]
                batch.append(TrainingSequence(s.prompt, s.completion, arrays[0] * 0.1 - 4, *arrays[1:]))  # type: ignore[arg-type]
            passed = session.forward_backward(batch, PpoLoss())
            stepped = session.optim_step(AdamW(1e-2, weight_decay=0.1), max_grad_norm=1.0)
            found.append([dict(passed.metrics), passed.logprobs, stepped.grad_norm])
        found.append(session.logprob(sequences(chance, 4))[0].logprobs)
        assert session.refresh().ppo_adapter_name == name
    return plain(found)


def test_each_answer_equals_the_one_it_gets_alone(server: RunningServer, client: Client) -> None:
    with client.open_session(label="alone") as session:
        answers = {seed: plain(ask(seed).run(session)) for seed in range(60)}
    assert {ask(seed).name for seed in answers} == {"generate", "stream", "logprob", "reference", "reward", "score"}
    for name in TRAINEES:
        client.save_adapter(name, f"fresh/{name}", overwrite=True)

    def begin_again() -> None:  # without the moments of a training before
        for name in TRAINEES:
            with client.open_session(name) as session:
                session.load_adapter(name, f"fresh/{name}", replace=True)

    begin_again()
    alone = {name: train(client, name, seed) for seed, name in enumerate(TRAINEES)}
    begin_again()

    def trained(name: str, seed: int) -> Any:
        with connect(server.address) as own:
            return train(own, name, seed)

    with ThreadPoolExecutor(len(READERS) + len(TRAINEES)) as pool:
        trainings = {name: pool.submit(trained, name, seed) for seed, name in enumerate(TRAINEES)}
        readings = [pool.submit(read, server.address, number, answers) for number in range(len(READERS))]
        for reading in readings:
            reading.result(200)
        for name, training in trainings.items():
            assert training.result(200) == alone[name], name
    status = client.status()
    assert status.kv_slots_used == 0
    assert all(queue.waiting == queue.running == 0 for queue in status.queues)
    assert {a.name: a.old_version_bytes for a in status.adapters if a.old_version_bytes} == {}


def test_a_lost_connection_leaves_the_active_adapter_and_frees_the_device(
    server: RunningServer, client: Client
) -> None:
    with client.open_session(READERS[0], label="lost") as session:
        other = connect(server.address)
        lost = other.open_session(resume=session.id)
        begun = threading.Event()

        def stream() -> None:
            chunks = lost.stream([[5]], sampling=SamplingParams(max_new_tokens=110, n=4, ignore_eos=True))
            next(chunks)
            begun.set()
            with pytest.raises(OnebaseError):
                joined(chunks)

        thread = threading.Thread(target=stream)
        thread.start()
        assert begun.wait(30)
        lost.reward([Sequence([5], [6])], REWARDS, ppo_adapter_name=READERS[1])
        other._transport.close()
        thread.join(30)
        for _ in range(100):
            if client.status().kv_slots_used == 0:
                break
            threading.Event().wait(0.05)
        assert client.status().kv_slots_used == 0
        assert session.refresh().ppo_adapter_name == READERS[1]
