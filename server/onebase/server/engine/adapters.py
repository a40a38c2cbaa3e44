"""Adapters on the device: parameters by version, gradients, AdamW state.

A `Weights` is one version of one adapter. Whoever reads it over several engine steps (a completion, a long score job)
is counted as a reader. An optimizer step writes in place while nobody reads, and into a copy otherwise, so a version's
numbers never change under a reader, and publishing a new version costs nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from peft import LoraConfig

from onebase.server import failpoints
from onebase.server.engine import optimizer, overflow
from onebase.server.engine.lora import LoraPair
from onebase.server.errors import Aborted, FailedPrecondition
from onebase.server.jobs import (
    PEFT_DEFAULT,
    AdamW,
    AdapterFacts,
    AdapterKind,
    AdapterMemory,
    ClientState,
    LoraSpec,
    Pooling,
)

_serials = itertools.count(1)


@dataclass(frozen=True)
class Head:
    """A linear layer on the last hidden state: a value head or a score head."""

    weight: torch.Tensor  # [labels, hidden]
    bias: torch.Tensor | None  # [labels]


@dataclass(eq=False)
class Weights:
    """One version of one adapter."""

    version: int
    lora: dict[str, LoraPair]
    value_head: Head | None = None
    score_head: Head | None = None
    readers: int = 0
    serial: int = field(default_factory=_serials.__next__)  # orders adapters inside a batch

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name that is stable over versions."""
        found: dict[str, torch.Tensor] = {}
        for name, pair in self.lora.items():
            found[f"{name}.lora_A.weight"] = pair.a
            found[f"{name}.lora_B.weight"] = pair.b
        for name, head in (("value_head", self.value_head), ("score", self.score_head)):
            if head is not None:
                found[f"{name}.weight"] = head.weight
                if head.bias is not None:
                    found[f"{name}.bias"] = head.bias
        return found

    @cached_property
    def count(self) -> int:
        """How many parameters there are."""
        return sum(p.numel() for p in self.parameters().values())

    @cached_property
    def bytes(self) -> int:
        """What they take."""
        return _bytes(self.parameters())

    @cached_property
    def largest_rank(self) -> int:
        """The largest rank of any layer."""
        return max((pair.a.shape[0] for pair in self.lora.values()), default=0)

    def copy(self) -> Weights:
        """The same numbers in tensors of their own, with no reader."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        def pair(old: LoraPair) -> LoraPair:
            return LoraPair.of(own(old.a), own(old.b), old.scaling, old.compute_a.dtype)

        def head(old: Head | None) -> Head | None:
            return old and Head(own(old.weight), None if old.bias is None else own(old.bias))

        lora = {name: pair(old) for name, old in self.lora.items()}
        return Weights(self.version, lora, head(self.value_head), head(self.score_head))


@dataclass(eq=False)
class Moments:
    """AdamW's state, by parameter."""

    step: int
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]

    @classmethod
    def zeros(cls, parameters: Mapping[str, torch.Tensor]) -> Moments:
        """The state before the first step."""
        return cls(
            0,
            {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()},
            {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()},
        )

    def copy(self) -> Moments:
        """The same numbers in tensors of their own."""
        return Moments(
            self.step,
            {name: tensor.clone() for name, tensor in self.exp_avg.items()},
            {name: tensor.clone() for name, tensor in self.exp_avg_sq.items()},
        )


@dataclass(eq=False)
class Adapter:
    """A named adapter, as the engine holds it. No state in here is shared with any other adapter."""

    uid: int
    name: str  # for messages only
    kind: AdapterKind
    config: LoraConfig
    weights: Weights
    moments: Moments | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    pending: int = 0  # passes whose gradients wait for a step
    old: list[Weights] = field(default_factory=list)  # versions that are still read, or kept for those who may ask
    window: int = 0  # how many old versions are kept for those who may ask
    append_eos: bool | None = None  # of a reward: whether an end-of-sequence token belongs behind what it reads
    pooling: Pooling = Pooling.LAST_TOKEN  # of a reward: where its score is read
    client_state: ClientState = field(default_factory=ClientState)
    used: float = field(default_factory=time.monotonic)  # when a job last needed it, on that clock

    @property
    def read(self) -> bool:
        """Whether any version of it has a reader."""
        return any(weights.readers for weights in (self.weights, *self.old))

    def leave(self, data: bytes | None) -> None:
        """Keeps something for the client with the newest version; None keeps what is there."""
        if data is not None:
            self.client_state = ClientState(data, self.weights.version)

    def facts(self) -> AdapterFacts:
        """What is true of it now."""
        self._forget_old()
        moments = self.moments
        return AdapterFacts(
            uid=self.uid,
            kind=self.kind,
            version=self.weights.version,
            lora=self._lora,
            value_head=self.weights.value_head is not None,
            num_labels=0 if self.weights.score_head is None else self.weights.score_head.weight.shape[0],
            parameter_count=self.weights.count,
            memory=AdapterMemory(
                weights=self.weights.bytes,
                gradients=_bytes(self.gradients),
                optimizer=0 if moments is None else 2 * self.weights.bytes,  # both moments are like the parameters
                old_versions=sum(weights.bytes for weights in self.old),
            ),
            pending_gradients=self.pending,
            append_eos=self.append_eos,
            pooling=self.pooling,
            idle_seconds=0.0 if self.read else time.monotonic() - self.used,
        )

    @cached_property
    def _lora(self) -> LoraSpec:
        return spec_of(self.config)

    def at(self, version: int | None) -> Weights:
        """A version that can be read: the newest, or one in the window.

        Raises:
            Aborted: that version is gone, or has not come yet.
        """
        if version is None:
            return self.weights
        newest = self.weights.version
        for weights in (self.weights, *self.old):
            if weights.version == version and newest - version <= self.window:
                return weights
        self.check_version(version)
        return self.weights

    def _forget_old(self) -> None:
        oldest = self.weights.version - self.window
        self.old = [weights for weights in self.old if weights.readers or weights.version >= oldest]

    def check_version(self, version: int | None) -> None:
        """Aborted unless it has the version that is asked for, if any."""
        if version is not None and version != self.weights.version:
            raise Aborted(
                "VERSION_MISMATCH",
                f"adapter {self.name!r} has version {self.weights.version}, not {version}: look again and repeat",
            )

    def check_pending(self, expected: int | None) -> None:
        """FailedPrecondition unless at least so many passes' gradients are pending, if any number is expected."""
        if expected is not None and self.pending < expected:
            raise FailedPrecondition(
                "GRADIENTS_LOST",
                f"the gradients of {self.pending} calls of adapter {self.name!r} are pending, not of {expected}: the "
                "server was restarted, or the lease was given back; repeat the ForwardBackward calls since the last "
                "OptimStep",
            )

    def require_value_head(self) -> None:
        """FailedPrecondition unless it carries a value head."""
        if self.weights.value_head is None:
            raise FailedPrecondition(
                "NO_VALUE_HEAD",
                f"adapter {self.name!r} has no value head: create or load it with value_head, or do not ask for values",
            )

    def add_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Adds a pass's gradients to the pending ones."""
        if self.gradients:
            for name, gradient in gradients.items():
                self.gradients[name].add_(gradient)
        else:
            self.gradients = dict(gradients)
        self.pending += 1

    def drop_gradients(self) -> None:
        """Forgets the pending gradients."""
        self.gradients, self.pending = {}, 0

    def step(self, settings: AdamW, max_grad_norm: float) -> tuple[float, int]:
        """One AdamW step (Loshchilov and Hutter 2019, algorithm 2) over this adapter's parameters alone.

        Returns:
            The gradients' global norm before clipping, and how many passes they came from.

        All memory that it needs is taken before anything is changed: without it, nothing is, and the gradients wait.

        Raises:
            FailedPrecondition: without gradients; if their norm, or its square, is not finite; or if a new weight or
                moment would not be. Weights and moments stay as they were, bit for bit; the gradients wait for a step
                with other settings, unless they are what is not finite: then they are dropped.
        """
        if not self.pending:
            raise FailedPrecondition("NO_GRADIENTS", f"adapter {self.name!r} has no gradients: call ForwardBackward")
        gradients, applied = self.gradients, self.pending
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
        scale = torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        clipped = norm * scale if max_grad_norm > 0 else norm
        if not torch.isfinite(clipped * clipped):  # AdamW squares them
            self.drop_gradients()
            raise FailedPrecondition(
                "NONFINITE_GRADIENT",
                f"the gradients of adapter {self.name!r} have norm {norm.item()}: they were dropped and no step was "
                "made; lower the learning rate or the rewards' scale",
            )
        copied = self.weights.copy() if self.weights.readers or self.window else None
        moments = self.moments or Moments.zeros(self.weights.parameters())
        parameters = self.weights.parameters()
        steps = [torch.tensor(float(moments.step), device=norm.device) for _ in parameters]
        clip = scale if max_grad_norm > 0 else None
        overflow.refuse(self.name, parameters, gradients, moments, settings, clipped, clip)
        failpoints.hit("optimizer")
        self.drop_gradients()
        if max_grad_norm > 0:
            torch._foreach_mul_(list(gradients.values()), scale)
        if copied is not None:
            self.old.append(self.weights)
            self.weights = copied
        self.moments = moments
        self._adamw(settings, gradients, moments, steps)
        self.weights.version += 1
        self._forget_old()
        return norm.item(), applied

    def _adamw(
        self, settings: AdamW, gradients: Mapping[str, torch.Tensor], moments: Moments, steps: list[torch.Tensor]
    ) -> None:
        parameters = self.weights.parameters()
        names = list(parameters)
        optimizer.step(
            [parameters[name] for name in names],
            [gradients[name] for name in names],
            [moments.exp_avg[name] for name in names],
            [moments.exp_avg_sq[name] for name in names],
            steps,
            settings,
        )
        moments.step += 1
        for pair in self.weights.lora.values():
            pair.refresh()


def spec_of(config: LoraConfig) -> LoraSpec:
    """PEFT's configuration in our words."""
    targets = config.target_modules
    return LoraSpec(
        rank=config.r,
        alpha=float(config.lora_alpha),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets or (PEFT_DEFAULT,))),
        use_rslora=bool(config.use_rslora),
        rank_pattern=dict(config.rank_pattern or {}),
        alpha_pattern={name: float(alpha) for name, alpha in (config.alpha_pattern or {}).items()},
    )


def _bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
