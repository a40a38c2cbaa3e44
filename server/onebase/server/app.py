"""The composition root: rooms are put together, adapters loaded, calls served, and all of it stopped in order.

    open the base (blocking, slow)  →  bind  →  load adapters  →  serve  →  SIGTERM  →  drain  →  stop

While adapters load and while it drains, the server answers UNAVAILABLE and its health is NOT_SERVING.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from onebase.server.audit import AuditLog
from onebase.server.catalog import LoadedAdapter, NewAdapter
from onebase.server.checkpoints import StateDirectory, StateInUseError
from onebase.server.config import AdapterSource, ConfigError, Limits, Security, ServerConfig, StateConfig
from onebase.server.durability import Durable
from onebase.server.edge import Edge, State, build_edge
from onebase.server.errors import OnebaseError
from onebase.server.guard import Guard
from onebase.server.jobs import AdapterKind, LoraSpec
from onebase.server.leases import Clock
from onebase.server.opening import open_durable
from onebase.server.ports import TextLike, WorkerLike
from onebase.server.process import share_one_heap, take_turns_quickly
from onebase.server.registry import Entry
from onebase.server.restoring import Rooms, Told, check_trained, restore
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
_SWEEP_SECONDS = 1.0
_CHATTY = ("bitsandbytes",)  # warns of kernels that it would use for 4-bit bases on a CPU
_LAST_ANSWERS_SECONDS = 5.0  # for answers on their way out when all work has ended
_LOST_ANSWERS_SECONDS = 1.0  # and when the engine crashed, so that nobody waits for more than the restart


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
        self._sweeper: asyncio.Task[None] | None = None
        self._stuck = False
        self.port = 0
        self.lost = asyncio.Event()
        """Set when the engine crashed."""

    async def start(self) -> int:
        """Binds, and answers UNAVAILABLE from now on; returns the port.

        Raises:
            ConfigError: the address cannot be had.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = _address(self._config.host, self._config.port)
        try:
            credentials = server_credentials(self._config.security)
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:  # gRPC says no more than that it failed
            raise _no_address(address, "cannot be bound") from None
        await self._server.start()
        self._worker.start()
        self._sweeper = asyncio.create_task(self._sweep())
        self.port = port
        return port

    async def load(self, report: Report) -> None:
        """Takes up what the state directory holds, loads the adapters that the settings name, then serves.

        Raises:
            ConfigError: the settings and the state do not fit together.
            OnebaseError: one of them cannot be loaded.
        """
        config, edge = self._config, self.edge
        try:
            await asyncio.to_thread(edge.disks.sweep)
        except OSError as error:
            raise ConfigError(f"temporary directory is {error.filename!r}: {error.strerror}") from error
        if isinstance(edge.keeper, Durable):
            edge.keeper.residency.told = edge.registry.update
            rooms = Rooms(edge.worker, edge.registry, edge.sessions, edge.idempotency)
            frozen = [(source.name, AdapterKind.REWARD) for source in config.rewards]
            frozen += [(source.name, AdapterKind.REFERENCE) for source in config.references]
            await restore(edge.keeper, rooms, Told(report.restored, report.damaged), frozen=frozen)
        for kind, sources in (
            (AdapterKind.REWARD, config.rewards),
            (AdapterKind.REFERENCE, config.references),
            (AdapterKind.CRITIC, config.critics),
            (AdapterKind.POLICY, config.policies),
        ):
            for source in sources:
                if kind.trained and self._is_there(source.name, kind):
                    continue
                began = time.monotonic()
                entry = await self._load_one(kind, source)
                report.adapter(entry, time.monotonic() - began)
        self.edge.gate.state = State.SERVING
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, drain_seconds: float) -> None:
        """Refuses new calls, lets work in flight finish for up to so long, then ends everything."""
        self.edge.gate.state = State.DRAINING
        self.edge.sessions.dismiss()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.to_thread(self._worker.drain, drain_seconds)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.edge.keeper.close()
        await asyncio.to_thread(self._worker.stop, 0.0)
        await self._server.stop(_LAST_ANSWERS_SECONDS)
        await asyncio.to_thread(self.edge.disks.close)
        self.edge.texts.close()
        self._audit.close()

    async def give_up(self) -> None:
        """After a crash: lets the answers out, refuses new calls, and writes nothing more.

        gRPC's server is not stopped: it would tell who calls now CANCELLED, which no client repeats.
        """
        self.edge.gate.state = State.LOST
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await asyncio.sleep(_LOST_ANSWERS_SECONDS)

    def _is_there(self, name: str, kind: AdapterKind) -> bool:
        """Whether the state directory has this adapter: it goes on from there."""
        registry = self.edge.registry
        check_trained(registry.find(name), name, kind)
        return registry.find(name) is not None or registry.damaged(name)

    async def _load_one(self, kind: AdapterKind, source: AdapterSource) -> Entry:
        catalog = self.edge.catalog
        if source.path is None:
            lora = LoraSpec(rank=self._config.policy_rank, alpha=self._config.policy_alpha)
            return await catalog.create(NewAdapter(source.name, lora, value_head=True, kind=kind), None)
        loaded = LoadedAdapter(
            source.name,
            kind,
            source.path.expanduser().resolve(),  # the operator's own paths need no root
            value_head=kind.trained,
            append_eos=source.append_eos,
            pooling=source.pooling,
            kept=kind.trained,
        )
        return await catalog.load(loaded, None)

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

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                self.edge.sessions.sweep()
                self.edge.keeper.tick()
            except Exception:  # whatever it is, a crash must still be noticed
                log.exception("sessions could not be swept")
            await self._watch()

    async def _watch(self) -> None:
        """Health says so while the engine makes no progress."""
        seconds, limit = self._worker.stuck_seconds(), self._config.stall_restart_seconds
        if limit and seconds > limit:
            self._worker.abandon(f"a step went on for {seconds:.0f} s")
        if self._worker.lost():
            self.lost.set()
            return
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
    parts: Parts, config: ServerConfig, report: Report, clock: Clock = time.monotonic
) -> AsyncIterator[Server]:
    """A server that serves inside the block and is drained after it.

    Raises:
        ConfigError: the address cannot be had.
        OnebaseError: an adapter cannot be loaded.
    """
    server = Server(parts, config, clock)
    try:
        port = await server.start()
        await server.load(report)
        _write_port(config.port_file, port)
    except BaseException:
        await server.stop(drain_seconds=0.0)
        raise
    report.ready(port)
    try:
        yield server
    finally:
        report.draining()
        await server.stop(config.drain_seconds)


async def serve(parts: Parts, config: ServerConfig, report: Report) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns; after a crash of the engine it does not return.

    Raises:
        ConfigError: the address cannot be had.
        OnebaseError: an adapter cannot be loaded.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        async with running(parts, config, report) as server:
            await _either(stopping, server.lost)
            if server.lost.is_set():
                await server.give_up()
                report.lost(parts.worker.lost(), server.port)
    except OnebaseError:
        if ticket := parts.worker.lost():  # while it was loading
            report.lost(ticket, config.port)
        raise


async def _either(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def check_address(config: ServerConfig) -> None:
    """Fails at once, before a model is opened for minutes, where the port is taken already.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise _no_address(_address(config.host, config.port), error.strerror or str(error)) from None


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """gRPC's settings: sizes of messages and headers, dead peers noticed within 8 s, and a taken port an error."""
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.keepalive_time_ms", 5_000),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.http2.ping_timeout_ms", 3_000),  # without it a frozen client is noticed after a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ping this often
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 8 * 2**10),  # over it, calls may be refused, and over twice that they all are
        ("grpc.absolute_max_metadata_size", 16 * 2**10),
        # Of one connection. What is over the queue's limits is refused in our words; what is far beyond by gRPC.
        ("grpc.max_concurrent_streams", 4 * limits.max_queued_requests + 1000),
        ("grpc.server_handshake_timeout_ms", 20_000),
    ]


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """What the server shows to its clients, and wants to see of them; None is plain text.

    Raises:
        ConfigError: a file cannot be read.
    """
    if security.tls_cert is None or security.tls_key is None:
        return None
    try:
        pair = (security.tls_key.read_bytes(), security.tls_cert.read_bytes())
        clients = security.tls_client_ca.read_bytes() if security.tls_client_ca else None
    except OSError as error:
        raise ConfigError(f"{error.filename!r} cannot be read: {error.strerror}") from None
    return grpc.ssl_server_credentials([pair], clients, require_client_auth=clients is not None)


def _open_doors(security: Security) -> tuple[Doorman, AuditLog]:
    """Raises ConfigError for a file that cannot be used."""
    try:
        return Doorman(security.tokens), AuditLog(security.audit_log)
    except TokenFileError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"audit_log is {str(security.audit_log)!r}: {error.strerror}") from None


def _no_address(address: str, why: str) -> ConfigError:
    return ConfigError(f"address is {address!r}: {why}; give another --port, or 0 for any free one")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write_port(path: Path | None, port: int) -> None:
    """Writes the port whole or not at all: somebody may be waiting for the file."""
    if path is not None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(f"{port}\n")
        partial.replace(path)
