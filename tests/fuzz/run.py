"""Fuzzes a real server and the code that reads adapters: `make fuzz`, or `python -m fuzz.run` from `tests`.

    python -m fuzz.run --inputs 100000 --seed 7 --out fuzz.json
    python -m fuzz.run --replay fuzz.failures/000.json

Four targets: calls of every method (`calls`), adapters that are uploaded (`uploads`), adapters read by the engine's
code in a process of its own (`files`), and bytes that are no calls (`raw`). An input is drawn from the seed, its target
and its number. Nothing may crash, hang (a call its deadline, health a second), or be answered with a bug's code; the
server's memory is bounded, and the numbers that it gives are the same, bit for bit, before and after. Each input that
breaks a rule is written to a file that --replay sends again.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
from faults.test_bytes import upload
from fuzz import calls, raw, reading
from fuzz.files import Files
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oracle.fixtures import FIXTURES
from server.harness import pair
from server.tenants import Client
from support import RunningServer, environment, start_server

from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile
from onebase.v1 import adapters_pb2, inference_pb2, sessions_pb2, training_pb2

SHARES = {"calls": 0.8, "uploads": 0.02, "files": 0.17, "raw": 0.01}
"""Of the inputs."""
AT_ONCE = {"calls": 24, "uploads": 4, "raw": 16}
HEALTH_SECONDS = 1.0
"""In which health answers, where nobody else wants the cores."""
GROWTH = 512 * 2**20
"""Bytes that the server, or the process that reads files, may have more at the end than at the beginning."""
READING_SECONDS, WAITING_SECONDS = 20.0, 180.0
"""A file that takes longer hangs: of the processor's time, and in all."""
FLAGS = ("--threads", "1", "--kv-slots", "4", "--stream-idle-seconds", "5", "--drain-seconds", "1")
TENANT = "adapter_bytes=64M,adapters=64"


@dataclass
class Findings:
    """What happened."""

    folder: Path
    by_target: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in SHARES})
    health_longest: float = 0.0

    def add(self, target: str, problem: str, **replay: Any) -> None:
        """Counts a broken rule, and writes the input to a file."""
        kind = "hangs" if problem.startswith("hang") else "crashes" if problem.startswith("crash") else "internal"
        self.by_target[target][kind] += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        number = sum(self.total(kind) for kind in ("hangs", "crashes", "internal")) - 1
        path = self.folder / f"{number:03}.json"
        path.write_text(json.dumps({"target": target, "problem": problem, **replay}, indent=1))
        print(f"{target}: {problem[:200]} ({path})", flush=True)

    def total(self, kind: str) -> int:
        """Over all targets."""
        return sum(counts[kind] for counts in self.by_target.values())


# ------------------------------------------------------------------------------------------------ the server


@dataclass
class Server:
    """A server, and those who call it."""

    running: RunningServer
    token: str
    channel: grpc.Channel
    session: str = ""

    @property
    def fuzzer(self) -> Client:
        """A plain client of the fuzzing tenant."""
        return Client(self.channel, self.token)

    def prepare(self) -> None:
        """Has the tenant's adapter and session there, whatever was done to them."""
        fuzzer = self.fuzzer
        with contextlib.suppress(grpc.RpcError):
            fuzzer.adapters.CreateAdapter(adapters_pb2.CreateAdapterRequest(name="x", value_head=True), timeout=60)
        with contextlib.suppress(grpc.RpcError):
            fuzzer.sessions.KeepAlive(sessions_pb2.KeepAliveRequest(session_id=self.session), timeout=60)
            return
        with contextlib.suppress(grpc.RpcError):
            opened = fuzzer.sessions.OpenSession(sessions_pb2.OpenSessionRequest(ttl_seconds=600), timeout=60)
            self.session = opened.session_id

    def rss(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.running.process.pid).memory_info().rss)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server of its own, with a tenant that may do everything."""
    root = Path(shutil.copytree(FIXTURES, folder / "root"))
    tokens = TokenFile(folder / "tokens.json")
    token = tokens.add("fuzz", tuple(Scope), (), None)
    places = ("--root", str(root), "--tokens", str(folder / "tokens.json"), "--tenant-quota", TENANT)
    adapters = ("--policy", f"p={root / 'policy'}", "--reward", f"r={root / 'reward'}")
    with start_server(root / "base", *adapters, *places, *FLAGS, wait=400) as running:
        channel = grpc.insecure_channel(running.address)
        server = Server(running, token, channel)
        server.prepare()
        yield server
        channel.close()


def probe(server: Server) -> bytes:
    """Numbers that nobody may change: the operator's policy, its reward, and the base."""
    inference, sequences = server.fuzzer.inference, [pair((5, 6, 7, 8), (9, 10, 11)), pair("w5 w6", "w7")]
    answers: list[Any] = [
        inference.Logprob(inference_pb2.LogprobRequest(adapter=name, sequences=sequences, return_entropy=True))
        for name in ("p", "base")
    ]
    answers.append(inference.Reward(inference_pb2.RewardRequest(rewards=[{"adapter": "r"}], sequences=sequences)))
    return b"".join(answer.SerializeToString(deterministic=True) for answer in answers)


def own_files(server: Server) -> list[Files]:
    """Whole adapters: as PEFT wrote them, and as the server sends one that was trained."""
    fuzzer = server.fuzzer
    row = training_pb2.ForwardBackwardRequest.FromString(calls.valid_requests(server.session)["ForwardBackward"][0])
    fuzzer.training.ForwardBackward(row)
    step = training_pb2.OptimStepRequest(session_id=server.session, adapter="x", adamw={"learning_rate": 1e-3})
    fuzzer.training.OptimStep(step)
    parts = list(fuzzer.adapters.DownloadAdapter(adapters_pb2.DownloadAdapterRequest(name="x", with_optimizer=True)))
    data, files, begin = b"".join(part.data for part in parts), {}, 0
    for one in parts[0].header.files:
        files[one.name], begin = data[begin : begin + one.bytes], begin + one.bytes
    peft = [
        {file.name: file.read_bytes() for file in (FIXTURES / name).iterdir()}
        for name in ("policy", "policy_all", "reward")
    ]
    tokenizer = {name: (FIXTURES / "base" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    return [*peft, {**peft[0], **tokenizer}, files, files, files]


class Watch(threading.Thread):
    """Asks for the server's health all the time."""

    def __init__(self, server: Server, findings: Findings) -> None:
        super().__init__(daemon=True)
        self._server, self._findings, self._stop_it = server, findings, threading.Event()

    def run(self) -> None:
        """Until it is stopped."""
        with grpc.insecure_channel(self._server.running.address) as channel:
            stub, missed = health_pb2_grpc.HealthStub(channel), 0
            while not self._stop_it.wait(0.25):
                began = time.monotonic()
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                    fine = answer.status == health_pb2.HealthCheckResponse.SERVING
                except grpc.RpcError:
                    fine = False
                took = time.monotonic() - began
                self._findings.health_longest = max(self._findings.health_longest, took)
                crowd = os.getloadavg()[0] / (os.cpu_count() or 1)  # programs that want a core, for each core
                missed = 0 if fine and took <= HEALTH_SECONDS * max(1.0, crowd) else missed + 1
                if missed == 2:  # once may be this machine's other work
                    self._findings.add("calls", f"hang: health took {took:.1f} s, or was not SERVING")

    def stop(self) -> None:
        """Ends it."""
        self._stop_it.set()
        self.join()


# ------------------------------------------------------------------------------------------------ the targets


async def run_calls(server: Server, seed: int, count: int, findings: Findings, _wholes: list[Files]) -> None:
    """Calls of every method."""
    async with _channels(server) as channels:

        async def one(number: int) -> None:
            call = calls.draw(Random(f"{seed}/calls/{number}"), server.session, valid, server.token)
            problem = await calls.send(channels[number % len(channels)], call)
            if problem is not None:
                findings.add("calls", problem, number=number, seed=seed, **_written(call))

        for first in range(0, count, 500):
            await asyncio.to_thread(server.prepare)
            valid = calls.valid_requests(server.session)
            await _at_once("calls", server, range(first, min(count, first + 500)), one, findings)
            if first % 10_000 == 0:
                print(f"calls: at {first}", flush=True)


async def run_uploads(server: Server, seed: int, count: int, findings: Findings, wholes: list[Files]) -> None:
    """Spoiled adapters, sent as they should be."""
    async with _channels(server) as channels:

        async def one(number: int) -> None:
            random, files = reading.drawn(seed, 10**9 + number, wholes)
            messages = tuple(one.SerializeToString() for one in upload(random.choice(["u", "x"]), files))
            call = calls.Call("/onebase.v1.AdapterService/UploadAdapter", messages, True, False, server.token)
            problem = await calls.send(channels[number % len(channels)], call)
            if problem is not None:
                findings.add("uploads", problem, number=number, seed=seed, **_written(call))

        await _at_once("uploads", server, range(count), one, findings)


async def run_raw(server: Server, seed: int, count: int, findings: Findings, _wholes: list[Files]) -> None:
    """Connections that are none of gRPC's."""

    async def one(number: int) -> None:
        try:
            async with asyncio.timeout(10):
                await raw.throw(server.running.address, Random(f"{seed}/raw/{number}"))
        except TimeoutError:
            findings.add("raw", "hang: the port took no connection or no bytes in 10 s", number=number, seed=seed)

    await _at_once("raw", server, range(count), one, findings)


async def _at_once(
    target: str, server: Server, numbers: range, one: Callable[[int], Awaitable[None]], findings: Findings
) -> None:
    """Sends these inputs, several at a time, while the server lives."""
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            if server.running.process.poll() is not None:
                return
            await one(number)
            findings.by_target[target]["inputs"] += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE[target])))
    if server.running.process.poll() is not None:
        raise ServerDied(f"crash: the server ended with {server.running.process.poll()} at one of {numbers}")


class ServerDied(Exception):
    """The server is gone."""


@contextlib.asynccontextmanager
async def _channels(server: Server) -> AsyncIterator[list[grpc.aio.Channel]]:
    async with contextlib.AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(server.running.address, options=options) for _ in range(4)]
        yield [await stack.enter_async_context(channel) for channel in channels]


def _written(call: calls.Call) -> dict[str, Any]:
    kept = {**asdict(call), "messages": [base64.b64encode(one).decode() for one in call.messages]}
    kept["token"] = "the fuzzing tenant's" if call.token.startswith("ob_") and len(call.token) > 40 else call.token
    return kept


class Reading(threading.Thread):
    """Has files read in a process of its own, which is watched."""

    def __init__(self, folder: Path, seed: int, count: int, findings: Findings, wholes: list[Files]) -> None:
        super().__init__(daemon=True)
        self._folder, self._seed, self._count, self._findings = folder, seed, count, findings
        self._progress = folder / "progress"
        for number, files in enumerate(wholes):
            place = folder / "wholes" / str(number)
            place.mkdir(parents=True)
            for name, data in files.items():
                (place / name).write_bytes(data)

    def run(self) -> None:
        """Reads all of them, beginning again behind one that ends the process."""
        first = 0
        while first < self._count:
            self._progress.write_text("")
            first = self._read(first)

    def again(self, number: int) -> None:
        """Reads one of them."""
        self._read(number)

    def _read(self, first: int) -> int:
        """Reads from here on; the number behind the last one that was read."""
        told = self._folder / "told"
        arguments = {"seed": self._seed, "first": first, "count": self._count - first}
        places = {"wholes": self._folder / "wholes", "progress": self._progress, "place": self._folder / "place"}
        command = [sys.executable, "-m", "fuzz.reading"]
        command += [word for key, value in {**arguments, **places}.items() for word in (f"--{key}", str(value))]
        with told.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, env=environment())
            problem = self._watch(process, first)
        for line in told.read_text().splitlines():
            if line.startswith("{"):
                self._findings.add("files", seed=self._seed, **json.loads(line))
        now = self._now(first)
        if problem is None and process.returncode:
            problem = f"crash: the process that reads files ended with {process.returncode}"
        if problem is not None:
            self._findings.add("files", problem, number=now, seed=self._seed)
            now += 1
        self._findings.by_target["files"]["inputs"] += now - first
        return now

    def _now(self, first: int) -> int:
        text = self._progress.read_text()
        return int(text) if text else first

    def _watch(self, process: subprocess.Popen[bytes], first: int) -> str | None:
        """Waits for the process to end, or ends it; what was wrong with it."""
        watched, base, last, worked, since = psutil.Process(process.pid), 0, -1, 0.0, time.monotonic()
        problem = None
        while process.poll() is None and problem is None:
            time.sleep(0.5)
            now = self._now(first) if self._progress.read_text() else -1
            with contextlib.suppress(psutil.Error):
                held, times = watched.memory_info().rss, watched.cpu_times()
                base = base or (held if now > first + 200 else 0)
                if base and held > base + GROWTH:
                    problem = f"crash: the process that reads files grew from {base >> 20} to {held >> 20} MiB"
                if now != last:
                    last, worked, since = now, times.user + times.system, time.monotonic()
                long = now >= 0 and times.user + times.system - worked > READING_SECONDS
                if long or time.monotonic() - since > WAITING_SECONDS:
                    problem = f"hang: a file was read for {time.monotonic() - since:.0f} s"
        if problem is not None:
            process.kill()
        process.wait()
        return problem


# ------------------------------------------------------------------------------------------------ all of it


def run(inputs: int, seed: int, out: Path) -> dict[str, Any]:
    """Fuzzes, and returns what is written."""
    began, findings = time.monotonic(), Findings(out.with_suffix(".failures"))
    shutil.rmtree(findings.folder, ignore_errors=True)
    counts = {name: round(inputs * share) for name, share in SHARES.items()}
    counts["calls"] += inputs - sum(counts.values())
    with tempfile.TemporaryDirectory() as here, served(Path(here)) as server:
        wholes, before = own_files(server), probe(server)
        reader = Reading(Path(here, "reading"), seed, counts["files"], findings, wholes)
        watch = Watch(server, findings)
        watch.start()
        reader.start()
        asyncio.run(_warm(server, seed))
        held = server.rss()
        try:
            for name, run_target in (("raw", run_raw), ("uploads", run_uploads), ("calls", run_calls)):
                asyncio.run(run_target(server, seed, counts[name], findings, wholes))
                print(f"{name}: done after {time.monotonic() - began:.0f} s", flush=True)
            reader.join()
        except ServerDied as error:
            findings.add("calls", str(error), seed=seed, log=server.running.text()[-4000:])
        watch.stop()
        grown = _after(server, before, held, findings, seed)
    return {
        "inputs": findings.total("inputs"),
        "crashes": findings.total("crashes"),
        "hangs": findings.total("hangs"),
        "internal": findings.total("internal"),
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "by_target": {name: dict(found) for name, found in findings.by_target.items()},
        "health_longest_seconds": round(findings.health_longest, 2),
        "memory_growth_mib": grown,
    }


async def _warm(server: Server, seed: int) -> None:
    """Some inputs of another seed, so that memory is compared between two servers that are warm."""
    await run_calls(server, -1 - seed, 500, Findings(Path(tempfile.mkdtemp())), [])


def _after(server: Server, before: bytes, held: int, findings: Findings, seed: int) -> float | None:
    """What must hold of the server when all is over: it lives, small, right, and without a bug in its log."""
    if server.running.process.poll() is not None:
        return None
    if probe(server) != before:
        findings.add("calls", "crash: the server gives other numbers than before", seed=seed)
    grown = server.rss() - held
    if grown > GROWTH:
        findings.add("calls", f"crash: the server grew by {grown >> 20} MiB", seed=seed)
    log = server.running.text()
    if "Traceback" in log and not findings.total("internal"):
        findings.add("calls", "a bug in the server's log that no client saw", seed=seed, log=log[-8000:])
    if findings.by_target["calls"]["internal"] + findings.by_target["uploads"]["internal"]:
        (findings.folder / "server.log").write_text(log)
    return round(grown / 2**20, 1)


def replay(path: Path) -> str | None:
    """Sends the input of a file again, to a server of its own; what is wrong with it, if anything is."""
    kept = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as here, served(Path(here)) as server:
        if kept["target"] == "files":
            wholes = own_files(server)
            findings = Findings(Path(here, "failures"))
            reader = Reading(Path(here, "reading"), kept["seed"], kept["number"] + 1, findings, wholes)
            reader.again(kept["number"])
            return "\n".join(file.read_text() for file in sorted(findings.folder.glob("*.json"))) or None
        token = server.token if kept["token"].startswith("the ") else kept["token"]
        messages = tuple(base64.b64decode(one) for one in kept["messages"])
        call = calls.Call(kept["method"], messages, kept["client_streaming"], kept["server_streaming"], token)

        async def send() -> str | None:
            async with grpc.aio.insecure_channel(server.running.address) as channel:
                return await calls.send(channel, call)

        problem = asyncio.run(send())
        return None if problem is None else f"{problem}\n{server.running.text()[-8000:]}"


def main() -> None:
    """As the command line says; the exit code is 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--replay", type=Path)
    asked = parser.parse_args()
    if asked.replay is not None:
        problem = replay(asked.replay)
        print(problem or "nothing is wrong with it now")
        sys.exit(1 if problem else 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server goes too
    found = run(asked.inputs, asked.seed, asked.out)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["crashes"] or found["hangs"] or found["internal"] else 0)


if __name__ == "__main__":
    main()
