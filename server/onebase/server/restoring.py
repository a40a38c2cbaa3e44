"""What a server takes up from its state directory when it starts: adapters, answers and sessions.

An adapter comes back under its name, with its newest checkpoint and its version. Where versions may have been made that
are lost, it gets a version that was never given. One whose checkpoint is damaged keeps its name, and every call that
names it is told DATA_LOSS and which checkpoint is whole; unless the registry itself was lost, and made again from the
checkpoints: then the newest that is whole is taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from onebase.server.calls import settle
from onebase.server.checkpoints import offer
from onebase.server.config import ConfigError
from onebase.server.durability import Durable
from onebase.server.errors import DataLoss
from onebase.server.idempotency import Idempotency
from onebase.server.jobs import AdapterFacts, AdapterKind, Job, LoadAdapterJob
from onebase.server.leases import Sessions
from onebase.server.names import name_of
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, Registry, owner_of
from onebase.server.store import AdapterRow, CheckpointRow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rooms:
    """What is filled."""

    worker: WorkerLike
    registry: Registry
    sessions: Sessions
    idempotency: Idempotency


@dataclass(frozen=True)
class Told:
    """Whom to tell of what comes back."""

    restored: Callable[[Entry, float], None]
    damaged: Callable[[str, DataLoss], None]


async def restore(durable: Durable, rooms: Rooms, told: Told, *, frozen: Collection[tuple[str, AdapterKind]]) -> None:
    """Takes up what the state directory holds.

    Args:
        durable: the state directory.
        rooms: what is filled.
        told: is told of each adapter.
        frozen: names and kinds of the adapters that the server's settings read anew: the state's give way to them.

    Raises:
        ConfigError: the state has an adapter of another kind under such a name, or not the version that is asked for.
        OnebaseError: an adapter cannot be loaded.
    """
    store, directory = durable.store, durable.directory
    known = await durable.on_thread(lambda: [row.folder for row in store.checkpoints()])
    await durable.on_storage(lambda: directory.sweep(known))
    rooms.registry.start_after(await durable.on_thread(lambda: store.last_uid))
    for end in await durable.on_thread(store.ends):
        rooms.registry.end(end.name, end.least_version)
    anew = dict(frozen)
    rows = await durable.on_thread(store.adapters)
    chosen = dict(durable.config.restore)
    sessions = await durable.on_thread(store.sessions)
    leased = {key for session in sessions for key in session.leases}
    if unknown := sorted(set(chosen) - {row.name for row in rows}):
        raise ConfigError(f"restore is {unknown[0]!r}: the state has no such adapter")
    for row in rows:
        if row.name in anew:
            _check_kind(row, anew[row.name])
            await durable.remove(row.name, rooms.registry.least_version(row.name), None)
        else:
            await _bring_back(durable, rooms, told, row, chosen.get(row.name))
            if row.name not in leased and durable.is_durable(row.uid):  # or more than the device holds may come back
                await durable.residency.rest(row.uid)
    for response in await durable.on_thread(store.responses):
        rooms.idempotency.restore(response)
    rooms.sessions.restore(sessions)


def check_trained(entry: Entry | None, name: str, kind: AdapterKind) -> None:
    """Sees to it that what the state has under a name is what the settings make there.

    Raises:
        ConfigError: it is of another kind.
    """
    if entry is not None and entry.kind is not kind:
        raise _wrong_kind(name, entry.kind.value, kind)


async def _bring_back(durable: Durable, rooms: Rooms, told: Told, row: AdapterRow, version: int | None) -> None:
    checkpoints = await durable.on_thread(lambda: durable.store.checkpoints(row.uid))
    reserved = row.reserved
    checkpoint = checkpoints[0] if version is None else _named(row.name, checkpoints, version)
    if version is not None:
        reserved = await _go_back(durable, row, checkpoints, checkpoint)
    older = [one for one in checkpoints if one is not checkpoint]
    try:
        await _load(durable, rooms, told, row, checkpoint, reserved)
    except DataLoss as error:
        whole = await durable.on_storage(lambda: durable.directory.whole(older))
        if durable.adopted and whole is not None:
            log.warning("adapter %s: %s; it goes on from version %d", row.name, error, whole.version)
            reserved = await _go_back(durable, row, checkpoints, whole)
            await _load(durable, rooms, told, row, whole, reserved)
            return
        damage = offer(row.name, error, whole)
        rooms.registry.damage(row.name, damage)
        rooms.registry.end(row.name, max(reserved, checkpoints[0].version) + 1)
        told.damaged(row.name, damage)


async def _load(
    durable: Durable, rooms: Rooms, told: Told, row: AdapterRow, checkpoint: CheckpointRow, reserved: int
) -> None:
    """Has the engine read a checkpoint, if it is whole.

    Raises:
        DataLoss: it is not.
        OnebaseError: it cannot be read now, or not by this engine.
    """
    began, kind = time.monotonic(), AdapterKind(row.kind)
    async with durable.verified(checkpoint) as path:
        job: Job[AdapterFacts] = LoadAdapterJob(
            uid=row.uid,
            name=row.name,
            kind=kind,
            path=path,
            with_optimizer=kind.trained,
            least_version=reserved + 1 if reserved > checkpoint.version else 0,
        )
        facts = await settle(rooms.worker, job)
    entry = Entry(name_of(row.name), facts, row.create_time, row.source, owner_of(row.name))
    rooms.registry.restore(entry)
    durable.track(entry, checkpoint.version, reserved)  # a version that is new here is in no checkpoint yet
    told.restored(entry, time.monotonic() - began)


async def _go_back(durable: Durable, row: AdapterRow, checkpoints: list[CheckpointRow], chosen: CheckpointRow) -> int:
    """Forgets the checkpoints that are newer than the chosen one; returns the highest version ever given."""
    reserved = max(row.reserved, checkpoints[0].version if checkpoints[0] is not chosen else 0)
    await durable.on_thread(lambda: durable.store.reserve(row.uid, reserved))
    for newer in checkpoints[: checkpoints.index(chosen)]:
        await durable.on_thread(lambda folder=newer.folder: durable.store.forget(folder))  # type: ignore[misc]
        await durable.on_storage(lambda folder=newer.folder: durable.directory.remove([folder]))  # type: ignore[misc]
    return reserved


def _named(name: str, checkpoints: list[CheckpointRow], version: int) -> CheckpointRow:
    for one in checkpoints:
        if one.version == version:
            return one
    there = ", ".join(str(one.version) for one in checkpoints)
    raise ConfigError(f"restore is '{name}={version}': the state has checkpoints of version {there} of it")


def _check_kind(row: AdapterRow, kind: AdapterKind) -> None:
    if row.kind != kind.value:
        raise _wrong_kind(row.name, row.kind, kind)


def _wrong_kind(name: str, there: str, kind: AdapterKind) -> ConfigError:
    return ConfigError(
        f"adapter is {name!r}: the state has a {there} adapter of this name, and a {kind.value} adapter cannot take "
        "its place: use another name"
    )
