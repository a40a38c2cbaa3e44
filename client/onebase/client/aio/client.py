# Made from client.py by tools/make_aio.py: change that, then `make aio`.
"""The client: what anybody may ask a server, and the way to a session."""

from __future__ import annotations

import os
import time
import weakref
from types import TracebackType

from onebase.client import types as t
from onebase.client.aio.calls import Calls
from onebase.client.aio.opening import opens
from onebase.client.aio.session import AsyncSession
from onebase.client.aio.transport import AsyncStream, Transport
from onebase.client.channel import PathLike, Security
from onebase.client.codec import inference, server, sessions
from onebase.client.codec.inference import Prompts, Rewards, Sequences
from onebase.client.errors import AbortedError, DeadlineExceededError, UnavailableError
from onebase.client.transport import new_request_id
from onebase.client.waits import OnWait

_SAMPLING = t.SamplingParams()
_LEAST_WAIT_SECONDS = 1.0
_LEASE_SECONDS = 5.0  # the server tells when a lease runs out at the latest; it may be given back long before


@opens
async def connect(
    target: str = "127.0.0.1:7070",
    *,
    token: str = "",
    tls: bool | PathLike | None = None,
    tls_certificate: tuple[PathLike, PathLike] | None = None,
    wait: float = 30.0,
    timeout: float = 600.0,
    on_wait: OnWait | None = None,
) -> AsyncClient:
    """Connects to a server.

    Args:
        target: host and port.
        token: shows the server who asks; empty where the server does not want to know.
        tls: True for TLS with the system's certificates, or the path of a CA's (PEM). Without it the token is refused
            for another machine than this, unless `tls` is False.
        tls_certificate: the client's own certificates and their private key (PEM), for servers that ask for them.
        wait: seconds to wait for the server to come up; at least one second is waited.
        timeout: seconds that each later call may take, retries included, unless it says otherwise.
        on_wait: is told once when calls begin to wait, for a server that is away or that asks to come again, and once
            when they are answered; what is over within a second is not told. None tells Python's logging.

    Raises:
        UnavailableError: no server answered for so long.
        UnauthenticatedError: the server wants a token, or another one.
        ValueError: there is no port in `target`; a file cannot be read; a token would go out in plain text.
    """
    security = Security(token, tls, tls_certificate)
    transport = Transport(target, timeout=timeout, security=security, on_wait=on_wait)
    try:
        await transport.run(server.info(), max(wait, _LEAST_WAIT_SECONDS))
    except (UnavailableError, DeadlineExceededError) as error:
        await transport.close()
        if trouble := security.trouble(str(error)):
            raise UnavailableError(f"{target} cannot be talked to: {trouble}", method=error.method) from None
        raise UnavailableError(
            f"no onebase server answers at {target} ({error}); start one with `onebase serve MODEL`, "
            "or give the address of one that runs",
            reason=error.reason,
            method=error.method,
        ) from None
    except BaseException:
        await transport.close()
        raise
    return AsyncClient(transport)


class AsyncClient(Calls):
    """A connection to a server; `connect` makes one. Closes itself and its sessions at the end of an `async with` block.

    Any number of tasks may use a client. Every method raises an `OnebaseError`; `timeout` is in seconds, None takes
    the client's. Where a list of sequences or prompts is wanted, a single one will do; the answer is still a list.
    """

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport, session_id="")
        self._sessions: weakref.WeakSet[AsyncSession] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._transport.target}>"

    async def info(self, *, timeout: float | None = None) -> t.ServerInfo:
        """The base model, the limits, the reward adapters."""
        return await self._transport.run(server.info(), timeout)

    async def status(self, *, timeout: float | None = None) -> t.ServerStatus:
        """What the server is doing now: sessions, adapters, memory, queues, tokens per second."""
        return await self._transport.run(server.status(), timeout)

    # ------------------------------------------------------------------------------------------------- reading

    async def generate(
        self,
        prompts: Prompts,
        *,
        adapter: str,
        sampling: t.SamplingParams = _SAMPLING,
        logprobs: bool = False,
        values: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Completion]:
        """Samples completions: prompt by prompt, and each prompt's n in order.

        Args:
            prompts: one or several, each a text or token ids.
            adapter: the policy that writes; "base" is the base with no adapter.
            sampling: how to draw.
            logprobs: also give each token's logprob, [t], at temperature 1 and before any filter.
            values: also give the value head's estimate before each token, [t].
            adapter_version: the version that must answer; `AbortedError` if it is not the newest.
            timeout: seconds.
        """
        call = self._generate(prompts, adapter, sampling, logprobs, values, adapter_version, stream_tokens=False)
        return inference.join_chunks(await self._transport.collect(call, timeout))

    def stream(
        self,
        prompts: Prompts,
        *,
        adapter: str,
        sampling: t.SamplingParams = _SAMPLING,
        logprobs: bool = False,
        values: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> AsyncStream[t.CompletionChunk]:
        """Samples completions as `generate` does, and gives their tokens as they are drawn.

        Chunks of different completions interleave. Closing the iterator, or leaving its `async with` block, stops the work.
        """
        call = self._generate(prompts, adapter, sampling, logprobs, values, adapter_version, stream_tokens=True)
        return self._transport.stream(call, timeout)

    async def logprob(
        self,
        sequences: Sequences,
        *,
        adapter: str,
        entropy: bool = False,
        values: bool = False,
        logits: bool = False,
        adapter_version: int | None = None,
        timeout: float | None = None,
    ) -> list[t.Logprobs]:
        """Logprobs of each completion's tokens, [t] each, at temperature 1.

        Args:
            sequences: one sequence or several.
            adapter: the adapter to ask; "base" is the base with no adapter.
            entropy: also give the entropy before each token, [t], in nats.
            values: also give the value head's estimate before each token, [t].
            logits: also give the logits before each token, [t, vocabulary]; all of them must fit in one message
                (`ServerLimits.max_message_bytes`).
            adapter_version: the version that must answer; `AbortedError` if it is not the newest.
            timeout: seconds.
        """
        call = inference.logprob(
            sequences, adapter=adapter, entropy=entropy, values=values, logits=logits, adapter_version=adapter_version
        )
        return await self._transport.run(call, timeout)

    async def reward(
        self,
        sequences: Sequences,
        rewards: Rewards = None,
        *,
        append_eos: bool | None = None,
        pooling: t.Pooling | None = None,
        per_token: bool = False,
        timeout: float | None = None,
    ) -> list[t.Reward]:
        """Scores of each sequence, and their weighted sum.

        Args:
            sequences: one sequence or several; the prompt may be empty.
            rewards: reward adapters, with weights if it is a mapping or holds a `RewardTerm`; "name[2]" is label 2 of a
                head with several. None asks the server's only one.
            append_eos: end each sequence with the end-of-sequence token; None does as each adapter declares, and where
                one declares nothing, does it for texts, not for token ids.
            pooling: where scores are read; None is as each adapter declares.
            per_token: also give the score at every token of prompt and completion.
            timeout: seconds.
        """
        call = inference.reward(sequences, rewards, append_eos=append_eos, pooling=pooling, per_token=per_token)
        return (await self._transport.run(call, timeout))[0]

    # ------------------------------------------------------------------------------------------------ adapters

    async def save_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        with_optimizer: bool = False,
        overwrite: bool = False,
        merged: bool = False,
        timeout: float | None = None,
    ) -> t.SavedAdapter:
        """Writes an adapter as a PEFT directory, or merged into the base, on the server.

        Args:
            name: the adapter.
            path: a directory on the server, absolute or relative to the server's first root.
            with_optimizer: also write the AdamW moments and the client state, so that training can go on from there.
            overwrite: replace what is there; otherwise `AlreadyExistsError`.
            merged: write the base with the adapter merged into it, as a transformers model with its tokenizer, in the
                base's dtype; a value head is not part of it. `FailedPreconditionError` for a quantized base.
            timeout: seconds.
        """
        return await self._save(name, path, with_optimizer, overwrite, merged, timeout)

    # ------------------------------------------------------------------------------------------------ sessions

    @opens
    async def open_session(
        self,
        ppo_adapter_name: str = "",
        *,
        label: str = "",
        ttl: float = 60.0,
        resume: str = "",
        wait: float = 0.0,
        timeout: float | None = None,
    ) -> AsyncSession:
        """Begins a session and takes the lease of its active adapter.

        Args:
            ppo_adapter_name: the active adapter; may be "" and set later.
            label: a name for people, shown in the status.
            ttl: seconds that the session outlives a client that vanishes, 1 to 3600.
            resume: the id of a session to go on with, if it still lives.
            wait: seconds to wait for the lease if another session holds it; `AbortedError` after that.
            timeout: seconds for each attempt.
        """
        call = sessions.open_session(ppo_adapter_name, label=label, ttl=ttl, resume=resume, request_id=new_request_id())
        deadline = time.monotonic() + wait
        while True:
            try:
                info = await self._transport.run(call, timeout)
                break
            except AbortedError as error:
                remaining = deadline - time.monotonic()
                if error.retry_after is None or remaining <= 0:
                    raise
                await self._transport.sleep(min(error.retry_after, remaining, _LEASE_SECONDS))
        session = AsyncSession(self._transport, info)
        self._sessions.add(session)
        return session

    async def close(self) -> None:
        """Closes the sessions, cancels what is under way, and hangs up. May be called twice."""
        open_sessions = list(self._sessions)
        self._sessions.clear()
        for session in open_sessions:
            await session.close()
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
