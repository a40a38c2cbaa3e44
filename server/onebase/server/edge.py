"""What the services share, put together once per server."""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from onebase.server.access import Access
from onebase.server.calls import deadline_of, queue_of
from onebase.server.catalog import Catalog
from onebase.server.codec.sequences import SequenceReader
from onebase.server.config import ServerConfig
from onebase.server.disks import Disks
from onebase.server.errors import OnebaseError, Unavailable
from onebase.server.fences import Fences
from onebase.server.idempotency import Idempotency, of_tenant
from onebase.server.leases import Clock, Session, Sessions
from onebase.server.ports import TextLike, WorkerLike
from onebase.server.quotas import Place, QuotaWorker
from onebase.server.registry import Registry
from onebase.server.room import AdapterQuotas
from onebase.server.texts import Texts
from onebase.server.volatile import Volatile

M = TypeVar("M", bound=Message)


class State(enum.Enum):
    """Whether the server takes calls."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    LOST = "lost"


@dataclass
class Gate:
    """Lets calls in while the server serves."""

    state: State = State.LOADING

    def refusal(self) -> OnebaseError | None:
        """Why no call is let in just now, or None."""
        match self.state:
            case State.SERVING:
                return None
            case State.LOADING:
                return Unavailable("LOADING", "the server still loads its adapters: try again soon", retry_after=1.0)
            case State.DRAINING:
                return Unavailable("DRAINING", "the server is stopping: go on with it when it has started again")
            case State.LOST:
                return Unavailable("WORKER_CRASHED", "the engine crashed: repeat the call", retry_after=2.0)


@dataclass(frozen=True)
class Edge:
    """The rooms behind the services."""

    worker: QuotaWorker
    config: ServerConfig
    sessions: Sessions
    registry: Registry
    access: Access
    catalog: Catalog
    texts: Texts
    reader: SequenceReader
    disks: Disks
    fences: Fences
    keeper: Volatile
    gate: Gate = field(default_factory=Gate)
    idempotency: Idempotency = field(default_factory=Idempotency)
    started: float = field(default_factory=time.monotonic)

    def check_room(self, session: Session | None) -> None:
        """Refuses a call for want of room before it is read: a flood of calls must cost the others little.

        Raises:
            ResourceExhausted: there is no room.
        """
        self.worker.check(queue_of(session))

    def place(self, session: Session | None) -> AbstractContextManager[Place]:
        """Room for a call from before it is read: what takes its job. `check_room` for calls that take long to read.

        Raises:
            ResourceExhausted: there is no room.
        """
        return self.worker.place(queue_of(session))

    async def once(
        self,
        method: str,
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
        work: Callable[[Session | None, float | None], Awaitable[M]],
    ) -> M:
        """Does what changes something, once per request_id, with its session kept alive meanwhile.

        Args:
            method: the RPC's name.
            request: has session_id and request_id.
            context: of the call.
            work: is given the session and the deadline.

        Raises:
            OnebaseError: NotFound for a session that is not there, and the work's own.
        """
        deadline = deadline_of(context)

        async def run() -> M:
            with self.sessions.use(request.session_id) as session:
                return await work(session, deadline)

        if request.session_id:
            self.sessions.get(request.session_id)
        response = await self.idempotency.run(of_tenant(method), request, run)
        await self.keeper.synced(request.session_id)  # the answer is stored by now, for who repeats the call
        return response


def build_edge(
    worker: WorkerLike,
    text: TextLike,
    config: ServerConfig,
    clock: Clock = time.monotonic,
    keeper: Volatile | None = None,
) -> Edge:
    """The rooms behind the services of one server.

    Args:
        worker: owns the device.
        text: the base's tokenizer.
        config: the server's settings.
        clock: of the sessions; monotonic, in seconds.
        keeper: of what outlives the process; None: nothing does.
    """
    tenant = config.quota_of_tenants()
    most = min(config.quota.sessions or config.limits.max_sessions, config.limits.max_sessions)
    sessions = Sessions(clock, max_sessions=most, max_per_tenant=tenant.sessions)
    registry, texts = Registry(), Texts(text)
    keeper = keeper or Volatile()
    sessions.changed, sessions.ended = keeper.session_changed, keeper.session_ended
    sessions.abandoned = keeper.abandoned
    room = QuotaWorker(worker, tenant, config.quota, limits=config.limits)
    adapters, fences = AdapterQuotas(registry, tenant, config.quota), Fences()
    return Edge(
        worker=room,
        config=config,
        sessions=sessions,
        registry=registry,
        access=Access(registry, sessions),
        catalog=Catalog(room, registry, sessions, keeper, adapters, fences),
        texts=texts,
        reader=SequenceReader(texts, worker.facts, config.limits),
        disks=Disks(config),
        fences=fences,
        keeper=keeper,
    )
