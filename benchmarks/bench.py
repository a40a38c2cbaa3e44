"""What the cases share: settings, and everything that is opened once for several of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from measure import Effort, Figure, Work, pairs
from models import add_policy, open_base, open_ours, open_peft
from peft import PeftModel
from transformers import LlamaForCausalLM

from onebase.server.engine import Engine
from onebase.server.engine.adapters import Weights
from onebase.server.engine.batch import Row

T = TypeVar("T")

POLICIES = 8
"""Adapters of a mixed batch."""


@dataclass(eq=False)
class Bench:
    """One run of the benchmark.

    Attributes:
        effort: of a case.
        trl_python: the interpreter of an environment with TRL 0.11.4.
        quick: whether expensive cases make one round only.
        closing: closes servers and peers at the end of the run.
    """

    effort: Effort
    trl_python: Path
    quick: bool = False
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _made: dict[Hashable, object] = field(default_factory=dict)

    def once(self, make: Callable[..., T], *arguments: Any) -> T:
        """What `make(*arguments)` made when it was first asked for."""
        key = (make, arguments)
        if key not in self._made:
            self._made[key] = make(*arguments)
        return cast("T", self._made[key])

    def pairs(self, first: Work, second: Work) -> Figure:
        """See `measure.pairs`."""
        return pairs(first, second, self.effort)

    def base(self, name: str, dtype: str) -> LlamaForCausalLM:
        """The plain base."""
        return self.once(open_base, name, dtype)

    def peft(self, name: str, dtype: str) -> PeftModel:
        """The base with PEFT's adapters "a1" to "a8"."""
        return self.once(open_peft, name, dtype, POLICIES)

    def ours(self, name: str, dtype: str, exact: str = "auto") -> Ours:
        """Our engine with eight policies."""
        return self.once(_open_mixed, name, dtype, exact)

    @property
    def rounds(self) -> int:
        """How often a case that takes minutes is run."""
        return 1 if self.quick else 3

    def close(self) -> None:
        """Ends what runs beside this process, and lets go of the models."""
        self.closing.close()
        self._made.clear()


@dataclass(frozen=True)
class Ours:
    """Our engine and its policies."""

    engine: Engine
    policies: Sequence[Weights]

    def of(self, index: int) -> Weights:
        """The policy of a row: rows take turns."""
        return self.policies[index % len(self.policies)]

    def rows(self, ids: torch.Tensor) -> list[Row]:
        """Sequences [B, T], each under its own policy."""
        return [Row(self.of(index), row.tolist()) for index, row in enumerate(ids)]

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """The last hidden states of a flat batch, without gradients."""
        with torch.no_grad():
            return self.engine.forward(rows)[1]


def _open_mixed(name: str, dtype: str, exact: str) -> Ours:
    engine = open_ours(name, dtype, exact=exact)
    return Ours(engine, [add_policy(engine, uid) for uid in range(1, POLICIES + 1)])
