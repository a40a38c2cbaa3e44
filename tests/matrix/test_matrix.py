"""Every architecture is proven or refused, as tests/matrix.json and docs/architectures.md say.

`make matrix` runs every case with untied and with tied embeddings, which takes minutes. Here each case runs once, every
other one tied; both paths of the code run for many cases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import compare, plain, report
from matrix.cases import CASES
from oracle.fixtures import PEFT_WARNINGS

from onebase.server.engine import attention, engine, formats, loading, proof
from onebase.server.engine.adapters import Adapter

pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_is_proven_or_refused_as_it_is_written(name: str, tmp_path: Path) -> None:
    written = report.read()["architectures"][name]
    outcome = compare.run(name, tmp_path, tied=bool(list(CASES).index(name) % 2))
    assert (outcome.architecture, outcome.status) == (written["class"], written["status"]), outcome
    if outcome.status == "refused":
        assert outcome.architecture in str(outcome.reason)
    else:
        assert {kind for kind, found in outcome.differences.items() if found is None} == {
            kind for kind, found in written["largest_difference"].items() if found is None
        }


def test_what_is_written_is_what_the_matrix_has() -> None:
    written = report.read()
    assert list(written["architectures"]) == list(CASES)
    assert written["tolerance"] == compare.TOLERANCE
    for one in written["architectures"].values():
        assert one["status"] == "refused" or one["largest_difference"]["overall"] <= compare.TOLERANCE
    assert report.PAGE.read_text(encoding="utf-8") == report.page(written)


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, case in CASES.items() for setting in case.shows]
)
def test_a_setting_that_is_lost_would_show(name: str, setting: str, tmp_path: Path) -> None:
    plain.make_base(CASES[name], tmp_path, tied=False)
    assert plain.differs_without(CASES[name], setting, tmp_path) > 1e-2


Patch = Callable[[pytest.MonkeyPatch], None]
EVERYTHING = {"generate", "logprob", "reward", "train"}


def _changed(owner: Any, name: str, place: int, change: Callable[[Any], Any]) -> Patch:
    """Changes one argument of a function."""
    right = getattr(owner, name)

    def wrong(*given: Any, **named: Any) -> Any:
        return right(*given[:place], change(given[place]), *given[place + 1 :], **named)

    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


WRONG: dict[str, tuple[str, Patch, set[str]]] = {
    "scores scaled by more, without a cache": (
        "Llama",
        _changed(attention, "_fresh", 4, lambda scale: scale * 1.001),
        EVERYTHING,
    ),
    "scores scaled by more, with a cache": (
        "Llama",
        _changed(attention, "_decode", 6, lambda scale: scale * 1.001),
        {"generate"},
    ),
    "a window that is one token longer": (
        "Mistral, sliding window",
        _changed(attention.Biases, "__init__", 2, lambda window: window + 1),
        EVERYTHING,
    ),
    "no cap on scores": (
        "Gemma 2",
        _changed(attention.Biases, "__init__", 3, lambda _: None),
        EVERYTHING,
    ),
    "logits that are left as they are": (
        "Granite",
        lambda monkeypatch: monkeypatch.setattr(loading, "logits_finish", lambda _: lambda logits: logits),
        {"generate", "logprob", "train"},
    ),
    "adapters that do a little more": (
        "GPT-2",
        _changed(formats.LoraPair, "of", 2, lambda scaling: scaling * 1.001),
        EVERYTHING,
    ),
    "scores of other states": (
        "Qwen3",
        _changed(engine, "_scores", 1, lambda hidden: hidden * 1.001),
        {"reward"},
    ),
    "steps that are a little longer": (
        "OLMo2",
        lambda monkeypatch: monkeypatch.setattr(Adapter, "_adamw", _longer(Adapter._adamw)),
        {"train"},
    ),
}


def _longer(step: Callable[..., None]) -> Callable[..., None]:
    def longer(self: Adapter, settings: Any, *state: Any) -> None:
        step(self, dataclasses.replace(settings, learning_rate=settings.learning_rate * 1.05), *state)

    return longer


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_engine_is_noticed(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, patch, kinds = WRONG[wrong]
    monkeypatch.setattr(proof, "TOLERANCE", {torch.float32: math.inf})  # or it would be refused at load
    patch(monkeypatch)
    outcome = compare.run(name, tmp_path, tied=False)
    assert outcome.status == "different"
    assert {kind for kind, found in outcome.differences.items() if found and found > compare.TOLERANCE} == kinds
