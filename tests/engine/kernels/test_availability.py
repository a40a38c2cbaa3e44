from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from engine.kernels.layers import CPU, make_layer
from support import environment

from onebase.server.engine.kernels import add_lora, available


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(CPU)


@pytest.mark.parametrize(("capability", "there"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cuda_needs_bfloat16_products(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not available(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available(torch.device("cuda")) == there
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not available(torch.device("cuda"))  # the interpreter reads addresses of this machine's memory


def test_without_triton_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer = make_layer([3, 20], [4, 8])
    table = layer.table()
    assert not table.kernel
    with torch.no_grad():
        assert layer.error(add_lora(layer.x, layer.y.clone(), table, layer.tiles())) < 1e-6


def test_the_package_can_be_imported_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from onebase.server.engine.kernels import available\n"
        "sys.exit(available(torch.device('cpu')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
