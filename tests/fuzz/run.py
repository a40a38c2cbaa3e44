"""Fuzzes a real server and the code that reads adapters: `make fuzz`, or `python -m fuzz.run` from `tests`.

    python -m fuzz.run --inputs 100000 --seed 7 --out fuzz.json
    python -m fuzz.run --replay fuzz.failures/000.json

Four targets: calls of every method (`calls`), adapters that are uploaded (`uploads`), adapters read by the engine's
code in a process of its own (`files`), and bytes that are no calls (`raw`). An input is drawn from the seed, its target
and its number. Nothing may crash, hang (a call its deadline, health a second), be answered with a bug's code, or be
refused without a reason (ErrorInfo). The server's memory is bounded, and the numbers that it gives are the same, bit
for bit, before and after. A part of each target's inputs must be carried out (`findings.LEAST_OK`), or nothing was
tried. Each input that breaks a rule is written to a file that --replay sends again.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import grpc
from faults.test_bytes import upload
from fuzz import calls, raw, reading
from fuzz.files import Files
from fuzz.findings import OK, SHARES, Findings
from fuzz.reader import Reading
from fuzz.served import Server, Watch, own_files, probe, served

ENDS = ("/CloseSession", "/DeleteAdapter", "/LoadAdapter", "/UploadAdapter")
"""Methods that may take away the session or the adapter that valid requests name."""
AT_ONCE = {"calls": 24, "uploads": 4, "raw": 16}
GROWTH = 512 * 2**20
"""Bytes that the server may have more at the end than at the beginning."""


# ------------------------------------------------------------------------------------------------ the targets


async def run_calls(server: Server, seed: int, count: int, findings: Findings, _wholes: list[Files]) -> None:
    """Calls of every method."""
    async with _channels(server) as channels:

        async def one(number: int) -> None:
            valid = calls.valid_requests(server.session)
            call = calls.draw(Random(f"{seed}/calls/{number}"), server.session, server.spare, valid, server.token)
            told = await calls.send(channels[number % len(channels)], call)
            findings.ended("calls", told.code, call.method)
            if told.code == OK and call.method.endswith(ENDS):  # all that comes after would meet nothing
                findings.unprepared.update(await asyncio.to_thread(server.prepare))
            if told.problem is not None:
                findings.add("calls", told.problem, number=number, seed=seed, **_written(server, call))

        for first in range(0, count, 500):
            findings.unprepared.update(await asyncio.to_thread(server.prepare))
            await _at_once("calls", server, range(first, min(count, first + 500)), one, findings)
            if first % 10_000 == 0:
                print(f"calls: at {first}", flush=True)


async def run_uploads(server: Server, seed: int, count: int, findings: Findings, wholes: list[Files]) -> None:
    """Spoiled adapters, sent as they should be."""
    async with _channels(server) as channels:

        async def one(number: int) -> None:
            _, files = reading.drawn(seed, 10**9 + number, wholes)
            messages = tuple(one.SerializeToString() for one in upload(f"u{number % 8}", files))
            call = calls.Call("/onebase.v1.AdapterService/UploadAdapter", messages, True, False, server.token)
            told = await calls.send(channels[number % len(channels)], call)
            findings.ended("uploads", told.code)
            if told.problem is not None:
                findings.add("uploads", told.problem, number=number, seed=seed, **_written(server, call))

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


def _written(server: Server, call: calls.Call) -> dict[str, Any]:
    kept = {**asdict(call), "messages": [base64.b64encode(one).decode() for one in call.messages]}
    kept["session"] = server.session  # a replay has another, of the same length
    kept["token"] = "the fuzzing tenant's" if call.token.startswith("ob_") and len(call.token) > 40 else call.token
    return kept


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
    seconds = round(time.monotonic() - began, 1)
    return {**findings.written(), "seconds": seconds, "seed": seed, "memory_growth_mib": grown}


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
        sessions = (kept.get("session", "").encode() or b"\0no session", server.session.encode())
        messages = tuple(base64.b64decode(one).replace(*sessions) for one in kept["messages"])
        call = calls.Call(kept["method"], messages, kept["client_streaming"], kept["server_streaming"], token)

        async def send() -> calls.Told:
            async with grpc.aio.insecure_channel(server.running.address) as channel:
                return await calls.send(channel, call)

        problem = asyncio.run(send()).problem
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
    sys.exit(1 if found["crashes"] or found["refused"] else 0)


if __name__ == "__main__":
    main()
