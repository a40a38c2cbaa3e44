"""The composition root: rooms are put together, adapters loaded, calls served, and all of it stopped in order.

    open the base (blocking, slow)  →  bind  →  load adapters  →  serve  →  SIGTERM  →  drain  →  cut off  →  stop

While adapters load and while it drains, the server answers UNAVAILABLE and its health is NOT_SERVING. `ending` bounds
the way from SIGTERM on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from onebase.server.audit import AuditLog
from onebase.server.checkpoints import StateDirectory, StateInUseError
from onebase.server.config import ConfigError, Security, ServerConfig, StateConfig
from onebase.server.edge import Edge, State, build_edge
from onebase.server.ending import (
    CUT_OFF,
    LAST_CHECKPOINTS_SECONDS,
    LAST_STEP_SECONDS,
    LOST_ANSWERS_SECONDS,
    Orders,
    Stopped,
    Watch,
    either,
    in_time,
    leave,
    turns,
)
from onebase.server.errors import OnebaseError
from onebase.server.guard import Guard
from onebase.server.leases import Clock
from onebase.server.listening import address_of, no_address, server_credentials, server_options, write_port
from onebase.server.loading import load
from onebase.server.opening import open_durable
from onebase.server.ports import TextLike, WorkerLike
from onebase.server.process import share_one_heap, take_turns_quickly
from onebase.server.registry import Entry
from onebase.server.restoring import Told
from onebase.server.services.adapters import AdapterService
from onebase.server.services.inference import InferenceService
from onebase.server.services.server import ServerService
from onebase.server.services.sessions import SessionService
from onebase.server.services.training import TrainingService
from onebase.server.successor import EXIT_CODE
from onebase.server.tokens import Doorman, TokenFileError
from onebase.server.volatile import Volatile
from onebase.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

log = logging.getLogger(__name__)

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (adapters_pb2, "AdapterService"),
        (inference_pb2, "InferenceService"),
        (server_pb2, "ServerService"),
        (sessions_pb2, "SessionService"),
        (training_pb2, "TrainingService"),
    )
)
_CHATTY = ("bitsandbytes",)  # warns of kernels that it would use for 4-bit bases on a CPU
_LAST_ANSWERS_SECONDS = 5.0  # for answers on their way out when all work has ended


@dataclass(frozen=True)
class Parts:
    """What stands behind the edge."""

    worker: WorkerLike
    text: TextLike
    keeper: Volatile = field(default_factory=Volatile)
    """Of what outlives the process."""


@dataclass(frozen=True)
class Report:
    """Whom to tell how far the server has come."""

    adapter: Callable[[Entry, float], None] = lambda _entry, _seconds: None
    """An adapter is there; seconds that it took."""
    restored: Callable[[Entry, float], None] = lambda _entry, _seconds: None
    """An adapter of the state directory is there again; seconds that it took."""
    damaged: Callable[[str, OnebaseError], None] = lambda _name, _error: None
    """An adapter of the state directory cannot be read."""
    ready: Callable[[int], None] = lambda _port: None
    """Calls are served on this port."""
    draining: Callable[[], None] = lambda: None
    """The server was told to stop, and finishes the work in flight."""
    lost: Callable[[str, int], NoReturn] = lambda _ticket, _port: os._exit(EXIT_CODE)
    """The engine crashed, logged under a ticket, and everybody was answered; the port. Ends the process."""
    cut_off: Callable[[int], NoReturn] = leave
    """The server was told to stop and could not end as it should. Ends the process with this code."""


def make_roots(config: ServerConfig) -> None:
    """Makes the roots that are not there yet.

    Raises:
        ConfigError: one of them cannot be made.
    """
    for root in config.roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"root is {str(root)!r}: it cannot be made: {error.strerror}") from error


def open_parts(config: ServerConfig) -> Parts:
    """Opens the base model and puts a worker in front of it. Blocking and slow; the only way to torch from here.

    Raises:
        OnebaseError: the base cannot be opened or is not supported.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from onebase.server.engine import open_engine
    from onebase.server.worker import Worker

    make_roots(config)
    directory = _open_state(config.state)  # before the base, which takes long
    share_one_heap()
    take_turns_quickly()
    engine = open_engine(config.engine)
    worker = Worker(engine, config.limits, config.engine.budget(engine.facts.device))
    if directory is None or config.state is None:
        return Parts(worker, engine.text)
    return Parts(worker, engine.text, open_durable(worker, directory, config.state))


def _open_state(config: StateConfig | None) -> StateDirectory | None:
    if config is None:
        return None
    try:
        return StateDirectory(config.path, config.checkpoints)
    except StateInUseError as error:
        raise ConfigError(f"state is {str(config.path)!r}: {error}") from error
    except OSError as error:
        raise ConfigError(f"state is {str(config.path)!r}: it cannot be made: {error.strerror}") from error


class Server:
    """The RPC edge around one worker.

    Args:
        parts: the worker, not started yet, and the tokenizer.
        config: the server's settings.
        clock: of the sessions; monotonic, in seconds.
    """

    def __init__(self, parts: Parts, config: ServerConfig, clock: Clock = time.monotonic) -> None:
        self._config = config
        self._worker = parts.worker
        self.edge: Edge = build_edge(parts.worker, parts.text, config, clock, parts.keeper)
        self._health = health.aio.HealthServicer()
        doorman, self._audit = _open_doors(config.security)
        self._admit = doorman.admit
        guard = Guard(self.edge.gate.refusal, self._admit, self._audit, config.security.stream_idle_seconds)
        self._server = grpc.aio.server(interceptors=(guard,), options=server_options(config.limits))
        self._register()
        self._watch = Watch(parts.worker, config.stall_restart_seconds)
        self._watching: asyncio.Task[None] | None = None
        self._stuck = False
        self.port = 0
        self.lost = self._watch.lost
        """Set when the engine crashed."""

    async def start(self) -> int:
        """Binds, and answers UNAVAILABLE from now on; returns the port.

        Raises:
            ConfigError: the address cannot be had.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = address_of(self._config.host, self._config.port)
        try:
            credentials = server_credentials(self._config.security)
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:  # gRPC says no more than that it failed
            raise no_address(address, "cannot be bound") from None
        await self._server.start()
        self._worker.start()
        self._watching = asyncio.create_task(self._watch.run(self._sweep, self._show))
        self.port = port
        return port

    async def load(self, report: Report) -> None:
        """Takes up what the state directory holds, loads the adapters that the settings name, then serves.

        Raises:
            ConfigError: the settings and the state do not fit together.
            OnebaseError: one of them cannot be loaded.
        """
        await load(self.edge, self._config, report.adapter, Told(report.restored, report.damaged))
        self.edge.gate.state = State.SERVING
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    @property
    def exit_code(self) -> int:
        """What the process ends with when this server has stopped."""
        return self._watch.exit_code

    async def stop(self, drain_seconds: float, orders: Orders | None = None) -> None:
        """Refuses new calls, lets work in flight finish for up to so long, then ends everything.

        Args:
            drain_seconds: for work in flight.
            orders: who is told to stop at once gives up whatever has not ended yet.
        """
        ending = asyncio.ensure_future(self._stop(drain_seconds))
        await either((orders or Orders()).at_once.wait(), asyncio.wait((ending,)))
        if not ending.done():
            log.warning("told to stop again: work in flight is given up, and the server ends at once")
            self._watch.give_up("the server was told to stop again")
            self._watch.gave_up = True
            await asyncio.wait((ending,), timeout=LOST_ANSWERS_SECONDS)
        if ending.done():
            ending.result()

    async def _stop(self, drain_seconds: float) -> None:
        self.edge.gate.state = State.DRAINING
        self.edge.sessions.dismiss()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.to_thread(self._worker.drain, drain_seconds)
        self._watch.end(min(self._config.stall_seconds, max(drain_seconds, LAST_STEP_SECONDS)))
        await asyncio.to_thread(self._worker.cut_off)
        await turns()  # a step that was made just now is known to the keeper before it makes the last checkpoints
        if not await in_time(self.edge.keeper.close(), LAST_CHECKPOINTS_SECONDS):
            self._watch.give_up(f"the last checkpoints took more than {LAST_CHECKPOINTS_SECONDS:g} s")
        crashed = self._worker.lost()
        await asyncio.to_thread(self._worker.stop, 0.0)
        if self._worker.lost() and not crashed:
            self._watch.gave_up = True
        await self._server.stop(_LAST_ANSWERS_SECONDS)
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self.edge.disks.close)
        self.edge.texts.close()
        self._audit.close()

    async def give_up(self) -> None:
        """After a crash: lets the answers out, refuses new calls, and writes nothing more.

        gRPC's server is not stopped: it would tell who calls now CANCELLED, which no client repeats.
        """
        self.edge.gate.state = State.LOST
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(LOST_ANSWERS_SECONDS)

    def _register(self) -> None:
        server, edge = self._server, self.edge
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(edge), server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(edge), server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(ServerService(edge), server)
        sessions_pb2_grpc.add_SessionServiceServicer_to_server(SessionService(edge, self._admit), server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingService(edge), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

    async def _set_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)

    def _sweep(self) -> None:
        self.edge.sessions.sweep()
        self.edge.keeper.tick()

    async def _show(self, seconds: float) -> None:
        """Health says so while the engine makes no progress."""
        stuck = seconds > self._config.stall_seconds
        if stuck == self._stuck or self.edge.gate.state is not State.SERVING:
            return
        self._stuck = stuck
        if stuck:
            log.error("a step of the engine goes on for %.0f s: health is NOT_SERVING until it ends", seconds)
        response = health_pb2.HealthCheckResponse
        await self._set_health(response.NOT_SERVING if stuck else response.SERVING)


@contextlib.asynccontextmanager
async def running(
    parts: Parts,
    config: ServerConfig,
    report: Report,
    clock: Clock = time.monotonic,
    orders: Orders | None = None,
) -> AsyncIterator[Server]:
    """A server that serves inside the block and is drained after it.

    Raises:
        Stopped: it was told to stop while it loaded.
        ConfigError: the address cannot be had.
        OnebaseError: an adapter cannot be loaded.
    """
    server, orders = Server(parts, config, clock), orders or Orders()
    try:
        port = await server.start()
        await orders.unless_stopped(server.load(report))
        write_port(config.port_file, port)
    except BaseException:
        await server.stop(0.0, orders)
        raise
    report.ready(port)
    try:
        yield server
    finally:
        report.draining()
        await server.stop(config.drain_seconds, orders)


async def serve(parts: Parts, config: ServerConfig, report: Report) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns; after a crash of the engine it does not return.

    Nor does it where something did not end in time, or the server was told to stop again.

    Raises:
        ConfigError: the address cannot be had.
        OnebaseError: an adapter cannot be loaded.
    """
    orders = Orders()
    orders.listen()
    try:
        async with running(parts, config, report, orders=orders) as server:
            await either(orders.stopping.wait(), server.lost.wait())
            if not orders.stopping.is_set():
                await server.give_up()
                if not await orders.last_word():
                    report.lost(parts.worker.lost(), server.port)
    except Stopped:
        if orders.at_once.is_set() or parts.worker.lost():
            report.cut_off(CUT_OFF)
        return
    except OnebaseError:
        if (ticket := parts.worker.lost()) and not await orders.last_word():  # while it was loading
            report.lost(ticket, config.port)
        raise
    if server.exit_code:
        report.cut_off(server.exit_code)


def _open_doors(security: Security) -> tuple[Doorman, AuditLog]:
    """Raises ConfigError for a file that cannot be used."""
    try:
        return Doorman(security.tokens), AuditLog(security.audit_log)
    except TokenFileError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"audit_log is {str(security.audit_log)!r}: {error.strerror}") from None
