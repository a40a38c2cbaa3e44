"""When the engine is on the kernels, and what it says when it cannot be. What they compute: kernels/wired.py."""

from __future__ import annotations

import logging

import pytest
import torch
from engine.conftest import BASE

from onebase.server.config import ConfigError, EngineConfig
from onebase.server.engine import loading, open_engine
from onebase.server.engine.kernels import KernelFailure
from onebase.server.errors import FailedPrecondition

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Kernels that are there and work, and the devices that they were tried on."""
    seen: list[torch.device] = []
    monkeypatch.setattr(loading, "available", lambda device: True)
    monkeypatch.setattr(loading, "try_out", lambda device, dtype: seen.append(device))
    return seen


def uses(device: torch.device, kernels: str, *, exact: bool = False) -> bool:
    return loading._uses_kernels(EngineConfig("base", kernels=kernels), torch.bfloat16, device, exact=exact)


@pytest.mark.parametrize(
    ("device", "kernels", "exact", "there"),
    [
        (CUDA, "auto", False, True),
        (CUDA, "auto", True, False),
        (CUDA, "off", False, False),
        (CPU, "auto", False, False),
        (CPU, "on", False, True),
    ],
)
def test_kernels_are_chosen(
    tried: list[torch.device], device: torch.device, kernels: str, exact: bool, there: bool
) -> None:
    assert uses(device, kernels, exact=exact) == there
    assert tried == [device] * there


def test_a_trial_that_fails_leaves_torch_or_ends_the_server(
    tried: list[torch.device], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device, dtype: torch.dtype) -> None:
        raise KernelFailure("the kernels fail here: no C compiler")

    monkeypatch.setattr(loading, "try_out", fail)
    with caplog.at_level(logging.WARNING, "onebase"):
        assert not uses(CUDA, "auto")
    assert "products are torch's: the kernels fail here: no C compiler" in caplog.text
    with pytest.raises(FailedPrecondition, match="no C compiler: serve with --kernels auto") as caught:
        uses(CUDA, "on")
    assert caught.value.field == "kernels"


def test_without_triton_the_server_says_so(tried: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available", lambda device: False)
    assert not uses(CUDA, "auto")
    with pytest.raises(FailedPrecondition, match="Triton has no kernels for cpu here"):
        uses(CPU, "on")
    assert not tried


def test_exact_and_kernels_exclude_each_other(tried: list[torch.device]) -> None:
    with pytest.raises(ConfigError, match="kernels is 'on': an exact engine's products are torch's"):
        EngineConfig("base", exact="on", kernels="on")
    assert not open_engine(EngineConfig(str(BASE), threads=1, kernels="on")).facts.exact
    assert open_engine(EngineConfig(str(BASE), threads=1)).facts.exact
