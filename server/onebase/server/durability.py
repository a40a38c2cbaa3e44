"""What outlives the process: when adapters are made durable, and in which order.

    written beside its place → synced → renamed → parent synced → committed, with the answers → answered

A change of which adapters there are is durable before it is answered. An optimizer step is, with `--durability step`;
otherwise its adapter is saved every so many steps or seconds, when its lease ends, and when the server stops. The
answers of steps are committed with the first checkpoint that holds their effect, so a repeated request_id finds its
answer exactly where its effect is found. Pending gradients are not durable.

All of this runs on the event loop; disks are waited for on one thread of its own, and on the worker's for files.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from onebase.server import failpoints
from onebase.server.calls import settle, unbroken
from onebase.server.checkpoints import StateDirectory
from onebase.server.config import ConfigError, StateConfig
from onebase.server.errors import NotFound, OnebaseError, Unavailable, disk_full
from onebase.server.jobs import AdapterKind, Job, OptimStepResult, SaveAdapterJob, SaveResult
from onebase.server.leases import Session
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry
from onebase.server.residency import Residency
from onebase.server.store import AdapterRow, CheckpointRow, ResponseRow, SessionRow, Store, WrongStateError

log = logging.getLogger(__name__)

R = TypeVar("R")

RESERVED_VERSIONS = 1000
"""So many versions are set aside at once where steps are not durable one by one."""


STEPS_UNDER_WAY = 100
"""More are set aside when so few are left: so many steps may wait that nobody has heard of yet."""


class Volatile:
    """Nothing outlives the process."""

    def step_path(self, entry: Entry) -> Path | None:
        """Where an optimizer step shall write the version that it makes; None: nowhere."""
        del entry
        return None

    async def before_step(self, entry: Entry) -> None:
        """Is awaited before each optimizer step."""

    async def stepped(self, entry: Entry, result: OptimStepResult, record: ResponseRow | None) -> None:
        """Takes a step in; returns when it is as durable as the settings promise.

        Raises:
            OnebaseError: the step was made, and is not durable: see `finish_step`.
        """

    async def finish_step(self, uid: int, version: int) -> None:
        """Makes a step durable that `stepped` could not.

        Raises:
            OnebaseError: it still cannot.
        """

    async def add(self, entry: Entry, record: ResponseRow | None) -> None:
        """Makes a new adapter durable, in the place of any other of its name.

        Raises:
            OnebaseError: it is not.
        """

    async def remove(self, key: str, record: ResponseRow | None) -> None:
        """Makes it durable that there is no adapter of this key.

        Raises:
            OnebaseError: it is not.
        """

    def lease_ended(self, key: str) -> None:
        """Nobody trains this adapter any more."""

    def abandoned(self, key: str) -> None:
        """Whoever trains this adapter is gone for now: saves it, and frees its device memory then."""

    def session_changed(self, session: Session) -> None:
        """Notes a session as it is now; `synced` waits for it."""

    def session_ended(self, session: Session) -> None:
        """Forgets a session."""

    async def synced(self) -> None:
        """Returns when the sessions are noted as they were when it was called."""

    def tick(self) -> None:
        """Is called about once a second."""

    async def close(self) -> None:
        """Saves what has changed. Steps and other changes must have ended."""


@dataclass(eq=False)
class _Track:
    """How far one adapter is durable."""

    key: str
    kind: AdapterKind
    durable: int
    """The newest version that is."""
    newest: int
    """The newest version that there is."""
    reserved: int
    """The highest version that may be made before another note in the store."""
    since: float = 0.0
    """When the first step was made that is not durable; or when saving it last failed."""
    records: list[tuple[int, ResponseRow]] = field(default_factory=list)
    """Answers of steps, by version, that are not durable."""
    saving: asyncio.Task[None] | None = None


class Durable(Volatile):
    """Adapters, answers and sessions outlive the process.

    Args:
        worker: writes the checkpoints.
        directory: where; locked.
        config: when.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        worker: WorkerLike,
        directory: StateDirectory,
        store: Store,
        config: StateConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.store = store
        self.config = config
        self._worker = worker
        self._clock = clock
        self._tracks: dict[int, _Track] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onebase-store")
        self._notes: set[asyncio.Future[None]] = set()
        self._asides: set[asyncio.Future[None]] = set()
        self._closed = False
        self.residency = Residency(worker, self, config.evict_idle_seconds, config.adapter_memory)

    async def on_thread(self, work: Callable[[], R]) -> R:
        """Runs what waits for the disk on the store's thread, after all that was given to it before.

        Raises:
            OnebaseError: what an OSError means to a client.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except OSError as error:
            raise disk_full(error) from error

    def track(self, entry: Entry, durable: int, reserved: int) -> None:
        """Follows an adapter of the store, at this version."""
        for uid, other in list(self._tracks.items()):
            if other.key == entry.key:
                del self._tracks[uid]
        self._tracks[entry.uid] = _Track(entry.key, entry.kind, durable, entry.facts.version, reserved)

    # ------------------------------------------------------------------------------------------- adapters come and go

    async def add(self, entry: Entry, record: ResponseRow | None) -> None:  # noqa: D102
        await self._through(self._add(entry, record))

    async def _add(self, entry: Entry, record: ResponseRow | None) -> None:
        saved = await self._write(entry.uid, entry.kind)
        row = AdapterRow(entry.key, entry.uid, entry.kind.value, entry.create_time, entry.source)

        def commit(checkpoint: CheckpointRow) -> list[str]:
            return self.store.add(row, checkpoint, [record] if record else [])

        await self._commit(saved, entry.uid, commit)
        self.track(entry, saved.version, 0)

    async def remove(self, key: str, record: ResponseRow | None) -> None:  # noqa: D102
        await self._through(self._remove(key, record))

    async def _remove(self, key: str, record: ResponseRow | None) -> None:
        dropped = await self.on_thread(lambda: self.store.remove(key, [record] if record else []))
        self._tracks = {uid: track for uid, track in self._tracks.items() if track.key != key}
        self._aside(self.on_thread(lambda: self.directory.remove(dropped)))

    # ---------------------------------------------------------------------------------------------------------- steps

    def step_path(self, entry: Entry) -> Path | None:  # noqa: D102
        if self.config.durability == "step" and entry.uid in self._tracks:
            return self.directory.fresh(entry.uid)
        return None

    async def before_step(self, entry: Entry) -> None:
        """Sets versions aside, so that none is ever given twice: a version that is lost may have been read."""
        track = self._tracks.get(entry.uid)
        if track is None or self.config.durability == "step" or track.newest + STEPS_UNDER_WAY < track.reserved:
            return
        reserved = track.newest + RESERVED_VERSIONS
        await self._through(self.on_thread(lambda: self.store.reserve(entry.uid, reserved)))
        track.reserved = max(track.reserved, reserved)

    async def stepped(self, entry: Entry, result: OptimStepResult, record: ResponseRow | None) -> None:  # noqa: D102
        track = self._tracks.get(entry.uid)
        if track is None:
            return
        if track.newest == track.durable:
            track.since = self._clock()
        track.newest = max(track.newest, result.version)
        self.residency.stepped(entry.uid)
        if record is not None:
            track.records.append((result.version, record))
        if result.saved is not None:
            await self._through(self._finish_written(entry.uid, asyncio.wrap_future(result.saved)))
        elif self.config.steps and track.newest - track.durable >= self.config.steps:
            self._begin(entry.uid, track)

    async def finish_step(self, uid: int, version: int) -> None:  # noqa: D102
        await self._through(self._until_durable(uid, version))

    async def _finish_written(self, uid: int, writing: Awaitable[SaveResult]) -> None:
        await self._advance(uid, await writing)

    async def _until_durable(self, uid: int, version: int) -> None:
        while (track := self._tracks.get(uid)) is not None and track.durable < version:
            await self._begin(uid, track)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def lease_ended(self, key: str) -> None:  # noqa: D102
        for uid, track in self._tracks.items():
            if track.key == key and track.newest > track.durable:
                self._begin(uid, track)

    def abandoned(self, key: str) -> None:  # noqa: D102
        for uid, track in self._tracks.items():
            if track.key == key:
                self.residency.abandoned(uid)

    def is_durable(self, uid: int) -> bool:
        """Whether an adapter is kept here, and its newest version is durable."""
        track = self._tracks.get(uid)
        return track is not None and track.durable == track.newest

    def holds(self, uid: int) -> bool:
        """Whether an adapter is kept here, and so may leave device memory."""
        return uid in self._tracks

    async def make_durable(self, uid: int) -> int | None:
        """Makes an adapter's newest version durable and returns it; None if it is being changed or saved.

        Raises:
            OnebaseError: it is not durable.
        """
        track = self._tracks.get(uid)
        if track is None:
            return None
        await self._until_durable(uid, track.newest)
        return track.durable if track.durable == track.newest and track.saving is None else None

    @contextmanager
    def opened(self, uid: int, loop: asyncio.AbstractEventLoop) -> Iterator[Path]:
        """A directory with an adapter's newest checkpoint, which is whole. For another thread than the loop's.

        Raises:
            DataLoss: CHECKPOINT_DAMAGED.
            NotFound: the adapter was deleted meanwhile.
            Unavailable: the server has stopped.
        """
        if self._closed:
            raise Unavailable("DRAINED", "the server shut down before this was done: repeat it later", retry_after=5.0)
        rows = asyncio.run_coroutine_threadsafe(self.on_thread(lambda: self.store.checkpoints(uid)), loop).result()
        if not rows:
            raise NotFound("ADAPTER_NOT_FOUND", "it was deleted while the request waited")
        self.directory.verify(rows[0])
        with self.directory.opened(rows[0].folder) as path:
            yield path

    def tick(self) -> None:  # noqa: D102
        self.residency.tick()
        for uid, track in self._tracks.items():
            late = self._clock() - track.since >= self.config.seconds > 0
            if track.newest > track.durable and track.saving is None and late:
                self._begin(uid, track)

    def _begin(self, uid: int, track: _Track) -> asyncio.Task[None]:
        """Begins a checkpoint, unless one is under way; a failure is logged, and told to who awaits the task."""
        if track.saving is None:
            track.saving = asyncio.get_running_loop().create_task(self._checkpoint(uid, track))
            track.saving.add_done_callback(lambda task: self._ended(track, task))
        return track.saving

    def _ended(self, track: _Track, task: asyncio.Task[None]) -> None:
        track.saving = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            track.since = self._clock()
            log.warning("adapter %s is not durable beyond version %d: %s", track.key, track.durable, error)

    async def _checkpoint(self, uid: int, track: _Track) -> None:
        await self._advance(uid, await self._write(uid, track.kind))

    async def _write(self, uid: int, kind: AdapterKind) -> SaveResult:
        job: Job[SaveResult] = SaveAdapterJob(adapter=uid, path=self.directory.fresh(uid), with_optimizer=kind.trained)
        return await settle(self._worker, job)

    async def _advance(self, uid: int, saved: SaveResult) -> None:
        """Commits a checkpoint with the answers of the steps that are in it."""
        track = self._tracks.get(uid)
        due = [record for version, record in track.records if version <= saved.version] if track else []

        def commit(checkpoint: CheckpointRow) -> list[str]:
            return self.store.advance(checkpoint, self.config.keep, due)

        await self._commit(saved, uid, commit)
        if track is not None:
            track.durable = max(track.durable, saved.version)
            track.since = self._clock()
            track.records = [(version, record) for version, record in track.records if version > saved.version]

    async def _commit(self, saved: SaveResult, uid: int, commit: Callable[[CheckpointRow], list[str]]) -> None:
        def work() -> list[str]:
            failpoints.hit("after_rename")
            dropped = commit(self.directory.row(saved.path, uid, saved.version))
            failpoints.hit("after_commit")
            return dropped

        try:
            dropped = await self.on_thread(work)
        except BaseException:
            self._aside(self.on_thread(lambda: self.directory.remove([saved.path.name])))
            raise
        self._aside(self.on_thread(lambda: self.directory.remove(dropped)))

    # ------------------------------------------------------------------------------------------------------- sessions

    def session_changed(self, session: Session) -> None:  # noqa: D102
        row = SessionRow(
            session.session_id,
            session.queue,
            session.label,
            session.ttl,
            session.active,
            tuple(session.leases),
            session.tenant,
        )
        self._note(lambda: self.store.put_session(row))

    def session_ended(self, session: Session) -> None:  # noqa: D102
        session_id = session.session_id
        self._note(lambda: self.store.end_session(session_id))

    def _note(self, work: Callable[[], None]) -> None:
        note = asyncio.ensure_future(self.on_thread(work))
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)
        note.add_done_callback(_log_failure)

    async def synced(self) -> None:  # noqa: D102
        if self._notes:
            await asyncio.wait(tuple(self._notes))

    # ------------------------------------------------------------------------------------------------------------ end

    async def close(self) -> None:  # noqa: D102
        try:
            await self.residency.close()
            await self._ended_asides()
            for uid, track in list(self._tracks.items()):
                await self._last_checkpoint(uid, track)
            await self.synced()
            await self._ended_asides()
        finally:
            self._closed = True
            await asyncio.to_thread(self._thread.shutdown)
            self.store.close()
            self.directory.close()

    async def _last_checkpoint(self, uid: int, track: _Track) -> None:
        try:
            await self._until_durable(uid, track.newest)
            if track.reserved:
                await self.on_thread(lambda: self.store.reserve(uid, 0))
        except OnebaseError as error:
            log.error("adapter %s is durable up to version %d only: %s", track.key, track.durable, error)

    async def _through(self, work: Coroutine[Any, Any, None]) -> None:
        """Does what must not stop half-way; the end of the server waits for it too."""
        await unbroken(self._aside(work))

    def _aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins what the end of the server waits for, if nobody else does."""
        task = asyncio.get_running_loop().create_task(work)
        self._asides.add(task)
        task.add_done_callback(self._asides.discard)
        task.add_done_callback(_log_failure)
        return task

    async def _ended_asides(self) -> None:
        while self._asides:
            await asyncio.wait(tuple(self._asides))


def open_durable(worker: WorkerLike, directory: StateDirectory, config: StateConfig) -> Durable:
    """Opens the store of a directory that this process has locked, for the base that the worker has.

    Raises:
        ConfigError: the state belongs to another base, or to another version of onebase.
    """
    facts = worker.facts
    try:
        store = Store(directory.store_path)
    except WrongStateError as error:
        raise ConfigError(f"state is {str(config.path)!r}: {error}") from error
    theirs = store.meta("base")
    if theirs and theirs != facts.fingerprint:
        model = store.meta("model")
        store.close()
        raise ConfigError(
            f"state is {str(config.path)!r}: it belongs to the base {model!r} ({theirs[:12]}), and this server has "
            f"{facts.model!r} ({facts.fingerprint[:12]}): serve that base, or give another directory"
        )
    if not theirs:
        store.set_meta("model", facts.model)
        store.set_meta("base", facts.fingerprint)
    return Durable(worker, directory, store, config)


def _log_failure(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        log.warning("the state directory could not be written: %s", error)
