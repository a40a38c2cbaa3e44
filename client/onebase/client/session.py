"""A session: a client's lease on its adapters, and the calls that need it."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from onebase.client import types as t
from onebase.client.active import ActiveAdapter
from onebase.client.calls import Calls
from onebase.client.codec import inference, sessions, training
from onebase.client.codec.inference import Prompts, Rewards, Sequences
from onebase.client.codec.rpc import Call
from onebase.client.errors import (
    CancelledError,
    DeadlineExceededError,
    NotFoundError,
    OnebaseError,
    UnavailableError,
)
from onebase.client.keepalive import KeepAlive
from onebase.client.policy import Policy
from onebase.client.transport import Stream, Transport, new_request_id

Result = TypeVar("Result")

_SAMPLING, _PPO = t.SamplingParams(), t.PpoLoss()
_REFRESH_SECONDS = 2.0
_CLOSE_SECONDS = 10.0
_STOP_SECONDS = 1.0


class Session(Calls):
    """An open session; `Client.open_session` makes one. Closes itself at the end of a `with` block.

    A method's adapter "" is the session's active one, `ppo_adapter_name`. A thread in the background tells the server
    that this client is there, so the session does not end while it is. Any number of threads may use a session. Every
    method raises an `OnebaseError`; `timeout` is in seconds, None takes the client's.
    """

    def __init__(self, transport: Transport, info: t.SessionInfo) -> None:
        super().__init__(transport, info.session_id)
        self._info = info
        self._active = ActiveAdapter(info.ppo_adapter_name)
        self._lock = threading.Lock()
        self._closed = False
        self._beat_seconds = info.ttl_seconds / 3
        attend = sessions.attend(info.session_id)
        self._keepalive = KeepAlive(transport, attend, self._beat, self._beat_seconds)

    @property
    def id(self) -> str:
        """The session's id: a secret, with which a client can go on with this session (`resume`)."""
        return self._info.session_id

    @property
    def label(self) -> str:
        """Its name for people."""
        return self._info.label

    @property
    def ppo_adapter_name(self) -> str:
        """The active adapter, as the server last told it; "" if there is none."""
        return self._active.name

    def __repr__(self) -> str:
        return f"<Session {self.label!r} at {self._transport.target}, active adapter {self.ppo_adapter_name!r}>"

    # ------------------------------------------------------------------------------------------------- reading

    def generate(
        self,
        prompts: Prompts,
        *,
        adapter: str = "",
        sampling: t.SamplingParams = _SAMPLING,
        logprobs: bool = False,
        values: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Completion]:
        """Samples completions: prompt by prompt, and each prompt's n in order. See `Client.generate`."""
        call = self._generate(prompts, adapter, sampling, logprobs, values, adapter_version, stream_tokens=False)
        return inference.join_chunks(self._transport.collect(call, timeout))

    def stream(
        self,
        prompts: Prompts,
        *,
        adapter: str = "",
        sampling: t.SamplingParams = _SAMPLING,
        logprobs: bool = False,
        values: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> Stream[t.CompletionChunk]:
        """Samples completions and gives their tokens as they are drawn; closing the iterator stops the work."""
        call = self._generate(prompts, adapter, sampling, logprobs, values, adapter_version, stream_tokens=True)
        return self._transport.stream(call, timeout)

    def logprob(
        self,
        sequences: Sequences,
        *,
        adapter: str = "",
        entropy: bool = False,
        values: bool = False,
        logits: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Logprobs]:
        """Logprobs of each completion's tokens, [t] each, at temperature 1. See `Client.logprob`."""
        call = inference.logprob(
            sequences,
            adapter=adapter,
            entropy=entropy,
            values=values,
            logits=logits,
            adapter_version=adapter_version,
            session_id=self.id,
        )
        return self._transport.run(call, timeout)

    def reward(
        self,
        sequences: Sequences,
        rewards: Rewards = None,
        *,
        append_eos: bool | None = None,
        pooling: t.Pooling | None = None,
        per_token: bool = False,
        ppo_adapter_name: str = "",
        timeout: float | None = None,
    ) -> list[t.Reward]:
        """Scores of each sequence. `ppo_adapter_name` is the active adapter from here on. See `Client.reward`."""
        call = inference.reward(
            sequences,
            rewards,
            append_eos=append_eos,
            pooling=pooling,
            per_token=per_token,
            ppo_adapter_name=ppo_adapter_name,
            session_id=self.id,
        )
        return self._run_telling(call, ppo_adapter_name, timeout)

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
        ppo_adapter_name: str = "",
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Score]:
        """All of PPO's numbers for a batch, in one pass over the base.

        Args:
            sequences: one sequence or several.
            rewards: reward adapters, as `Client.reward` takes them; None asks the server's only one.
            reference: "base", or a frozen adapter.
            outputs: what to compute; None is logprobs, reference_logprobs, values and rewards.
            critic: the critic that gives the values; "" takes the policy's own value head.
            append_eos: end the sequences for the reward adapters; None does as each declares, see `Client.reward`.
            pooling: where scores are read; None is as each reward adapter declares.
            ppo_adapter_name: the policy, which is the session's active adapter from here on; "" takes the active one.
            adapter_version: the version that must answer; `AbortedError` if it is not the newest.
            timeout: seconds.
        """
        call = inference.score(
            sequences,
            rewards=rewards,
            reference=reference,
            outputs=outputs,
            critic=critic,
            append_eos=append_eos,
            pooling=pooling,
            ppo_adapter_name=ppo_adapter_name,
            adapter_version=adapter_version,
            session_id=self.id,
        )
        return self._run_telling(call, ppo_adapter_name, timeout)

    # ------------------------------------------------------------------------------------------------ training

    def forward_backward(
        self,
        sequences: t.TrainingSequence | Iterable[t.TrainingSequence],
        loss: t.Loss = _PPO,
        *,
        adapter: str = "",
        denominator: float | None = None,
        expected_version: int | None = None,
        expected_pending: int | None = None,
        timeout: float | None = None,
    ) -> t.ForwardBackward:
        """Adds the gradients of the loss over these sequences to the adapter's pending gradients: all, or none.

        Args:
            sequences: what to train on; every array [t], one number per completion token.
            loss: which one, with its settings; it says which arrays the sequences need.
            adapter: the policy or critic; this session must hold its lease, or gets it where nobody does.
            denominator: divides the sum over tokens (DPO: over pairs); None is how many count here, and 1 for a
                custom loss.
            expected_version: `AbortedError` if this is not the policy's version.
            expected_pending: how many of these calls wait for an `optim_step`; `FailedPreconditionError` with the
                reason GRADIENTS_LOST if they are fewer, as after a restart of the server: repeat them.
            timeout: seconds.
        """
        call = training.forward_backward(
            sequences,
            loss,
            adapter=adapter,
            denominator=denominator,
            expected_version=expected_version,
            expected_pending=expected_pending,
            session_id=self.id,
            request_id=new_request_id(),
        )
        return self._transport.run(call, timeout)

    def optim_step(
        self,
        adamw: t.AdamW,
        *,
        max_grad_norm: float = 0.0,
        adapter: str = "",
        expected_version: int | None = None,
        expected_pending: int | None = None,
        client_state: bytes | None = None,
        timeout: float | None = None,
    ) -> t.OptimStep:
        """One AdamW step with the pending gradients, which makes the adapter's next version.

        `max_grad_norm` scales the adapter's gradients down to this global norm; 0 does not clip. What is expected is
        checked as in `forward_backward`. `client_state` is kept with that version, in every checkpoint of it, until
        another replaces it: what a trainer wants back with the weights, as its step counter and its generator's state;
        at most 1 MiB, and None keeps what is there. `client_state()` reads it.
        """
        call = training.optim_step(
            adamw,
            max_grad_norm=max_grad_norm,
            adapter=adapter,
            expected_version=expected_version,
            expected_pending=expected_pending,
            client_state=client_state,
            session_id=self.id,
            request_id=new_request_id(),
        )
        return self._transport.run(call, timeout)

    # ------------------------------------------------------------------------------------------------ adapters

    def policy(self, name: str = "") -> Policy:
        """A handle on one policy; "" is the one that is active now.

        Raises:
            ValueError: the session has no active adapter.
        """
        bound = name or self.ppo_adapter_name
        if not bound:
            raise ValueError("the session has no active adapter; name a policy, or make one active with set_active")
        return Policy(self, bound)

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "",
        with_optimizer: bool = False,
        overwrite: bool = False,
        merged: bool = False,
        timeout: float | None = None,
    ) -> t.SavedAdapter:
        """Writes an adapter, "" the active one, on the server. See `Client.save_adapter`."""
        return self._save(name or self.ppo_adapter_name, path, with_optimizer, overwrite, merged, timeout)

    # ----------------------------------------------------------------------------------------------- the session

    def set_active(self, name: str, *, timeout: float | None = None) -> None:
        """Makes another policy the active one and takes its lease; the old one's lease is kept.

        Raises:
            AbortedError: another session holds the lease; `retry_after` says when it may run out.
        """
        info = self._transport.run(sessions.set_active(self.id, name), timeout)
        self._active.hear(info.ppo_adapter_name)

    def refresh(self, *, timeout: float | None = None) -> t.SessionInfo:
        """Asks the server how the session stands."""
        return self._ask(sessions.get(self.id), timeout)

    def close(self) -> None:
        """Ends the session and gives its leases back; its adapters stay. May be called twice.

        Where no server answers, nothing is raised: the leases run out by themselves after the session's ttl.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            with suppress(NotFoundError, UnavailableError, DeadlineExceededError, CancelledError):
                self._transport.run(sessions.close(self.id), _CLOSE_SECONDS)
        finally:  # not before: a client that is no longer there has vanished, unless it has closed its session
            self._keepalive.stop(_STOP_SECONDS)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_telling(self, call: Call[tuple[Result, str]], named: str, timeout: float | None) -> Result:
        """Runs a call whose answer tells the active adapter, after making `named` the active one unless it is ""."""
        mark = self._active.mark
        try:
            result, active = self._transport.run(call, timeout)
        except (UnavailableError, CancelledError):
            raise
        except OnebaseError:
            if named:  # it may be active now, or not
                with suppress(OnebaseError):
                    self.refresh(timeout=_REFRESH_SECONDS)
            raise
        self._active.hear(active, None if named else mark)
        return result

    def _ask(self, call: Call[t.SessionInfo], timeout: float | None) -> t.SessionInfo:
        mark = self._active.mark
        info = self._transport.run(call, timeout)
        self._active.hear(info.ppo_adapter_name, mark)
        return info

    def _beat(self) -> bool:
        try:
            self._ask(sessions.keep_alive(self.id), self._beat_seconds)
        except (NotFoundError, CancelledError):  # the session has ended, or the client was closed
            return False
        except OnebaseError:  # the next beat may get through; if none does, the session's next call says so
            return True
        return True
