"""The randomized history: `make history`, or `python -m history.run` from `tests`.

Eight clients, a server that is killed again and again, and afterwards every answered operation against a model and a
replay. Writes tests/history/results.json; `--seed` draws the same operations and kills again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks import SERVER_MODULES, Forked, ForkServer, fork_server
from history import checks, journal, model
from history.audit import audit
from history.calls import Stubs
from history.chaos import CLIENTS, Chaos, tell
from history.model import Violation
from history.replay import Replayer
from oracle.fixtures import FIXTURES

RESULTS = Path(__file__).parent / "results.json"
Say = Callable[[str], None]
MODULES = (*SERVER_MODULES, "history.client")


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    record: dict[str, Any]
    violations: list[Violation]


def run(folder: Path, kills: int, seed: int, say: Say, lively: float = 1.0) -> Outcome:
    """Makes a history in a directory and checks it.

    Args:
        folder: takes the state, the journals and the logs.
        kills: so many times the server is killed.
        seed: of the operations and the kills.
        say: is told how far it is.
        lively: how long the server's lives are; 1 is some two seconds.
    """
    with fork_server(MODULES, folder / "forks.log") as forks:
        _learn(forks, folder / "learned")
        chaos = Chaos(forks, folder / "run", seed)
        chaos.run(kills, lambda now: say(tell(now)), lively)
        with chaos.serving() as address:
            audit(folder / "run", address, chaos.tokens, chaos.epoch)
        return examine(forks, folder, seed, say)


def examine(forks: ForkServer, folder: Path, seed: int, say: Say) -> Outcome:
    """Checks the history that lies in a directory."""
    began = time.monotonic()
    history = journal.gather(folder / "run")
    found = model.build(history)
    violations = [*checks.check(found), *_bugs(folder / "run" / "server.log")]
    say(f"{len(history.ops)} operations were sent, {len(violations)} violations before the replay")
    with _undisturbed(forks, folder) as server:
        replayer = Replayer(Stubs(server.address), folder / "run")
        violations += replayer.check(found, lambda done, of: None if done % 50 else say(f"replay {done} of {of}"))
    epochs = history.epochs.values()
    ends = Counter(epoch.how for epoch in epochs)
    made = max(epoch.ended for epoch in epochs) - min(epoch.began for epoch in epochs)
    record = {
        "kills": sum(count for how, count in ends.items() if how != "sigterm"),
        "operations": sum(op.ok is not None for op in history.ops),
        "sent": len(history.ops),
        "violations": len(violations),
        "seed": seed,
        "seconds": round(made + time.monotonic() - began, 1),
        "seconds_of_history": round(made, 1),
        "ends": dict(sorted(ends.items())),
        "lives_of_clients": len({op.id.rpartition(".")[0] for op in history.ops if op.client < CLIENTS}),
        "unknown": sum(op.unknown for op in history.ops),
        "adapters": len({created for _, created, _ in model.times_of_making(history)}),
        "versions": sum(len(life.origins) for life in found.all()),
        "numbers_compared": replayer.compared,
        "ways_tried_again": replayer.retried,
    }
    return Outcome(record, violations)


def _bugs(log: Path) -> list[Violation]:
    """What the servers logged as bugs of their own."""
    count = log.read_text(encoding="utf-8", errors="replace").count("Traceback (most recent call last)")
    return [Violation("a bug in the log", f"{count} tracebacks in {log}")] if count else []


def _learn(forks: ForkServer, folder: Path) -> None:
    """Has the fork server import what a server imports on its way."""
    chaos = Chaos(forks, folder, 0)

    def until(child: Forked) -> None:
        port = folder / "port-0"
        while not (port.exists() and port.read_text().strip()):
            if child.poll() is not None:
                raise RuntimeError((folder / "learned.log").read_text())
            time.sleep(0.02)

    forks.learn(chaos.argv(0), folder, until)


class _undisturbed:
    """A server without a state, for the time of a block."""

    def __init__(self, forks: ForkServer, folder: Path) -> None:
        port = folder / "replay-port"
        argv = [
            "onebase", "serve", str(FIXTURES / "base"), "--port", "0", "--port-file", str(port), "--threads", "1",
            "--root", str(folder / "run" / "root"), "--kv-slots", "8", "--reward", f"reward={FIXTURES / 'reward'}",
        ]  # fmt: skip
        self._process = forks.start(argv, folder / "replay.log")
        while not (port.exists() and port.read_text().strip()):
            if self._process.poll() is not None:
                raise RuntimeError((folder / "replay.log").read_text())
            time.sleep(0.02)
        self.address = f"127.0.0.1:{port.read_text().strip()}"

    def __enter__(self) -> _undisturbed:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(10)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="so many times the server is killed")
    parser.add_argument("--seed", type=int, default=None, help="of operations and kills; drawn if not given")
    parser.add_argument("--lively", type=float, default=0.7, help="how long the server's lives are; 1 is two seconds")
    parser.add_argument("--keep", type=Path, default=None, help="keep journals and logs in this directory, a new one")
    parser.add_argument("--check", type=Path, default=None, help="make nothing: check the run that was kept here")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result is written")
    chosen = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if chosen.seed is None else chosen.seed
    folder = chosen.check or chosen.keep or Path(tempfile.mkdtemp(prefix="onebase-history-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, in {folder}", flush=True)
    outcome = _outcome(folder, seed, chosen)
    text = [line for violation in outcome.violations for line in violation.lines()]
    (folder / "violations.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(*text[:200], sep="\n")
    print(json.dumps(outcome.record, indent=1))
    chosen.out.write_text(json.dumps(outcome.record, indent=1) + "\n", encoding="utf-8")
    if outcome.violations:
        sys.exit(f"{len(outcome.violations)} violations; journals, logs and all of them are in {folder}")
    if chosen.keep is None and chosen.check is None:
        shutil.rmtree(folder)


def _outcome(folder: Path, seed: int, chosen: argparse.Namespace) -> Outcome:
    def say(line: str) -> None:
        print(line, flush=True)

    if chosen.check is None:
        return run(folder, chosen.kills, seed, say, chosen.lively)
    (folder / "replay-port").unlink(missing_ok=True)
    with fork_server(MODULES, folder / "forks.log") as forks:
        return examine(forks, folder, seed, say)


if __name__ == "__main__":
    main()
