"""A handle on one policy of a session."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from onebase.client import types as t
from onebase.client.codec.inference import Prompts, Rewards, Sequences

if TYPE_CHECKING:
    from onebase.client.session import Session

_SAMPLING, _PPO = t.SamplingParams(), t.PpoLoss()


class Policy:
    """A session's calls, bound to one policy's name. It goes on meaning that policy when another becomes active."""

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self.name = name

    def __repr__(self) -> str:
        return f"<Policy {self.name!r} of {self._session!r}>"

    def facts(self, *, timeout: float | None = None) -> t.Adapter:
        """The policy as it is now: version, LoRA shape, memory."""
        return self._session.adapter(self.name, timeout=timeout)

    def generate(
        self,
        prompts: Prompts,
        *,
        sampling: t.SamplingParams = _SAMPLING,
        logprobs: bool = False,
        values: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Completion]:
        """Samples completions, as `Session.generate` does."""
        return self._session.generate(
            prompts,
            adapter=self.name,
            sampling=sampling,
            logprobs=logprobs,
            values=values,
            adapter_version=adapter_version,
            timeout=timeout,
        )

    def logprob(
        self,
        sequences: Sequences,
        *,
        entropy: bool = False,
        values: bool = False,
        logits: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Logprobs]:
        """Logprobs of each completion's tokens, as `Session.logprob` gives them."""
        return self._session.logprob(
            sequences,
            adapter=self.name,
            entropy=entropy,
            values=values,
            logits=logits,
            adapter_version=adapter_version,
            timeout=timeout,
        )

    def score(
        self,
        sequences: Sequences,
        *,
        rewards: Rewards = None,
        reference: str = t.BASE,
        outputs: Collection[t.ScoreOutput] | None = None,
        critic: str = "",
        append_eos: bool | None = None,
        pooling: t.Pooling | None = None,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Score]:
        """All of PPO's numbers, as `Session.score` gives them; makes this policy the session's active one."""
        return self._session.score(
            sequences,
            rewards=rewards,
            reference=reference,
            outputs=outputs,
            critic=critic,
            append_eos=append_eos,
            pooling=pooling,
            ppo_adapter_name=self.name,
            adapter_version=adapter_version,
            timeout=timeout,
        )

    def forward_backward(
        self,
        sequences: t.TrainingSequence | Iterable[t.TrainingSequence],
        loss: t.Loss = _PPO,
        *,
        denominator: float | None = None,
        expected_version: int | None = None,
        expected_pending: int | None = None,
        timeout: float | None = None,
    ) -> t.ForwardBackward:
        """Adds to the policy's pending gradients, as `Session.forward_backward` does."""
        return self._session.forward_backward(
            sequences,
            loss,
            adapter=self.name,
            denominator=denominator,
            expected_version=expected_version,
            expected_pending=expected_pending,
            timeout=timeout,
        )

    def optim_step(
        self,
        adamw: t.AdamW,
        *,
        max_grad_norm: float = 0.0,
        expected_version: int | None = None,
        expected_pending: int | None = None,
        client_state: bytes | None = None,
        timeout: float | None = None,
    ) -> t.OptimStep:
        """Makes the policy's next version, as `Session.optim_step` does."""
        return self._session.optim_step(
            adamw,
            max_grad_norm=max_grad_norm,
            adapter=self.name,
            expected_version=expected_version,
            expected_pending=expected_pending,
            client_state=client_state,
            timeout=timeout,
        )

    def checkpoint(self, *, client_state: bytes | None = None, timeout: float | None = None) -> t.AdapterVersion:
        """Makes the policy's newest version durable now, as `Session.checkpoint_adapter` does."""
        return self._session.checkpoint_adapter(self.name, client_state=client_state, timeout=timeout)

    def client_state(self, *, timeout: float | None = None) -> t.ClientState:
        """What was left with the policy, as `Session.client_state` gives it."""
        return self._session.client_state(self.name, timeout=timeout)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        with_optimizer: bool = False,
        overwrite: bool = False,
        merged: bool = False,
        timeout: float | None = None,
    ) -> t.SavedAdapter:
        """Writes the policy on the server, as `Session.save_adapter` does."""
        return self._session.save_adapter(
            path,
            name=self.name,
            with_optimizer=with_optimizer,
            overwrite=overwrite,
            merged=merged,
            timeout=timeout,
        )
