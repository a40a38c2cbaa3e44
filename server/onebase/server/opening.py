"""Opening a state: whose it is, where its checkpoints lie, and what is left of one whose registry was lost.

A URL of checkpoints belongs to one state: `owner.json` there has its id, which is in the registry too. A server of
another state is refused, unless it is told to adopt what lies there: then a registry without adapters is made again
from what lies beside the checkpoints, and the URL is its own from then on.

Everything here may wait for a disk or a network: it runs before the server serves.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from onebase.server.checkpoints import StateDirectory
from onebase.server.config import ConfigError, StateConfig
from onebase.server.durability import Durable
from onebase.server.errors import OnebaseError
from onebase.server.jobs import AdapterKind, BaseFacts
from onebase.server.names import name_of, problem
from onebase.server.ports import WorkerLike
from onebase.server.storage import Bucket
from onebase.server.store import AdapterRow, CheckpointRow, Store, WrongStateError

log = logging.getLogger(__name__)


def open_durable(worker: WorkerLike, directory: StateDirectory, config: StateConfig) -> Durable:
    """Opens the store of a directory that this process has locked, for the base that the worker has.

    Raises:
        ConfigError: the state belongs to another base, or to another version of onebase; its checkpoints lie elsewhere,
            or what lies there is another state's; the storage cannot be reached.
    """
    try:
        store = Store(directory.store_path)
    except WrongStateError as error:
        raise ConfigError(f"state is {str(config.path)!r}: {error}") from error
    try:
        _check_base(store, worker.facts, config)
        adopted = _take_place(store, directory, worker.facts, config)
    except BaseException as error:
        store.close()
        if isinstance(error, OnebaseError):  # the storage's own
            raise ConfigError(f"checkpoints is {directory.storage.url!r}: {error}") from error
        raise
    return Durable(worker, directory, store, config, adopted=adopted)


def _check_base(store: Store, facts: BaseFacts, config: StateConfig) -> None:
    theirs = store.meta("base")
    if theirs and theirs != facts.fingerprint:
        raise ConfigError(
            f"state is {str(config.path)!r}: it belongs to the base {store.meta('model')!r} ({theirs[:12]}), and this "
            f"server has {facts.model!r} ({facts.fingerprint[:12]}): serve that base, or give another directory"
        )
    if not theirs:
        store.set_meta("model", facts.model)
        store.set_meta("base", facts.fingerprint)


def _take_place(store: Store, directory: StateDirectory, facts: BaseFacts, config: StateConfig) -> bool:
    """Sees to it that the checkpoints lie where the state's are; whether another state's were adopted."""
    storage, adopted = directory.storage, False
    mine = store.meta("id")
    if not mine:
        mine = uuid.uuid4().hex
        store.set_meta("id", mine)
    owner = storage.owner() if isinstance(storage, Bucket) else None
    whose = str((owner or {}).get("state", ""))
    there, here = store.meta("checkpoints"), storage.url
    if there != here and store.checkpoints() and whose != mine:
        way_out = f"give --checkpoints {there}" if there else "leave --checkpoints out"
        raise ConfigError(
            f"checkpoints is {here!r}: those of the state {str(config.path)!r} lie "
            f"{f'at {there}' if there else 'in the directory itself'}: {way_out}, or copy all of that here first"
        )
    if isinstance(storage, Bucket) and whose != mine:
        names, whose = storage.names(), whose or "unknown"
        if whose != store.meta("adopted") and (owner is not None or names):  # or else that was interrupted
            _check_may_adopt(store, storage, owner or {}, facts, config)
            _adopt(store, storage, names, whose)
            adopted = True
        storage.claim({"state": mine, "model": facts.model, "base": facts.fingerprint})
        if (storage.owner() or {}).get("state") != mine:
            raise ConfigError(f"checkpoints is {here!r}: another server took it at the same time: start again")
    store.set_meta("checkpoints", here)
    store.set_meta("adopted", "")
    return adopted


def _check_may_adopt(
    store: Store, storage: Bucket, owner: Mapping[str, Any], facts: BaseFacts, config: StateConfig
) -> None:
    whose = f"the state {str(owner['state'])[:12]!r}" if owner.get("state") else "a state that it does not name"
    if not config.adopt:
        raise ConfigError(
            f"checkpoints is {storage.url!r}: what lies there belongs to {whose}, and {str(config.path)!r} is another: "
            "give that one's directory as --state, or a URL of its own to this one; or, where that directory is lost "
            "and no server uses it any more, --adopt to take its adapters over"
        )
    if store.adapters():
        raise ConfigError(
            f"checkpoints is {storage.url!r}: it belongs to {whose}, and {str(config.path)!r} has adapters of its own "
            "already: give an empty directory as --state to adopt what lies there"
        )
    if store.meta("checkpoints") == storage.url:
        raise ConfigError(
            f"checkpoints is {storage.url!r}: it belongs to {whose} now, and did to {str(config.path)!r} before: it is "
            "not taken back; give an empty directory as --state to adopt what lies there"
        )
    theirs = owner.get("base", facts.fingerprint)
    if theirs != facts.fingerprint:
        raise ConfigError(
            f"checkpoints is {storage.url!r}: it belongs to the base {owner.get('model')!r} ({str(theirs)[:12]}), and "
            f"this server has {facts.model!r} ({facts.fingerprint[:12]}): serve that base"
        )


def _adopt(store: Store, storage: Bucket, names: list[str], whose: str) -> None:
    """Makes the registry again: of each name the adapter that was made last, with its checkpoints."""
    found: list[tuple[float, AdapterRow, CheckpointRow]] = []
    for name in names:
        one = _read(storage.about(name), name)
        if one is None:
            log.warning("%s/%s is not whole, and is swept", storage.url, name)
        else:
            found.append(one)
    adapters: dict[str, AdapterRow] = {}
    checkpoints: dict[tuple[int, int], CheckpointRow] = {}
    for _, adapter, checkpoint in sorted(found, key=lambda one: (one[1].uid, one[2].version, one[0])):
        adapters[adapter.name] = adapter
        checkpoints[adapter.uid, checkpoint.version] = checkpoint
    taken = {adapter.uid for adapter in adapters.values()}
    rows = [checkpoint for (uid, _), checkpoint in checkpoints.items() if uid in taken]
    last_uid = max((int(name.partition("-")[0]) for name in names), default=0)
    meta = {"last_uid": str(last_uid), "checkpoints": storage.url, "adopted": whose}
    store.adopt(list(adapters.values()), rows, meta)
    log.warning("%d adapters at %s are adopted from the state %r", len(adapters), storage.url, whose[:12])


def _read(about: Mapping[str, Any] | None, name: str) -> tuple[float, AdapterRow, CheckpointRow] | None:
    """What lies beside a checkpoint, and when it was written, if it is what a server writes there."""
    try:
        written = float((about or {})["written"])
        adapter, checkpoint = AdapterRow(**(about or {})["adapter"]), CheckpointRow(**(about or {})["checkpoint"])
        AdapterKind(adapter.kind)
        _check_types(
            (adapter.name, str),
            (adapter.uid, int),
            (adapter.create_time, float),
            (adapter.source, str),
            (adapter.reserved, int),
            (checkpoint.version, int),
            (checkpoint.digest, str),
        )
    except (KeyError, TypeError, ValueError):
        return None
    fits = checkpoint.folder == name and name.startswith(f"{adapter.uid:06d}-") and checkpoint.uid == adapter.uid
    return (written, adapter, checkpoint) if fits and problem(name_of(adapter.name)) is None else None


def _check_types(*wanted: tuple[object, type]) -> None:
    for value, kind in wanted:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is no {kind.__name__}")
