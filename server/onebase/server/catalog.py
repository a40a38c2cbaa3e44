"""Making, loading, saving and deleting adapters: the registry and the engine kept in step.

A name is reserved before the engine begins and bound when it has the adapter, so no two calls make the same name
and a failed one leaves nothing. Of a replaced or deleted adapter the name is gone at once, and its memory is freed by
a job that nobody's cancel can stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onebase.server.calls import perform, settle, settled, submit
from onebase.server.errors import Aborted, FailedPrecondition, OnebaseError
from onebase.server.fences import Fences
from onebase.server.identity import caller
from onebase.server.jobs import (
    AdapterFacts,
    AdapterKind,
    CreateAdapterJob,
    DeleteAdapterJob,
    DescribeAdaptersJob,
    DropGradientsJob,
    Job,
    LoadAdapterJob,
    LoraSpec,
    Pooling,
    SaveAdapterJob,
    SaveResult,
)
from onebase.server.leases import Session, Sessions
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, Registry, Reservation
from onebase.server.room import AdapterQuotas
from onebase.server.store import ResponseRow
from onebase.server.volatile import Volatile

log = logging.getLogger(__name__)

Receipt = Callable[[Entry], ResponseRow | None]
"""What the call that makes an entry will be answered, to be kept with it."""


@dataclass(frozen=True)
class NewAdapter:
    """A policy or critic to make, fresh or as a copy of the adapter named `init_from`, whose shape it has then."""

    name: str
    lora: LoraSpec
    value_head: bool
    seed: int = 0
    kind: AdapterKind = AdapterKind.POLICY
    init_from: str = ""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter to read from a directory; `path` is already known to be allowed.

    `source` is where it comes from, for people; empty is the path.
    """

    name: str
    kind: AdapterKind
    path: Path
    value_head: bool = False
    replace: bool = False
    with_optimizer: bool = False
    seed: int = 0
    source: str = ""
    append_eos: bool | None = None
    pooling: Pooling | None = None
    kept: bool = True
    """Whether it outlives the process, if anything does: what the settings name is read anew."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter to write to a directory; `path` is already known to be allowed."""

    name: str
    path: Path
    with_optimizer: bool = False
    overwrite: bool = False
    merged: bool = False
    stamp: str = ""
    """Of the call that asks for it, see `idempotency.stamp`."""


class Catalog:
    """Changes which adapters there are."""

    def __init__(
        self,
        worker: WorkerLike,
        registry: Registry,
        sessions: Sessions,
        keeper: Volatile,
        quotas: AdapterQuotas | None = None,
        fences: Fences | None = None,
    ) -> None:
        self._worker = worker
        self._registry = registry
        self._sessions = sessions
        self._keeper = keeper
        self._quotas = quotas or AdapterQuotas(registry)
        self._fences = fences or Fences()
        sessions.given_back = self._given_back

    async def create(
        self,
        new: NewAdapter,
        session: Session | None,
        deadline: float | None = None,
        receipt: Receipt = lambda _entry: None,
    ) -> Entry:
        """Makes a policy or a critic; the session gets its lease.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: what it shall be a copy of is not there.
            ResourceExhausted: a quota is used up.
            OnebaseError: the worker's.
        """
        source = self._registry.get(new.init_from, "init_from") if new.init_from else None
        reservation = self._registry.reserve(new.name)
        with self._released_on_error(reservation):
            async with self._quotas.room(reservation.owner) as room:
                facts = await self._create(new, reservation, source, room.most, session, deadline)
                with self._discarded_on_error(facts.uid):
                    room.made(facts)
                    if source is not None and (now := self._registry.current(source.uid)) is not None:
                        # a copy must not outlive what it copies
                        await settled(self._keeper.seen({now.uid: now.facts.version}))
                    entry = self._registry.prospect(reservation, facts, "")
                    await self._keeper.add(entry, receipt(entry), partial(self._lessee, entry, session))
                return self._bind(reservation, entry, session)

    async def _create(
        self,
        new: NewAdapter,
        reservation: Reservation,
        source: Entry | None,
        room: int | None,
        session: Session | None,
        deadline: float | None,
    ) -> AdapterFacts:
        job = CreateAdapterJob(
            uid=reservation.uid,
            name=new.name,
            lora=new.lora,
            value_head=new.value_head,
            seed=new.seed,
            kind=new.kind,
            init_from=source.uid if source else None,
            least_version=reservation.least_version,
            max_bytes=room,
        )
        return await settle(self._worker, job, session, deadline)

    async def load(
        self,
        loaded: LoadedAdapter,
        session: Session | None,
        deadline: float | None = None,
        receipt: Receipt = lambda _entry: None,
    ) -> Entry:
        """Reads an adapter; the session gets the lease of one that is trained. With `replace`, the old one is deleted.

        Raises:
            AlreadyExists: the name is taken, and `replace` is not set.
            FailedPrecondition: what would be replaced is of another kind.
            Aborted: another session holds the lease of what would be replaced, or it was stepped in the meantime.
            DeadlineExceeded: its training calls have not ended by then.
            OnebaseError: the worker's.
        """
        reservation = self._registry.reserve(loaded.name, replacing=loaded.replace)
        with self._released_on_error(reservation):
            self._check_replaced(reservation, loaded.kind, session)
            async with self._quotas.room(reservation.owner, reservation.old) as room:
                facts = await settle(self._worker, _load_job(loaded, reservation, room.most), session, deadline)
                with self._discarded_on_error(facts.uid):
                    room.made(facts)
                    async with self._fences.ending(reservation.old, deadline):
                        old = self._replaced(loaded, reservation, facts)
                        entry = self._registry.prospect(reservation, facts, loaded.source or str(loaded.path))
                        if loaded.kept:
                            await self._keeper.add(entry, receipt(entry), partial(self._lessee, entry, session))
                        self._bind(reservation, entry, session)
        if old is not None:
            self._discard(old.uid)
        return entry

    def _replaced(self, loaded: LoadedAdapter, reservation: Reservation, facts: AdapterFacts) -> Entry | None:
        """What a loaded adapter replaces, if it is newer than that."""
        old = self._registry.current(reservation.old.uid) if reservation.old else None
        if old is not None and old.facts.version >= facts.version:
            raise Aborted(
                "VERSION_MISMATCH",
                f"adapter {loaded.name!r} was stepped to version {old.facts.version} while it was being replaced: "
                "finish its training calls first, then load again",
            )
        return old

    @contextlib.contextmanager
    def _discarded_on_error(self, uid: int) -> Iterator[None]:
        """An adapter that the engine has, and whose name nobody will have, is given up."""
        try:
            yield
        except BaseException:
            self._discard(uid)
            raise

    async def save(
        self, saved: SavedAdapter, entry: Entry, session: Session | None, deadline: float | None
    ) -> SaveResult:
        """Writes an adapter.

        Raises:
            OnebaseError: the worker's.
        """
        job: Job[SaveResult] = SaveAdapterJob(
            adapter=entry.uid,
            path=saved.path,
            with_optimizer=saved.with_optimizer,
            overwrite=saved.overwrite,
            merged=saved.merged,
            stamp=saved.stamp,
            # What a trainer has left there is nobody else's: who may not change the adapter may not read it either.
            with_client_state=saved.with_optimizer and caller().may_change(entry.owner, entry.name),
        )
        return await settle(self._worker, job, session, deadline)

    async def delete(
        self,
        name: str,
        session: Session | None,
        deadline: float | None = None,
        record: ResponseRow | None = None,
    ) -> None:
        """Forgets a name when its training calls have ended; its memory is freed as soon as the engine comes to it.

        Raises:
            NotFound: no such adapter.
            Aborted: another session holds its lease, or another call is replacing it.
            DeadlineExceeded: its training calls have not ended by then.
        """
        if not self._registry.damaged(name):
            self._registry.check_may_change(self._registry.get(name, "name"))
        reservation = self._registry.reserve(name, replacing=True)
        with self._released_on_error(reservation):
            self._sessions.require(session, reservation.key)
            async with self._fences.ending(reservation.old, deadline):
                least_version = self._registry.least_version(reservation.key)
                await self._keeper.remove(reservation.key, least_version, record)
                self._registry.release(reservation)
                self._registry.remove(reservation.key)
        self._sessions.drop(reservation.key)
        log.info("adapter %s deleted", name)
        if reservation.old is not None:
            self._discard(reservation.old.uid)

    def _given_back(self, key: str) -> None:
        self.drop_gradients(key)
        self._keeper.lease_ended(key)

    def drop_gradients(self, key: str) -> None:
        """Has the engine drop an adapter's pending gradients: the next holder of its lease begins with none."""
        entry = self._registry.find(key)
        if entry is None:
            return
        job = DropGradientsJob(adapter=entry.uid)
        loop = asyncio.get_running_loop()
        try:
            submit(self._worker, job, None, None)
        except OnebaseError as error:  # the server drains: nobody trains any more
            log.info("pending gradients of adapter %s stay: %s", key, error)
            return
        job.done.add_done_callback(lambda done: loop.call_soon_threadsafe(self._take_facts, done))

    def _take_facts(self, done: Future[AdapterFacts]) -> None:
        if done.exception() is None:
            self._registry.update(done.result())

    async def refresh(self, deadline: float | None = None) -> None:
        """Asks the engine for the facts of all adapters.

        Raises:
            OnebaseError: the worker's.
        """
        for facts in (await perform(self._worker, DescribeAdaptersJob(), None, deadline)).values():
            self._registry.update(facts)

    def _check_replaced(self, reservation: Reservation, kind: AdapterKind, session: Session | None) -> None:
        old = reservation.old
        if old is None:
            return
        if old.kind is not kind:
            raise FailedPrecondition(
                "WRONG_ADAPTER_KIND",
                f"{old.name!r} is a {old.kind.value} adapter, and a {kind.value} adapter cannot take its place: load "
                "it under another name",
                field="kind",
            )
        if kind.trained:
            self._sessions.require(session, old.key)

    @contextlib.contextmanager
    def _released_on_error(self, reservation: Reservation) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._registry.release(reservation)
            raise

    def _bind(self, reservation: Reservation, entry: Entry, session: Session | None) -> Entry:
        self._registry.take(reservation, entry)
        log.info(
            "%s adapter %s has come, version %d, %s",
            entry.kind.value,
            entry.name,
            entry.facts.version,
            entry.source or "made here",
        )
        if (lessee := self._lessee(entry, session)) is not None:
            self._sessions.take(lessee, entry.key)
        return entry

    def _lessee(self, entry: Entry, session: Session | None) -> Session | None:
        """The session that gets a new adapter's lease: unless it has closed meanwhile, or another was quicker."""
        if session is None or not entry.kind.trained or not self._sessions.is_open(session):
            return None
        return session if self._sessions.holder(entry.key) in (None, session) else None

    def _discard(self, uid: int) -> None:
        """Has the engine free the memory of a uid that no name means any more; nobody's cancel stops that."""
        job = DeleteAdapterJob(adapter=uid)
        try:
            submit(self._worker, job, None, None)
        except OnebaseError as error:  # the server drains, and will free everything
            log.warning("memory of adapter uid %d is not freed: %s", uid, error)
            return
        job.done.add_done_callback(_log_failure)


def _log_failure(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.warning("memory of an adapter is not freed: %s", error)


def _load_job(loaded: LoadedAdapter, reservation: Reservation, room: int | None) -> Job[AdapterFacts]:
    return LoadAdapterJob(
        uid=reservation.uid,
        name=loaded.name,
        kind=loaded.kind,
        path=loaded.path,
        value_head=loaded.value_head,
        with_optimizer=loaded.with_optimizer,
        seed=loaded.seed,
        append_eos=loaded.append_eos,
        pooling=loaded.pooling,
        max_bytes=room,
        least_version=reservation.least_version,
    )
