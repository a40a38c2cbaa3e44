"""What a server takes up from its state directory when it starts: adapters, answers and sessions.

An adapter comes back under its name, with its newest checkpoint and its version. Where versions may have been made that
are lost, it gets a version that was never given. One whose checkpoint is damaged keeps its name, and every call that
names it is told DATA_LOSS and which checkpoint is whole; unless the registry itself was lost, and made again from the
checkpoints: then the newest that is whole is taken. Where an adapter goes back, to one that the settings want or to the
one that is whole, the newer checkpoints are forgotten only when the engine has the older one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from onebase.server.calls import settle
from onebase.server.checkpoints import offer
from onebase.server.config import ConfigError
from onebase.server.durability import Durable
from onebase.server.errors import DataLoss, Unavailable
from onebase.server.idempotency import Idempotency
from onebase.server.jobs import AdapterFacts, AdapterKind, Job, LoadAdapterJob
from onebase.server.leases import Sessions
from onebase.server.names import name_of
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, Registry, owner_of
from onebase.server.restores import KEY, Restores
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
        ConfigError: the state has an adapter of another kind under such a name, or not the version that is asked for,
            or that is damaged.
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
    restores = await _restores(durable, rows, anew)
    await durable.on_thread(store.drop_lost_leases)
    sessions = await durable.on_thread(store.sessions)
    leased = {key for session in sessions for key in session.leases}
    for row in rows:
        if row.name in anew:
            _check_kind(row, anew[row.name])
            await _give_way(durable, rooms, row)
        else:
            await _bring_back(durable, rooms, told, row, restores)
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


async def _restores(durable: Durable, rows: list[AdapterRow], anew: Collection[str]) -> Restores:
    """What the settings want restored and was not yet; all of it can be, as far as the store knows."""
    store, asked = durable.store, durable.config.restore
    noted = await durable.on_thread(lambda: store.meta(KEY))
    restores = Restores(asked, noted)
    if noted and noted != restores.noted:
        await durable.on_thread(lambda: store.set_meta(KEY, restores.noted))
    restores.tell()
    uids = {row.name: row.uid for row in rows}
    for name, version in restores.due.items():
        if name not in uids:
            raise ConfigError(f"restore is {name!r}: the state has no such adapter")
        if name in anew:
            raise ConfigError(f"restore is '{name}={version}': the settings read it anew at each start: leave one out")
        _named(name, await durable.on_thread(lambda name=name: store.checkpoints(uids[name])), version)  # type: ignore[misc]
    return restores


async def _give_way(durable: Durable, rooms: Rooms, row: AdapterRow) -> None:
    """Forgets an adapter whose name the settings give to another, which goes on after its versions."""
    checkpoints = await durable.on_thread(lambda: durable.store.checkpoints(row.uid))
    least = max(rooms.registry.least_version(row.name), row.reserved + 1, checkpoints[0].version + 1)
    rooms.registry.end(row.name, least)
    await durable.remove(row.name, least, None)


async def _bring_back(durable: Durable, rooms: Rooms, told: Told, row: AdapterRow, restores: Restores) -> None:
    checkpoints = await durable.on_thread(lambda: durable.store.checkpoints(row.uid))
    began = time.monotonic()
    if row.name in restores.due:
        entry = await _restore_one(durable, rooms, row, checkpoints, restores)
    else:
        found = await _newest(durable, rooms, row, checkpoints)
        if isinstance(found, DataLoss):
            rooms.registry.damage(row.name, found)
            rooms.registry.end(row.name, max(row.reserved, checkpoints[0].version) + 1)
            told.damaged(row.name, found)
            return
        entry = found
    rooms.registry.restore(entry)
    told.restored(entry, time.monotonic() - began)


async def _newest(
    durable: Durable, rooms: Rooms, row: AdapterRow, checkpoints: list[CheckpointRow]
) -> Entry | DataLoss:
    """An adapter from its newest checkpoint; or why that cannot be had, for as long as this server runs."""
    newest, older = checkpoints[0], checkpoints[1:]
    try:
        entry = await _load(durable, rooms, row, newest, row.reserved)
    except DataLoss as error:
        whole = await durable.on_storage(lambda: durable.directory.whole(older))
        if not durable.adopted or whole is None:
            return offer(row.name, error, whole)
        log.warning("adapter %s: %s; it goes on from version %d", row.name, error, whole.version)
        return await _go_back(durable, rooms, row, checkpoints, whole, {})
    durable.track(entry, newest.version, row.reserved)  # a version that is new here is in no checkpoint yet
    return entry


async def _restore_one(
    durable: Durable, rooms: Rooms, row: AdapterRow, checkpoints: list[CheckpointRow], restores: Restores
) -> Entry:
    """An adapter from the checkpoint that the settings want.

    Raises:
        ConfigError: it is damaged; nothing has changed.
    """
    chosen = _named(row.name, checkpoints, restores.due[row.name])
    try:
        return await _go_back(durable, rooms, row, checkpoints, chosen, {KEY: restores.done(row.name)})
    except DataLoss as error:
        others = [one for one in checkpoints if one is not chosen]
        whole = await durable.on_storage(lambda: durable.directory.whole(others))
        raise _cannot(row.name, chosen, error, whole, checkpoints[0]) from error


async def _go_back(
    durable: Durable,
    rooms: Rooms,
    row: AdapterRow,
    checkpoints: list[CheckpointRow],
    chosen: CheckpointRow,
    meta: Mapping[str, str],
) -> Entry:
    """An adapter from one of its checkpoints; the newer ones are forgotten as soon as the engine has it.

    Raises:
        OnebaseError: as `_load`; then nothing has changed.
    """
    newer = [one.folder for one in checkpoints[: checkpoints.index(chosen)]]
    reserved = max(row.reserved, checkpoints[0].version if newer else 0)
    entry = await _load(durable, rooms, row, chosen, reserved)
    await durable.on_thread(lambda: durable.store.go_back(row.uid, reserved, newer, meta))
    durable.track(entry, chosen.version, reserved)
    await durable.on_storage(lambda: durable.directory.remove(newer))
    return entry


async def _load(durable: Durable, rooms: Rooms, row: AdapterRow, checkpoint: CheckpointRow, reserved: int) -> Entry:
    """Has the engine read a checkpoint, if it is whole.

    Raises:
        DataLoss: it is not.
        OnebaseError: it cannot be read now, or not by this engine.
    """
    kind = AdapterKind(row.kind)
    try:
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
    except Unavailable as error:
        raise Unavailable(error.reason, f"adapter {row.name!r}: {error}", retry_after=error.retry_after) from error
    return Entry(name_of(row.name), facts, row.create_time, row.source, owner_of(row.name))


def _cannot(
    name: str, chosen: CheckpointRow, error: DataLoss, whole: CheckpointRow | None, newest: CheckpointRow
) -> ConfigError:
    """Why a checkpoint is not gone back to, and which one may be."""
    if whole is None:
        way_out = "no other one is whole: leave it out, and delete or replace the adapter"
    elif whole is newest:
        way_out = f"version {whole.version}, the newest, is whole: leave it out to go on there"
    else:
        way_out = f"version {whole.version} is whole: give {name}={whole.version} to go on there"
    return ConfigError(f"restore is '{name}={chosen.version}': {error}; nothing was changed; {way_out}")


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
