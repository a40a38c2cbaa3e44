"""The last look: what each tenant has when everything is over, as one more client writes it down."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import grpc
from history.calls import Stubs, facts_of, keep_blob, refusal, request_of, send
from history.journal import LAST_LOOK, MAKING, OK, Op, Writer, gather


def audit(folder: Path, address: str, tokens: Mapping[str, str], epoch: int) -> None:
    """Lists and downloads all adapters of each tenant, into the journal of a client of its own.

    Asked for are also the names that somebody ever made an adapter of: a list that leaves one out, or that has lost
    everything, hides nothing.

    Args:
        folder: of the run.
        address: of the server.
        tokens: by tenant.
        epoch: which life of the server answers.
    """
    ops = gather(folder).ops
    for number, (tenant, token) in enumerate(tokens.items(), LAST_LOOK):
        stubs, writer = Stubs(address, token), Writer(folder / f"client-{number}.jsonl")
        names = _ask(folder, stubs, writer, Op(f"{number}.0", "list", number, tenant, "", "", {}), epoch)
        made = {op.name for op in ops if op.tenant == tenant and op.kind in MAKING}
        for count, name in enumerate(sorted({*names, *made}), 1):
            _ask(
                folder,
                stubs,
                writer,
                Op(f"{number}.{count}", "download", number, tenant, "", "", {"name": name}),
                epoch,
            )
        stubs.channel.close()


def _ask(folder: Path, stubs: Stubs, writer: Writer, op: Op, epoch: int) -> list[str]:
    writer.begin(op, epoch, time.monotonic())
    try:
        messages = send(stubs, op.kind, request_of(op.kind, op.args), 60.0)
    except grpc.RpcError as error:
        writer.end(op, time.monotonic(), *refusal(error))
        return []
    now = time.monotonic()
    facts = {"blob": keep_blob(folder / "blobs", messages)} if op.kind == "download" else {}
    kept = {**facts_of(op.kind, messages), **facts}
    writer.end(op, now, OK, "", kept)
    return [name for name, _, _ in kept.get("adapters", ()) if name != "reward"]
