"""Makes every fault, the random history and the fuzzers, and writes what they found.

    python -m faults.run                  all of it, as `make faults` does
    python -m faults.run --kills 20 --inputs 1000 --times 1
    python -m faults.run --only faults    that part anew; the others stay as they were found
    python -m faults.run --page           the page anew, from the results that are there

Runs with `PYTHONPATH=tests`. The history and the fuzzers go side by side, a core each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from faults import report
from faults.rows import ROWS

SHOWN = ("tests/faults", "tests/restarts", "tests/server", "tests/engine/test_worker.py")
"""Where tests are that show faults."""
PARTS = ("faults", "history", "fuzz")
PACKAGES = ("grpcio", "protobuf", "torch", "transformers", "safetensors")


COMMANDS = {"history": ["-m", "history.run", "--kills"], "fuzz": ["-m", "fuzz.run", "--inputs"]}
NOTHING = {
    "history": {"kills": 0, "sent": 0, "operations": 0, "violations": -1},
    "fuzz": {"inputs": 0, "crashes": -1},
}
"""What a part has found that wrote nothing."""


def environment() -> dict[str, str]:
    """What a part of the suite runs in: all of its long form, on the tests' path."""
    path = [str(report.ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "ONEBASE_FAULTS": "all"}


def begin(name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a part of the suite."""
    print(f"{datetime.now():%H:%M:%S} {name}: {' '.join(command)}", flush=True)
    return subprocess.Popen([sys.executable, *command], cwd=report.ROOT, env=environment())


def result(path: Path, code: int, wanted: dict[str, int]) -> dict[str, Any]:
    """What a part has written; a part that did not end well has written nothing to go by.

    Args:
        path: of its JSON.
        code: its exit code.
        wanted: what it was asked for.
    """
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {**found, **wanted, "exit_code": code}


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package).partition('+')[0]}"


def commit() -> str:
    """What is tried."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=report.ROOT, capture_output=True, text=True
    ).stdout.strip()
    return found or "unknown"


def machine() -> dict[str, Any]:
    """Where and with what this runs."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)]),
    }


def faults(folder: Path, times: int, processes: int) -> dict[str, Any]:
    """Makes the faults; returns what came of the rows, of the trainings that were killed, and of the tests."""
    path = folder / "faults.json"
    flags = ("--faults-only", "--fault-results", str(path), "--fault-times", str(times))
    workers = ("-n", str(processes), "--dist", "loadscope")
    code = begin("faults", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *SHOWN, *flags, *workers]).wait()
    counted = json.loads(path.read_text(encoding="utf-8"))
    rows = {str(row): report.fault(row, counted["faults"][str(row)]) for row in ROWS}
    skipped = sorted({test for row in rows.values() for test in row["skipped"]})
    tests = {"exit_code": code, "skipped": skipped}
    return {"faults": rows, "training": counted["training"], "tests": tests}


def main() -> int:
    """Runs the suite; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="run each test so often, if it is quick")
    parser.add_argument("--kills", type=int, default=200, help="kills of the history")
    parser.add_argument("--seed", type=int, default=None, help="of the history and the fuzzers; the date by default")
    parser.add_argument("--inputs", type=int, default=100_000, help="of the fuzzers")
    parser.add_argument("--processes", type=int, default=2, help="for the faults")
    parser.add_argument("--only", action="append", choices=PARTS, help="run this part alone (may be repeated)")
    parser.add_argument("--page", action="store_true", help="only write the page, from the results that are there")
    asked = parser.parse_args()
    if asked.page:
        report.write(report.read())
        return 0
    began, seed = time.monotonic(), asked.seed or int(f"{datetime.now(UTC):%Y%m%d}")
    chosen = asked.only or PARTS
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "faults" in chosen:
            results.update(faults(folder, asked.times, asked.processes))
        wanted = {"history": ("kills", asked.kills), "fuzz": ("inputs", asked.inputs)}
        parts = {
            part: begin(part, [*COMMANDS[part], str(wanted[part][1]), "--seed", str(seed), "--out", f"{folder}/{part}"])
            for part in COMMANDS
            if part in chosen
        }
        for part, process in parts.items():
            found = result(folder / part, process.wait(), {"wanted": wanted[part][1]})
            results[part] = {**NOTHING[part], "seed": seed, **found}
    record = dict(report.read()) if asked.only else {}  # read only now: another part may have been made meanwhile
    before = record.get("run", {})  # a part alone says nothing of how long all of it takes
    commits = {**before.get("commits", {}), **dict.fromkeys(chosen, commit())}
    results["run"] = {"seconds": round(time.monotonic() - began), **before, **machine(), "commits": commits}
    results = {**record, **results}
    report.write(results)
    for line in (lines := report.wrong(results)):
        print(line)
    print(f"{report.RECORD.relative_to(report.ROOT)} and {report.PAGE.relative_to(report.ROOT)} are written")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
