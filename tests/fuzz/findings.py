"""What the fuzzers have found: inputs that broke a rule, what the others were told, and what is written of it all."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARES = {"calls": 0.8, "uploads": 0.02, "files": 0.17, "raw": 0.01}
"""Of the inputs."""
KINDS = ("crashes", "hangs", "internal", "unexplained")
"""Of broken rules: what ended or grew, what gave no answer, a bug's code, and a refusal that does not say why."""
LEAST_OK = {"calls": 0.1, "in the session": 0.04, "uploads": 0.08, "files": 0.06}
"""The part of a target's inputs that must be carried out: a run in which everything is refused at the door has tried
nothing. A good one has .17 of the calls, .1 of those in the session, .25 of the uploads and .16 of the files; of calls,
one without its session and adapters still has .1, of methods that need neither, so those that need them are counted by
themselves: without, these have none."""
IN_SESSION = (
    "CreateAdapter", "DeleteAdapter", "ForwardBackward", "Generate", "GetSession", "KeepAlive", "LoadAdapter",
    "OptimStep", "Score", "SetActiveAdapter",
)  # fmt: skip
"""Methods that are refused without a live session."""
FEWEST_JUDGED = 100
"""Inputs of a target without which that part is chance."""
OK = "OK"


def kind_of(problem: str) -> str:
    """Which rule is broken, by the first word of what is said of it."""
    kinds = {"hang": "hangs", "crash": "crashes", "unexplained": "unexplained"}
    return kinds.get(problem.partition(":")[0], "internal")


@dataclass
class Findings:
    """What happened."""

    folder: Path
    by_target: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in SHARES})
    codes: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in SHARES})
    """How inputs ended, by target."""
    methods: dict[str, Counter[str]] = field(default_factory=dict)
    """The same of calls, by method."""
    unprepared: Counter[str] = field(default_factory=Counter)
    """Why the tenant's adapter or session could not be had there."""
    health_longest: float = 0.0

    def add(self, target: str, problem: str, **replay: Any) -> None:
        """Counts a broken rule, and writes the input to a file."""
        number = self.broken()
        self.by_target[target][kind_of(problem)] += 1
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{number:03}.json"
        path.write_text(json.dumps({"target": target, "problem": problem, **replay}, indent=1))
        print(f"{target}: {problem[:200]} ({path})", flush=True)

    def ended(self, target: str, code: str, method: str = "") -> None:
        """Counts how an input ended."""
        self.codes[target][code] += 1
        if method:
            self.methods.setdefault(method.rpartition("/")[2], Counter())[code] += 1

    def total(self, kind: str) -> int:
        """Over all targets."""
        return sum(counts[kind] for counts in self.by_target.values())

    def broken(self) -> int:
        """Rules, of any kind."""
        return sum(map(self.total, KINDS))

    def refused(self) -> list[str]:
        """The targets of which too little was carried out to have tried anything, in words."""
        lines, codes = [], {**self.codes, "in the session": Counter[str]()}
        for method in IN_SESSION:
            codes["in the session"].update(self.methods.get(method, {}))
        for target, least in LEAST_OK.items():
            count = self.by_target[target]["inputs"] if target in self.by_target else codes[target].total()
            done = codes[target][OK]
            if count >= FEWEST_JUDGED and done < least * count:
                lines.append(f"{target}: {done} of {count} inputs were carried out, and {least:.0%} must be")
        return lines

    def written(self) -> dict[str, Any]:
        """For the results; `crashes` is the sum, and the other kinds beside it are parts of it."""
        return {
            "inputs": self.total("inputs"),
            "crashes": self.broken(),
            **{kind: self.total(kind) for kind in KINDS if kind != "crashes"},
            "refused": self.refused(),
            "by_target": {name: dict(found) for name, found in self.by_target.items()},
            "codes": {name: dict(found.most_common()) for name, found in self.codes.items() if found},
            "never_ok": sorted(name for name, found in self.methods.items() if not found[OK]),
            "unprepared": dict(self.unprepared.most_common(5)),
            "health_longest_seconds": round(self.health_longest, 2),
        }
