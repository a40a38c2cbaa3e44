"""What outlives the process: when adapters are made durable, and in which order.

    written beside its place → synced → renamed → parent synced → put → committed, with the answers → answered

(`put` takes it to where checkpoints lie, if that is a URL.)

A change of which adapters there are is durable before it is answered. An optimizer step is, with `--durability step`;
otherwise its adapter is saved every so many steps or seconds, when its lease ends, and when the server stops. The
answers of steps are committed with the first checkpoint that holds their effect, so a repeated request_id finds its
answer exactly where its effect is found. Pending gradients are not durable.

All of this runs on the event loop. The store is waited for on one thread of its own, where checkpoints lie on others,
and files are written on the worker's: what keeps one of them waiting keeps no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from onebase.server import failpoints
from onebase.server.calls import settle
from onebase.server.checkpoints import StateDirectory, offer
from onebase.server.config import StateConfig
from onebase.server.errands import Errands
from onebase.server.errors import DataLoss, drained, not_there
from onebase.server.jobs import AdapterKind, Job, OptimStepResult, SaveAdapterJob, SaveResult
from onebase.server.leases import Session
from onebase.server.notes import Notes
from onebase.server.ports import WorkerLike
from onebase.server.registry import Entry, owner_of
from onebase.server.residency import Residency
from onebase.server.showing import Showing
from onebase.server.store import AdapterRow, CheckpointRow, EndRow, ResponseRow, SessionRow, Store
from onebase.server.tracks import Track, row_of
from onebase.server.volatile import Volatile

log = logging.getLogger(__name__)

R = TypeVar("R")

RESERVED_VERSIONS = 1000
"""So many versions are set aside at once where steps are not durable one by one."""

AGAIN_SECONDS = 5.0
"""With `--durability step`, a step that could not be made durable is tried again so often, by itself."""

STEPS_UNDER_WAY = 100
"""More are set aside when so few are left: so many steps may wait that nobody has heard of yet."""


class Durable(Volatile):
    """Adapters, answers and sessions outlive the process.

    Args:
        worker: writes the checkpoints.
        directory: where; locked.
        config: when.
        adopted: whether the store was made again from what lies beside the checkpoints.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        worker: WorkerLike,
        directory: StateDirectory,
        store: Store,
        config: StateConfig,
        *,
        adopted: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.store = store
        self.config = config
        self.adopted = adopted
        self._worker = worker
        self._clock = clock
        self._tracks: dict[int, Track] = {}
        self._showing = Showing(self._tracks, careful=config.durability == "step")
        self._errands = Errands()
        self._notes = Notes(self.on_thread)  # of sessions
        self._closed = False
        self.residency = Residency(worker, self, config.evict_idle_seconds, config.adapter_memory)

    async def on_thread(self, work: Callable[[], R]) -> R:
        """Runs what waits for the store, see `Errands`."""
        return await self._errands.store(work)

    async def on_storage(self, work: Callable[[], R]) -> R:
        """Runs what waits for where checkpoints lie, see `Errands`."""
        return await self._errands.storage(work)

    @asynccontextmanager
    async def verified(self, checkpoint: CheckpointRow) -> AsyncIterator[Path]:
        """A checkpoint's directory on this machine's disk, for as long as the block runs, all of it what was written.

        Raises:
            DataLoss: CHECKPOINT_DAMAGED.
            OnebaseError: Unavailable.
        """
        with ExitStack() as stack:
            yield await self.on_storage(lambda: stack.enter_context(self.directory.verified(checkpoint)))

    def track(self, entry: Entry, durable: int, reserved: int) -> None:
        """Follows an adapter of the store, at this version."""
        self._untrack(entry.key)
        self._tracks[entry.uid] = Track(row_of(entry), durable, entry.facts.version, reserved, safe=entry.facts.version)

    def _untrack(self, key: str) -> None:
        for uid in [uid for uid, track in self._tracks.items() if track.key == key]:
            del self._tracks[uid]

    # ------------------------------------------------------------------------------------------- adapters come and go

    async def add(  # noqa: D102
        self, entry: Entry, record: ResponseRow | None, lessee: Callable[[], Session | None] = lambda: None
    ) -> None:
        await self._errands.through(self._add(entry, record, lessee))

    async def _add(self, entry: Entry, record: ResponseRow | None, lessee: Callable[[], Session | None]) -> None:
        saved, row = await self._write(entry.uid, entry.kind), row_of(entry)

        def commit(checkpoint: CheckpointRow) -> list[str]:
            session = lessee()  # with the answer, which says that the adapter is leased
            return self.store.add(
                row, checkpoint, [record] if record else [], _session_row(session, entry.key) if session else None
            )

        await self._commit(saved, row, commit)
        self.track(entry, saved.version, 0)

    async def remove(self, key: str, least_version: int, record: ResponseRow | None) -> None:  # noqa: D102
        await self._errands.through(self._remove(key, least_version, record))

    async def _remove(self, key: str, least_version: int, record: ResponseRow | None) -> None:
        end = EndRow(key, owner_of(key), least_version)

        def removed() -> list[str]:
            dropped = self.store.remove(end, [record] if record else [])
            failpoints.hit("after_commit")
            return dropped

        dropped = await self.on_thread(removed)
        self._untrack(key)
        self._forget(dropped)

    async def answered(self, record: ResponseRow | None) -> None:  # noqa: D102
        if record is not None:
            await self._errands.through(self.on_thread(lambda: self.store.answer(record)))

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
        await self._errands.through(self.on_thread(lambda: self.store.reserve(entry.uid, reserved)))
        track.reserved = max(track.reserved, reserved)

    @contextlib.contextmanager
    def stepping(self, entry: Entry) -> Iterator[None]:  # noqa: D102
        track = self._tracks.get(entry.uid)
        if track is None:
            yield
            return
        track.steps_under_way += 1
        try:
            yield
        finally:
            track.steps_under_way -= 1
            track.go_on()

    async def seen(self, versions: Mapping[int, int]) -> None:  # noqa: D102
        await self._showing.seen(versions)

    async def shown(self, entries: Sequence[Entry]) -> list[Entry]:  # noqa: D102
        return await self._showing.shown(entries)

    async def stepped(self, entry: Entry, result: OptimStepResult, record: ResponseRow | None) -> None:  # noqa: D102
        track = self._tracks.get(entry.uid)
        if track is None:
            return
        track.stepped(result.version, record, self._clock())
        self.residency.stepped(entry.uid)
        if result.saved is not None:
            await self._errands.through(self._finish_written(entry.uid, asyncio.wrap_future(result.saved)))
        elif self.config.steps and track.newest - track.durable >= self.config.steps:
            self._begin(entry.uid, track)

    async def finish_step(self, uid: int, version: int) -> None:  # noqa: D102
        await self._errands.through(self._until_durable(uid, version))

    async def _finish_written(self, uid: int, writing: Awaitable[SaveResult]) -> None:
        try:
            await self._advance(uid, await writing)
        except Exception as error:
            if (track := self._tracks.get(uid)) is not None:
                self._failed(track, error)
            raise

    async def _until_durable(self, uid: int, version: int) -> None:
        while (track := self._tracks.get(uid)) is not None and track.durable < version:
            await self._begin(uid, track)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def durable_version(self, uid: int) -> int | None:  # noqa: D102
        track = self._tracks.get(uid)
        return None if track is None else track.durable

    async def checkpoint(  # noqa: D102
        self, entry: Entry, client_state: bytes | None, record: Callable[[int], ResponseRow | None]
    ) -> int:
        track = self._tracks.get(entry.uid)
        if track is None:
            raise not_there()
        if client_state is not None:
            await self._errands.through(self._renew(entry.uid, track, client_state))
        await self._errands.through(self._until_durable(entry.uid, track.newest))
        version = track.durable
        await self.answered(record(version))
        return version

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

    @contextlib.contextmanager
    def opened(self, uid: int, loop: asyncio.AbstractEventLoop) -> Iterator[Path]:
        """A directory with an adapter's newest checkpoint, which is whole. For another thread than the loop's.

        Raises:
            DataLoss: CHECKPOINT_DAMAGED.
            Gone: the adapter was replaced or deleted meanwhile.
            Unavailable: the server has stopped.
        """
        with ExitStack() as stack:
            yield self._verified(uid, loop, stack)

    def _verified(self, uid: int, loop: asyncio.AbstractEventLoop, stack: ExitStack) -> Path:
        last: CheckpointRow | None = None
        while True:
            if self._closed:
                raise drained()
            rows = asyncio.run_coroutine_threadsafe(self.on_thread(lambda: self.store.checkpoints(uid)), loop).result()
            if not rows:
                raise not_there()
            try:
                return stack.enter_context(self.directory.verified(rows[0]))
            except DataLoss as error:
                if rows[0] == last:
                    track, whole = self._tracks.get(uid), self.directory.whole(rows[1:])
                    raise (offer(track.key, error, whole) if track else error) from error
                last = rows[0]  # it may have gone meanwhile, with its adapter or for a newer one: looked up again

    def tick(self) -> None:  # noqa: D102
        self.residency.tick()
        self._notes.again()
        # A step that is to be durable before anything shows it is not left waiting for whoever made it to come again.
        seconds = AGAIN_SECONDS if self.config.durability == "step" else self.config.seconds
        for uid, track in self._tracks.items():
            late = self._clock() - track.since >= seconds > 0
            if track.newest > track.durable and track.saving is None and not track.steps_under_way and late:
                self._begin(uid, track)

    async def _renew(self, uid: int, track: Track, client_state: bytes) -> None:
        while track.saving is not None:  # it would not take this state along
            await asyncio.wait((track.saving,))
        await self._begin(uid, track, client_state)

    def _begin(self, uid: int, track: Track, client_state: bytes | None = None) -> asyncio.Task[None]:
        """Begins a checkpoint, unless one is under way; a failure is logged, and told to who awaits the task."""
        if track.saving is None:
            track.saving = asyncio.get_running_loop().create_task(self._checkpoint(uid, track, client_state))
            track.saving.add_done_callback(lambda task: self._ended(track, task))
        return track.saving

    def _ended(self, track: Track, task: asyncio.Task[None]) -> None:
        track.saving = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(track, error)

    def _failed(self, track: Track, error: BaseException) -> None:
        track.failed(error, self._clock())
        log.warning("adapter %s is not durable beyond version %d: %s", track.key, track.durable, error)

    async def _checkpoint(self, uid: int, track: Track, client_state: bytes | None) -> None:
        await self._advance(uid, await self._write(uid, track.kind, client_state))

    async def _write(self, uid: int, kind: AdapterKind, client_state: bytes | None = None) -> SaveResult:
        job: Job[SaveResult] = SaveAdapterJob(
            adapter=uid,
            path=self.directory.fresh(uid),
            with_optimizer=kind.trained,
            with_client_state=True,
            client_state=client_state,
        )
        return await settle(self._worker, job)

    async def _advance(self, uid: int, saved: SaveResult) -> None:
        """Commits a checkpoint with the answers of the steps that are in it."""
        track = self._tracks.get(uid)
        if track is None:  # the adapter was deleted meanwhile
            self._forget([saved.path.name])
            return
        due = track.due(saved.version)

        def commit(checkpoint: CheckpointRow) -> list[str]:
            if track.overtaken(saved.version, saved.snapshot):  # by one of the same version with a later client state
                self.store.answer(*due)
                return [checkpoint.folder]
            dropped = self.store.advance(checkpoint, self.config.keep, due)
            track.put(saved.version, saved.snapshot)
            return dropped

        await self._commit(saved, replace(track.row, reserved=track.reserved), commit)
        track.saved(saved.version, self._clock())

    async def _commit(self, saved: SaveResult, row: AdapterRow, commit: Callable[[CheckpointRow], list[str]]) -> None:
        if self.config.durability != "step" and AdapterKind(row.kind).trained:  # for who has lost the store
            row = replace(row, reserved=max(row.reserved, saved.version + RESERVED_VERSIONS))

        def put() -> CheckpointRow:
            failpoints.hit("after_rename")
            return self.directory.put(saved.path, row, saved.version)

        def committed(checkpoint: CheckpointRow) -> list[str]:
            dropped = commit(checkpoint)
            failpoints.hit("after_commit")
            return dropped

        try:
            checkpoint = await self.on_storage(put)
            dropped = await self.on_thread(lambda: committed(checkpoint))
        except BaseException:
            self._forget([saved.path.name])
            raise
        self._forget(dropped)

    def _forget(self, folders: list[str]) -> None:
        """Deletes checkpoints that the store does not name any more; nobody waits for that."""
        if folders:
            self._errands.aside(self.on_storage(lambda: self.directory.remove(folders)))

    # ------------------------------------------------------------------------------------------------------- sessions

    def session_changed(self, session: Session) -> None:  # noqa: D102
        row = _session_row(session)
        self._note(row.session, lambda: self.store.put_session(row))

    def session_ended(self, session: Session) -> None:  # noqa: D102
        session_id = session.session_id
        self._note(session_id, lambda: self.store.end_session(session_id))

    def _note(self, session_id: str, change: Callable[[], None]) -> None:
        def noted() -> None:
            change()
            failpoints.hit("noted")

        self._notes.note(session_id, noted)

    async def synced(self, session_id: str) -> None:  # noqa: D102
        await self._notes.written(session_id)

    # ------------------------------------------------------------------------------------------------------------ end

    async def close(self) -> None:  # noqa: D102
        try:
            await self.residency.close()
            await self._errands.ended()
            for uid, track in list(self._tracks.items()):
                await self._last_checkpoint(uid, track)
            self._notes.again()
            await self.synced("")
            await self._errands.ended()
        finally:
            self._closed = True
            await self._errands.close()
            self.store.close()
            self.directory.close()

    async def _last_checkpoint(self, uid: int, track: Track) -> None:
        try:
            await self._until_durable(uid, track.newest)
            if track.reserved:
                await self.on_thread(lambda: self.store.reserve(uid, 0))
        except Exception as error:  # whatever it is, the others' turn comes
            log.error("adapter %s is durable up to version %d only: %s", track.key, track.durable, error)


def _session_row(session: Session, *taken: str) -> SessionRow:
    """A session as the store shall know it, with leases that it is about to take. Any thread may call this."""
    leases = tuple(session.leases)
    return SessionRow(
        session.session_id,
        session.queue,
        session.label,
        session.ttl,
        session.active,
        (*leases, *(key for key in taken if key not in leases)),
        session.tenant,
        session.request,
        session.digest,
    )
