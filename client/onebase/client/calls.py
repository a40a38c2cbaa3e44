"""What a client and a session have in common: the calls that differ only in whether they name a session."""

from __future__ import annotations

import os

from onebase.client import files
from onebase.client import types as t
from onebase.client.codec import adapters, inference
from onebase.client.codec.inference import Prompts, Sequences
from onebase.client.codec.rpc import Call
from onebase.client.transport import Transport, new_request_id


class Calls:
    """Calls over a transport, in the name of a session or, if its id is "", of nobody."""

    def __init__(self, transport: Transport, session_id: str) -> None:
        self._transport = transport
        self._session_id = session_id

    def reference_logprob(
        self, sequences: Sequences, *, reference: str = t.BASE, timeout: float | None = None
    ) -> list[t.Logprobs]:
        """Logprobs of each completion's tokens, [t] each, under the bare base or under a named frozen adapter."""
        call = inference.reference_logprob(sequences, reference=reference, session_id=self._session_id)
        return self._transport.run(call, timeout)

    def adapters(self, kind: t.AdapterKind | None = None, *, timeout: float | None = None) -> list[t.Adapter]:
        """All adapters by name, or those of a kind."""
        return self._transport.run(adapters.list_adapters(kind), timeout)

    def adapter(self, name: str, *, timeout: float | None = None) -> t.Adapter:
        """An adapter's facts."""
        return self._transport.run(adapters.get(name), timeout)

    def create_adapter(
        self,
        name: str,
        lora: t.LoraSpec | None = None,
        *,
        kind: t.AdapterKind = "policy",
        value_head: bool = True,
        init_from: str = "",
        seed: int = 0,
        timeout: float | None = None,
    ) -> t.Adapter:
        """Makes a policy or a critic. A session gets its lease; it does not become active.

        Args:
            name: its name on the server.
            lora: its shape; None is `LoraSpec()`, or that of `init_from`.
            kind: "policy" or "critic".
            value_head: give it one: that of `init_from` if it has one, or a fresh one. A critic always has one.
            init_from: an adapter that it begins as a copy of; without one it begins as the base. A critic takes over a
                reward adapter's score head as its value head.
            seed: of its random beginning.
            timeout: seconds.
        """
        call = adapters.create(
            name,
            lora,
            kind=kind,
            value_head=value_head,
            init_from=init_from,
            seed=seed,
            request_id=new_request_id(),
            session_id=self._session_id,
        )
        return self._transport.run(call, timeout)

    def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        kind: t.AdapterKind = "policy",
        value_head: bool = False,
        replace: bool = False,
        with_optimizer: bool = False,
        seed: int = 0,
        append_eos: bool | None = None,
        pooling: t.Pooling | None = None,
        timeout: float | None = None,
    ) -> t.Adapter:
        """Reads an adapter from a PEFT directory. A session gets a policy's or critic's lease; it is not made active.

        Args:
            name: its name on the server.
            path: a directory on the server, absolute or relative to the server's first root.
            kind: what it is for.
            value_head: give a policy or critic that has none a fresh value head.
            replace: put it in the place of an adapter of that name, whose version goes on growing.
            with_optimizer: also read the AdamW moments and the client state saved with it.
            seed: of a fresh value head.
            append_eos: whether an end-of-sequence token belongs behind what a reward reads; None is what its manifest
                says.
            pooling: where a reward's score is read; None is what its manifest says, or else the last token.
            timeout: seconds.
        """
        call = adapters.load(
            name,
            os.fspath(path),
            kind=kind,
            value_head=value_head,
            replace=replace,
            with_optimizer=with_optimizer,
            seed=seed,
            append_eos=append_eos,
            pooling=pooling,
            request_id=new_request_id(),
            session_id=self._session_id,
        )
        return self._transport.run(call, timeout)

    def upload_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        kind: t.AdapterKind = "policy",
        value_head: bool = False,
        replace: bool = False,
        with_optimizer: bool = False,
        seed: int = 0,
        append_eos: bool | None = None,
        pooling: t.Pooling | None = None,
        timeout: float | None = None,
    ) -> t.Adapter:
        """Sends an adapter to the server: a PEFT directory of this machine, such as `save_pretrained` writes.

        A session gets a policy's or critic's lease; it is not made active. A trainer that trains elsewhere calls this
        after each of its steps with `replace`: completions under way go on with the version that they read.

        Args:
            name: its name on the server.
            path: a directory on this machine.
            kind: what it is for.
            value_head: give a policy or critic that has none a fresh value head.
            replace: put it in the place of an adapter of that name, whose version goes on growing.
            with_optimizer: also send the AdamW moments and the client state saved with it.
            seed: of a fresh value head.
            append_eos: whether an end-of-sequence token belongs behind what a reward reads; None is what its manifest
                says.
            pooling: where a reward's score is read; None is what its manifest says, or else the last token.
            timeout: seconds.
        """
        call = adapters.upload(
            name,
            files.outgoing(path, with_optimizer=with_optimizer),
            kind=kind,
            value_head=value_head,
            replace=replace,
            with_optimizer=with_optimizer,
            seed=seed,
            append_eos=append_eos,
            pooling=pooling,
            request_id=new_request_id(),
            session_id=self._session_id,
        )
        return self._transport.run(call, timeout)

    def download_adapter(
        self,
        name: str,
        path: str | os.PathLike[str],
        *,
        with_optimizer: bool = False,
        overwrite: bool = False,
        timeout: float | None = None,
    ) -> t.SavedAdapter:
        """Writes an adapter as a PEFT directory on this machine, whole and checked by its hashes, or not at all.

        Args:
            name: the adapter.
            path: a directory on this machine.
            with_optimizer: also write the AdamW moments, and the client state where the adapter is yours.
            overwrite: replace the adapter that is there; otherwise `AlreadyExistsError`.
            timeout: seconds.
        """
        call = adapters.download(name, with_optimizer=with_optimizer, session_id=self._session_id)
        with files.Incoming(path, overwrite=overwrite) as incoming:
            with self._transport.stream(call, timeout) as parts:
                for part in parts:
                    incoming.take(part)
            return incoming.finish()

    def delete_adapter(self, name: str, *, timeout: float | None = None) -> None:
        """Forgets an adapter and frees its memory. What is leased, only the session that holds the lease may delete."""
        call = adapters.delete(name, request_id=new_request_id(), session_id=self._session_id)
        self._transport.run(call, timeout)

    def checkpoint_adapter(
        self, name: str = "", *, client_state: bytes | None = None, timeout: float | None = None
    ) -> t.AdapterVersion:
        """Makes an adapter's newest version durable now, and tells which one that is.

        Args:
            name: a policy or a critic; "" is the session's active one.
            client_state: replaces what is kept with it, see `Session.optim_step`; None keeps that. Where a session
                holds the adapter's lease, only that session may.
            timeout: seconds.

        Raises:
            FailedPreconditionError: NOT_DURABLE: nothing outlives this server.
        """
        call = adapters.checkpoint(
            name, client_state=client_state, request_id=new_request_id(), session_id=self._session_id
        )
        return self._transport.run(call, timeout)

    def client_state(self, name: str, *, timeout: float | None = None) -> t.ClientState:
        """What a trainer has left with an adapter of its own; empty where it has left nothing."""
        return self._transport.run(adapters.client_state(name), timeout)

    def _generate(
        self,
        prompts: Prompts,
        adapter: str,
        sampling: t.SamplingParams,
        logprobs: bool,
        values: bool,
        adapter_version: int | None,
        *,
        stream_tokens: bool,
    ) -> Call[t.CompletionChunk]:
        return inference.generate(
            prompts,
            adapter=adapter,
            sampling=sampling,
            logprobs=logprobs,
            values=values,
            adapter_version=adapter_version,
            stream_tokens=stream_tokens,
            session_id=self._session_id,
        )

    def _save(
        self,
        name: str,
        path: str | os.PathLike[str],
        with_optimizer: bool,
        overwrite: bool,
        merged: bool,
        timeout: float | None,
    ) -> t.SavedAdapter:
        call = adapters.save(
            name,
            os.fspath(path),
            with_optimizer=with_optimizer,
            overwrite=overwrite,
            merged=merged,
            request_id=new_request_id(),
            session_id=self._session_id,
        )
        return self._transport.run(call, timeout)
