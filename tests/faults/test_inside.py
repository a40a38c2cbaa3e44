"""What goes wrong inside: numbers that are not finite, and memory that runs out for real."""

from __future__ import annotations

import hashlib
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from faults.conftest import Place, downloaded, endless, fresh
from oracle.fixtures import FIXTURES
from server.harness import array, eventually, floats, pair, refused, tokens_of
from server.tenants import Client
from support import RunningServer, start_server
from transformers import LlamaConfig, LlamaForCausalLM

from onebase.v1 import adapters_pb2, inference_pb2, server_pb2, sessions_pb2, training_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.fault(times=1)]  # what is done to these servers is not undone

FULL, FAILED = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION
LORA = {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]}
LENGTH = 1800
"""Tokens of a sequence to which no gradient can be found in the memory that is left."""
ROOM = 160 * 2**20
"""Bytes that the server may take beyond what it has when it serves."""


def session_of(client: Client, name: str) -> str:
    """A session with a fresh policy."""
    session = client.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=600)).session_id
    client.adapters.CreateAdapter(
        adapters_pb2.CreateAdapterRequest(session_id=session, name=name, lora=LORA, value_head=True, seed=3)
    )
    return str(session)


def forward(
    session: str, name: str, rows: list[tuple[int, ...]], gradient: float | None = None
) -> training_pb2.ForwardBackwardRequest:
    """Cross entropy; or the client's own derivatives, all alike."""
    sequences = [training_pb2.TrainingSequence(sequence=pair((5, 6), row)) for row in rows]
    if gradient is None:
        loss: dict[str, Any] = {"cross_entropy": training_pb2.CrossEntropyLoss()}
    else:
        loss = {"custom": training_pb2.CustomLoss()}
        for one, row in zip(sequences, rows, strict=True):
            one.logprob_gradients.CopyFrom(floats(*[gradient] * len(row)))
    return training_pb2.ForwardBackwardRequest(session_id=session, adapter=name, sequences=sequences, **loss)


def step(session: str, name: str) -> training_pb2.OptimStepRequest:
    return training_pb2.OptimStepRequest(session_id=session, adapter=name, adamw={"learning_rate": 0.01})


def hashes(client: Client, name: str) -> dict[str, bytes]:
    """Of weights and moments."""
    return {file: hashlib.sha256(data).digest() for file, data in downloaded(client, name)[1].items()}


def test_16_what_is_not_finite_skips_the_step_and_changes_no_bit(place: Place) -> None:
    red = place.as_("red")
    name = fresh("hostile")
    session = session_of(red, name)
    rows = [(7, 8, 9), (10, 11)]
    red.training.ForwardBackward(forward(session, name, rows))
    red.training.OptimStep(step(session, name))
    before = hashes(red, name)
    # Finite numbers that grow beyond float32 on their way: in the gradient, in its norm, in AdamW's square of it.
    refusal = refused(red.training.ForwardBackward, forward(session, name, rows, 3e38))
    assert (refusal.code, refusal.reason) == (FAILED, "NONFINITE_LOSS")
    assert refused(red.training.OptimStep, step(session, name)).reason == "NO_GRADIENTS"
    for gradient in (1e25, 1e20):
        red.training.ForwardBackward(forward(session, name, rows, gradient))
        refusal = refused(red.training.OptimStep, step(session, name))
        assert (refusal.code, refusal.reason) == (FAILED, "NONFINITE_GRADIENT")
        assert refused(red.training.OptimStep, step(session, name)).reason == "NO_GRADIENTS"
    assert hashes(red, name) == before
    red.training.ForwardBackward(forward(session, name, rows))
    assert red.training.OptimStep(step(session, name)).adapter.version == 2
    red.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=session))


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of wide layers and a long context: small weights, large activations."""
    path = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=64, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FIXTURES / "base" / name, path / name)
    return path


@pytest.fixture(scope="module")
def narrow(wide: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server on it, and a plain client."""
    with (
        start_server(wide, "--threads", "1", "--train-tokens", "2048", "--kv-slots", "4") as server,
        grpc.insecure_channel(server.address, options=[("grpc.enable_retries", 0)]) as channel,
    ):
        yield server, Client(channel, "")


def row(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(4, 100, length).tolist())


def drawn(client: Client) -> dict[tuple[int, int], list[int]]:
    """Completions of two prompts."""
    request = inference_pb2.GenerateRequest(
        adapter="base",
        prompts=[tokens_of(5, 6, 7), tokens_of(*row(1, 60))],
        sampling={"max_new_tokens": 40, "n": 2, "seed": 3, "ignore_eos": True},
    )
    found: dict[tuple[int, int], list[int]] = {}
    for part in client.inference.Generate(request, timeout=200):
        found.setdefault((part.prompt_index, part.completion_index), []).extend(array(part.tokens).tolist())
    return found


def scored(client: Client) -> list[bytes]:
    sequences = [pair((5, 6), row(seed, 40)) for seed in range(4)]
    request = inference_pb2.LogprobRequest(adapter="base", sequences=sequences)
    return [one.logprobs.data for one in client.inference.Logprob(request, timeout=200).results]


def trained(client: Client, name: str) -> dict[str, bytes]:
    """A policy after a pass and a step."""
    session = session_of(client, name)
    client.training.ForwardBackward(forward(session, name, [row(seed, 30) for seed in range(3)]), timeout=200)
    client.training.OptimStep(step(session, name), timeout=200)
    return hashes(client, name)


def test_30_who_asks_for_too_much_memory_fails_alone(narrow: tuple[RunningServer, Client]) -> None:
    """A limit of the operating system, which torch runs into in the middle of a step."""
    server, client = narrow
    session = session_of(client, "greedy")
    wanted: list[object] = [
        act() for act in (lambda: drawn(client), lambda: scored(client), lambda: trained(client, "a"))
    ]
    before = hashes(client, "greedy")
    process = psutil.Process(server.process.pid)
    limit = process.memory_info().vms + ROOM
    resource.prlimit(server.process.pid, resource.RLIMIT_AS, (limit, limit))

    too_long = forward(session, "greedy", [row(9, 20), row(10, LENGTH)])
    with ThreadPoolExecutor(4) as pool:
        greedy = [pool.submit(refused, client.training.ForwardBackward, too_long, timeout=250)]
        others: list[Callable[[], object]] = [
            lambda: drawn(client),
            lambda: scored(client),
            lambda: trained(client, "b"),
        ]
        beside = [pool.submit(act) for act in others]
        found = [one.result(280) for one in beside]
        refusals = [one.result(280) for one in greedy]
    assert found == wanted
    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (FULL, "OUT_OF_MEMORY"), refusal
        assert f"{LENGTH + 2} tokens" in refusal.message
        assert "--gradient-checkpointing" in refusal.message
    assert hashes(client, "greedy") == before
    assert refused(client.training.OptimStep, step(session, "greedy")).reason == "NO_GRADIENTS"

    # Who could not be run alone either need not wait; who had others beside it that will give memory back, may.
    assert refused(client.training.ForwardBackward, too_long, timeout=250).retry_after is None
    stream = client.inference.Generate(endless())
    next(stream)
    beside_it = refused(client.training.ForwardBackward, too_long, timeout=250)
    stream.cancel()
    assert (beside_it.code, beside_it.reason) == (FULL, "OUT_OF_MEMORY")
    assert (beside_it.retry_after or 0) > 0

    # A pass that is too large as a whole, and not sequence by sequence, goes through in smaller pieces.
    pieces = forward(session, "greedy", [row(seed, 250) for seed in range(8)])
    answer = client.training.ForwardBackward(pieces, timeout=250)
    assert answer.pending_gradients == 1
    assert client.training.OptimStep(step(session, "greedy")).adapter.version == 1
    eventually(lambda: client.server.GetStatus(server_pb2.GetStatusRequest()).kv_slots_used == 0)
    assert process.memory_info().vms <= limit
    assert server.process.poll() is None
    assert "Traceback" not in server.text()
