"""The clients of `load.py`, many in one process: plain stubs over grpc.aio, which cost the machine little.

    python load_clients.py SETTINGS.json

Each call is a line in the settings' `out`: [when it ended, tenant, method, seconds, tokens, refusals, error]. One that
is still open when nobody waits any more (PATIENCE after the end; of a flood, the end of its window) is a line too, with
the time until then and UNFINISHED. Times are CLOCK_MONOTONIC's, which all processes share. A refusal that says when to
come again (RESOURCE_EXHAUSTED with RetryInfo) is obeyed, and its wait is part of the call's seconds; everything else
that is no answer is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TextIO

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

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
    types_pb2,
)

DECK = {
    "Generate": 20, "Generate, streamed": 12, "Logprob": 15, "ReferenceLogprob": 9, "Score": 9, "Reward": 12,
    "train": 10, "GetAdapter": 4, "ListAdapters": 3, "GetStatus": 3, "KeepAlive": 1, "adapter": 1, "session": 1,
}  # fmt: skip
"""How often each operation comes among a hundred; `train` is ForwardBackward and OptimStep, `adapter` is CreateAdapter
and DeleteAdapter, `session` is OpenSession and CloseSession."""
DEADLINE = 60.0
PATIENCE = 30.0
"""Seconds after the end in which what was begun before may still be answered."""
REFUSED, UNFINISHED = "refused", "unfinished"
"""What is recorded as the error of a call that was refused and not tried again, and of one that nobody waited for."""
NEW_TOKENS = 12
VOCABULARY = range(5, 110)
BASE = "base"


@dataclass(frozen=True)
class Settings:
    """What a process of clients is told.

    Attributes:
        address: the server's.
        tokens: each tenant's bearer token.
        clients: of each tenant.
        sessions: tenants whose clients have a session each; the other tenants' clients share one.
        think: mean seconds between an answer and the next call.
        begin: when to begin, and `end` when to end.
        pauses: (tenant, from, until): meanwhile this tenant's clients are silent.
        flood: (from, until): meanwhile `rate` calls a second are sent, whatever comes of them; then these are no
            closed-loop clients.
        rate: of the flood.
    """

    address: str
    tokens: dict[str, str]
    clients: int
    sessions: list[str]
    think: float
    begin: float
    end: float
    out: str
    seed: int
    pauses: list[tuple[str, float, float]] = field(default_factory=list)
    flood: list[tuple[float, float]] = field(default_factory=list)
    rate: float = 0.0


class Refused(Exception):
    """The server says when to come again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"refused for {seconds} s")
        self.seconds = seconds


def retry_after(error: grpc.RpcError) -> float | None:
    """What RetryInfo says, in seconds, of a RESOURCE_EXHAUSTED; None without one."""
    status = rpc_status.from_call(error) if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            info = error_details_pb2.RetryInfo()
            detail.Unpack(info)
            return info.retry_delay.ToMilliseconds() / 1000
    return None


@dataclass
class Client:
    """One client: a connection, a session and a policy of its own."""

    tenant: str
    token: str
    number: int
    channel: grpc.aio.Channel
    random: Random
    record: Callable[[str, str, float, int, int, str], None]
    session: str = ""

    def __post_init__(self) -> None:
        self.policy = f"p{self.number}"
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)
        self._deck: list[str] = []

    async def open(self, session: str = "") -> str:
        """Makes its policy, in a session of its own if none is given; the session."""
        if not session:
            opened = await self._send(self.sessions.OpenSession, sessions_pb2.OpenSessionRequest(ttl_seconds=3600))
            session = opened.session_id
        self.session = session
        lora = {"rank": 4, "alpha": 8, "target_modules": ["all-linear"]}
        create = adapters_pb2.CreateAdapterRequest(session_id=session, name=self.policy, lora=lora, value_head=True)
        await self._send(self.adapters.CreateAdapter, create)
        return session

    def draw(self) -> str:
        """The next operation: each deck has all of them as often as it should."""
        if not self._deck:
            self._deck = [name for name, count in DECK.items() for _ in range(count)]
            self.random.shuffle(self._deck)
        return self._deck.pop()

    async def act(self, operation: str, *, obey: bool = True) -> None:
        """Does an operation's calls, one after the other, and records them; of a flood, which obeys nothing, one."""
        for name, tokens, method, request in self._calls(operation):
            began, refusals, error = time.monotonic(), 0, UNFINISHED
            try:
                while error == UNFINISHED:
                    try:
                        await self._send(method, request)
                        error = ""
                    except Refused as refused:
                        refusals += 1
                        if obey:
                            await asyncio.sleep(refused.seconds)
                        else:
                            error = REFUSED
                    except grpc.RpcError as failed:
                        error = f"{failed.code().name}: {failed.details()}"
            finally:  # also where it is cut off: what was held back to the end must not be lost
                self.record(self.tenant, name, time.monotonic() - began, 0 if error else tokens, refusals, error)
            if error or not obey:
                return

    async def _send(self, method: Any, request: Any) -> Any:
        """Calls, and reads all that comes.

        Raises:
            Refused: the server says when to come again.
            grpc.RpcError: all other errors.
        """
        call = method(request, timeout=DEADLINE, metadata=(("authorization", f"Bearer {self.token}"),))
        try:
            if hasattr(call, "__aiter__"):
                return [one async for one in call]
            return await call
        except grpc.RpcError as error:
            seconds = retry_after(error)
            if seconds is None:
                raise
            raise Refused(seconds) from error

    def _calls(self, operation: str) -> Iterator[tuple[str, int, Any, Any]]:
        """Each call of an operation: its name, the tokens that it is served, the stub's method and the request."""
        session, policy = self.session, self.policy
        match operation:
            case "Generate" | "Generate, streamed":
                prompts = [self._tokens(8, 20)]
                request = inference_pb2.GenerateRequest(
                    session_id=session,
                    adapter=policy,
                    prompts=prompts,
                    sampling={"max_new_tokens": NEW_TOKENS, "n": 2, "ignore_eos": True},
                    return_logprobs=True,
                    stream_tokens=operation != "Generate",
                )
                yield operation, _length(prompts[0]) + 2 * NEW_TOKENS, self.inference.Generate, request
            case "Logprob":
                rows, tokens = self._sequences(4)
                request = inference_pb2.LogprobRequest(session_id=session, adapter=policy, sequences=rows)
                yield operation, tokens, self.inference.Logprob, request
            case "ReferenceLogprob":
                rows, tokens = self._sequences(4)
                request = inference_pb2.ReferenceLogprobRequest(session_id=session, sequences=rows)
                yield operation, tokens, self.inference.ReferenceLogprob, request
            case "Score":
                rows, tokens = self._sequences(4)
                request = inference_pb2.ScoreRequest(
                    session_id=session, ppo_adapter_name=policy, rewards=[{"adapter": "r"}], sequences=rows
                )
                yield operation, 3 * tokens, self.inference.Score, request
            case "Reward":
                rows, tokens = self._sequences(1)
                request = inference_pb2.RewardRequest(session_id=session, rewards=[{"adapter": "r"}], sequences=rows)
                yield operation, tokens, self.inference.Reward, request
            case "train":
                yield from self._training()
            case "GetAdapter":
                yield operation, 0, self.adapters.GetAdapter, adapters_pb2.GetAdapterRequest(name=policy)
            case "ListAdapters":
                yield operation, 0, self.adapters.ListAdapters, adapters_pb2.ListAdaptersRequest()
            case "GetStatus":
                yield operation, 0, self.server.GetStatus, server_pb2.GetStatusRequest()
            case "KeepAlive":
                yield operation, 0, self.sessions.KeepAlive, sessions_pb2.KeepAliveRequest(session_id=session)
            case "adapter":
                name = f"t{self.number}"
                create = adapters_pb2.CreateAdapterRequest(session_id=session, name=name, lora={"rank": 4, "alpha": 8})
                create.lora.target_modules.append("all-linear")
                yield "CreateAdapter", 0, self.adapters.CreateAdapter, create
                delete = adapters_pb2.DeleteAdapterRequest(session_id=session, name=name)
                yield "DeleteAdapter", 0, self.adapters.DeleteAdapter, delete
            case "session":
                opened: list[Any] = []

                async def open_session(request: Any, **keywords: Any) -> Any:
                    opened.append(await self.sessions.OpenSession(request, **keywords))

                yield "OpenSession", 0, open_session, sessions_pb2.OpenSessionRequest()
                close = sessions_pb2.CloseSessionRequest(session_id=opened[0].session_id)
                yield "CloseSession", 0, self.sessions.CloseSession, close
            case _:
                raise ValueError(f"no operation {operation!r}")

    def _training(self) -> Iterator[tuple[str, int, Any, Any]]:
        rows, tokens = self._sequences(4)
        sequences = []
        for row in rows:
            count = _length(row.completion)
            numbers = [self._floats(count, scale) for scale in (0.0, 0.0, 1.0, 0.1)]
            old_logprobs, old_values, advantages, returns = numbers
            sequences.append(
                training_pb2.TrainingSequence(
                    sequence=row,
                    old_logprobs=old_logprobs,
                    old_values=old_values,
                    advantages=advantages,
                    returns=returns,
                )
            )
        common = {"session_id": self.session, "adapter": self.policy}
        request_id = f"{self.tenant}-{self.number}-{self.random.getrandbits(64):x}"
        request = training_pb2.ForwardBackwardRequest(**common, request_id=request_id, sequences=sequences)
        request.ppo.SetInParent()
        yield "ForwardBackward", tokens, self.training.ForwardBackward, request
        step = training_pb2.OptimStepRequest(**common, request_id=request_id, adamw={"learning_rate": 1e-4})
        step.max_grad_norm = 1.0
        yield "OptimStep", 0, self.training.OptimStep, step

    def _sequences(self, count: int) -> tuple[list[Any], int]:
        rows = [types_pb2.Sequence(prompt=self._tokens(6, 18), completion=self._tokens(6, 18)) for _ in range(count)]
        return rows, sum(_length(row.prompt) + _length(row.completion) for row in rows)

    def _tokens(self, least: int, most: int) -> Any:
        ids = np.array(self.random.choices(VOCABULARY, k=self.random.randint(least, most)), dtype="<i4")
        tensor = types_pb2.Tensor(dtype=types_pb2.DTYPE_INT32, shape=ids.shape, data=ids.tobytes())
        return types_pb2.Content(tokens=tensor)

    def _floats(self, count: int, scale: float) -> Any:
        data = np.array([self.random.gauss(0, scale) for _ in range(count)], dtype="<f4")
        return types_pb2.Tensor(dtype=types_pb2.DTYPE_FLOAT32, shape=data.shape, data=data.tobytes())


def _length(content: Any) -> int:
    length: int = content.tokens.shape[0]
    return length


async def closed_loop(client: Client, settings: Settings) -> None:
    """Calls, thinks, calls, until the end; silent in its tenant's pauses."""
    while (now := time.monotonic()) < settings.end:
        silent = [until for tenant, begin, until in settings.pauses if tenant == client.tenant and begin <= now < until]
        if silent:
            await asyncio.sleep(max(silent) - now)
            continue
        await client.act(client.draw())
        await asyncio.sleep(client.random.expovariate(1 / settings.think))


async def open_loop(clients: list[Client], settings: Settings) -> None:
    """Sends `rate` operations a second in the windows of the flood, and obeys nothing."""
    under_way: set[asyncio.Task[None]] = set()
    for begin, until in settings.flood:
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        sent = 0
        while (now := time.monotonic()) < until:
            while sent < (now - begin) * settings.rate:
                client = clients[sent % len(clients)]
                operation = client.draw()
                if operation in ("adapter", "session"):  # whose second call undoes the first
                    operation = "GetStatus"
                task = asyncio.create_task(client.act(operation, obey=False))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                sent += 1
            await asyncio.sleep(0.01)
        for task in list(under_way):
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def run(settings: Settings, out: TextIO) -> None:
    """All clients of this process."""

    def record(tenant: str, name: str, seconds: float, tokens: int, refusals: int, error: str) -> None:
        line = [round(time.monotonic(), 4), tenant, name, round(seconds, 5), tokens, refusals, error]
        out.write(json.dumps(line) + "\n")

    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for tenant, token in settings.tokens.items():
            session = ""
            for number in range(settings.clients):
                options = [("grpc.use_local_subchannel_pool", 1)]
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(settings.address, options=options))
                name = number + (100 if settings.flood else 0)
                random = Random(f"{settings.seed}/{tenant}/{name}")
                client = Client(tenant, token, name, channel, random, record)
                session = await client.open("" if tenant in settings.sessions else session)
                clients.append(client)
        await asyncio.sleep(max(0.0, settings.begin - time.monotonic()))
        if settings.flood:
            await open_loop(clients, settings)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.end + PATIENCE - time.monotonic()):
                    await asyncio.gather(*(closed_loop(client, settings) for client in clients))


def main() -> None:
    """As the file of settings says."""
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with Path(settings.out).open("w", encoding="utf-8", buffering=1) as out:
        asyncio.run(run(settings, out))


if __name__ == "__main__":
    main()
