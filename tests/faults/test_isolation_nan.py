"""A tenant whose adapter overflows, by requests that are all in range: nobody else's numbers change by a bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from faults.conftest import Place, fresh
from server.harness import array, pair, refused, tokens_of
from server.tenants import Client

from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.fault(16)]

FAILED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT
LORA = {"rank": 8, "alpha": 8, "target_modules": ["all-linear"]}
LARGEST = {"learning_rate": 1e3, "weight_decay": 1e30}
"""What no check of a number refuses, and what makes 1e32 of a weight of 0.1."""


def session_of(client: Client, name: str) -> str:
    """A session with a fresh policy."""
    session = client.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=600)).session_id
    client.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(session_id=session, name=name, lora=LORA, seed=3))
    return str(session)


def step(client: Client, session: str, name: str, **adamw: float) -> Any:
    """A pass, and a request of a step."""
    client.training.ForwardBackward(
        training_pb2.ForwardBackwardRequest(
            session_id=session,
            adapter=name,
            sequences=[training_pb2.TrainingSequence(sequence=pair((5, 6), (7, 8, 9)))],
            cross_entropy={},
        )
    )
    return training_pb2.OptimStepRequest(session_id=session, adapter=name, adamw=adamw)


def prompted(name: str, length: int, temperature: float, n: int = 2) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        adapter=name,
        prompts=[tokens_of(*range(5, 5 + length))],
        sampling={"max_new_tokens": 8, "temperature": temperature, "seed": 7, "n": n, "ignore_eos": True},
        return_logprobs=True,
    )


def drawn(client: Client, name: str, length: int, temperature: float) -> list[tuple[int, bytes, bytes]]:
    parts = client.inference.Generate(prompted(name, length, temperature), timeout=60)
    return sorted((one.completion_index, bytes(array(one.tokens)), one.logprobs.data) for one in parts)


def test_16_a_tenant_whose_adapter_overflows_harms_itself_alone(place: Place) -> None:
    red, blue = place.as_("red"), place.as_("blue")
    bad, good = fresh("red"), fresh("blue")
    session, other = session_of(red, bad), session_of(blue, good)
    blue.training.OptimStep(step(blue, other, good, learning_rate=0.01))

    def everything() -> list[Any]:
        return [drawn(blue, name, length, t) for name in ("base", good) for length in (3, 20) for t in (0.0, 1.0)]

    wanted = everything()
    refusal = refused(red.training.OptimStep, step(red, session, bad, learning_rate=1e25))
    assert (refusal.code, refusal.reason, refusal.field) == (INVALID, "OUT_OF_RANGE", "adamw.learning_rate")
    assert red.training.OptimStep(step(red, session, bad, **LARGEST)).adapter.version == 1
    for temperature in (0.0, 1.0):
        refusal = refused(lambda t=temperature: list(red.inference.Generate(prompted(bad, 50, t))))
        assert (refusal.code, refusal.reason) == (FAILED, "NONFINITE_LOGITS")
        assert everything() == wanted
    with ThreadPoolExecutor(4) as pool:  # in the same steps, and in the places that the others leave
        harm = [pool.submit(refused, lambda: list(red.inference.Generate(prompted(bad, 4, 1.0)))) for _ in range(30)]
        for _ in range(3):
            assert everything() == wanted
        assert {one.result(60).reason for one in harm} == {"NONFINITE_LOGITS"}

    # What would not be finite is refused, so whatever is saved can be loaded again.
    worse = fresh("red")
    second = session_of(red, worse)
    request = step(red, second, worse, learning_rate=1e3, weight_decay=1e37)
    refusal = refused(red.training.OptimStep, request)
    assert (refusal.code, refusal.reason, refusal.field) == (FAILED, "NONFINITE_WEIGHTS", "adamw.weight_decay")
    request.adamw.weight_decay = 0.1
    assert red.training.OptimStep(request).gradients_applied == 1  # they had waited
    for name in (bad, worse):
        path = str(place.root / "red" / fresh("saved"))
        red.adapters.SaveAdapter(adapters_pb2.SaveAdapterRequest(name=name, path=path))
        again = adapters_pb2.LoadAdapterRequest(
            session_id=second, name=fresh("red"), path=path, kind="ADAPTER_KIND_POLICY"
        )
        red.adapters.LoadAdapter(again)
    for client, opened in ((red, session), (red, second), (blue, other)):
        client.sessions.CloseSession(sessions_pb2.CloseSessionRequest(session_id=opened))
