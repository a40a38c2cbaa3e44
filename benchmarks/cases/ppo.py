"""Whole PPO iterations: our server and trainers against TRL 0.11.4, which runs one policy in a process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import Bench
from measure import Figure, NotMeasured, exactly, over, status_bytes
from models import model_dir, prompts_file, reward_dir
from serving import Iteration, Peer, RunningServer, served

POLICIES = 4
MODEL, DTYPE = "39.9m", "float32"
BATCH, MINI, EPOCHS, PROMPT, NEW = 8, 4, 4, 32, 32
RANK, TARGETS = 8, ("q_proj", "v_proj")
REWARD = "judge"
PROMPTS = 256


@dataclass(frozen=True)
class Arena:
    """A server with a reward adapter, and four trainers that wait between their iterations."""

    server: RunningServer
    trainers: Sequence[Peer]

    def iterate(self, policies: int) -> Side:
        """One iteration of so many policies at once: the CPU time of server and trainers together."""
        before = self.server.cpu_seconds()
        for trainer in self.trainers[:policies]:
            trainer.go()
        done = [trainer.result() for trainer in self.trainers[:policies]]
        server = self.server.cpu_seconds() - before
        return Side(server + sum(one.cpu for one in done), max(one.wall for one in done), server)


@dataclass(frozen=True)
class Side:
    """One round of one side."""

    cpu: float
    wall: float
    server_cpu: float


@dataclass
class Race:
    """Rounds of all sides, run in turn, and the peaks of memory after them."""

    one: list[Side] = field(default_factory=list)
    four: list[Side] = field(default_factory=list)
    trl: list[list[Iteration]] = field(default_factory=list)  # four iterations, one after another
    server_peak: int = 0
    our_peak: int = 0
    trl_peak: int = 0


def iteration_over_trl_1(bench: Bench) -> Figure:
    """One TRL 0.11.4 process over our server and one trainer: a PPO iteration of 8 × (32+32) tokens, 39.9M fp32.

    Mini-batches of 4, 4 epochs, LoRA of rank 8 on q_proj and v_proj on both sides.
    """
    race = bench.once(_race, bench)
    theirs = [sum(one.cpu for one in four) / POLICIES for four in race.trl]
    detail = {
        "ours_seconds": race.one[-1].cpu,
        "of_which_server": race.one[-1].server_cpu,
        "trl_seconds": theirs[-1],
        "wall": sum(one.wall for one in race.trl[-1]) / POLICIES / race.one[-1].wall,
    }
    return over(theirs, [side.cpu for side in race.one], detail)


def iterations_over_trl_4(bench: Bench) -> Figure:
    """Four TRL 0.11.4 iterations one after another over our four policies at once: the same work and model.

    CPU time of all processes. TRL's processes are loaded and warm already.
    """
    race = bench.once(_race, bench)
    theirs = [sum(one.cpu for one in four) for four in race.trl]
    detail = {
        "ours_seconds": race.four[-1].cpu,
        "of_which_server": race.four[-1].server_cpu,
        "trl_seconds": theirs[-1],
        "wall": sum(one.wall for one in race.trl[-1]) / race.four[-1].wall,
    }
    return over(theirs, [side.cpu for side in race.four], detail)


def memory_over_trl_4(bench: Bench) -> Figure:
    """Peak resident memory of our server and four trainer processes over four TRL processes: 39.9M fp32."""
    race = bench.once(_race, bench)
    trl = POLICIES * race.trl_peak
    detail = {"server_bytes": float(race.server_peak), "our_bytes": float(race.our_peak), "trl_bytes": float(trl)}
    return exactly(race.our_peak / trl, 1, detail)


def open_arena(bench: Bench) -> Arena:
    """Starts the server and the trainers; they end with the benchmark."""
    judge = f"{REWARD}={_reward()}"
    server = bench.closing.enter_context(served(model_dir(MODEL, DTYPE), "--reward", judge))
    folder = bench.closing.enter_context(tempfile.TemporaryDirectory())
    trainers = []
    for index in range(1, POLICIES + 1):
        ours = ["--server", server.address, "--policy", f"policy_{index}", "--output", str(Path(folder, str(index)))]
        trainer = Peer(sys.executable, "onebase_ppo.py", [*ours, "--reward", REWARD, *_work(index)])
        bench.closing.callback(trainer.close)
        trainers.append(trainer)
    arena = Arena(server, trainers)
    arena.iterate(POLICIES)  # warm
    return arena


def _race(bench: Bench) -> Race:
    if not bench.trl_python.exists():
        raise NotMeasured(f"there is no environment with TRL 0.11.4 at {bench.trl_python}: `make bench-peers` makes it")
    arena = bench.once(open_arena, bench)
    given = ["--base", str(model_dir(MODEL, DTYPE)), "--reward", str(_reward()), *_work(1)]
    trl = Peer(bench.trl_python, "trl_ppo.py", given)
    race = Race()
    try:
        trl.iterate()  # warm
        for _ in range(bench.rounds):
            race.trl.append([trl.iterate() for _ in range(POLICIES)])
            race.one.append(arena.iterate(1))
            race.four.append(arena.iterate(POLICIES))
        race.trl_peak = trl.peak_bytes()
    finally:
        trl.close()
    race.server_peak = status_bytes("VmHWM", arena.server.pid)
    race.our_peak = race.server_peak + sum(one.peak_bytes() for one in arena.trainers)
    return race


def _reward() -> Path:
    return reward_dir(MODEL, DTYPE, RANK, TARGETS)


def _work(seed: int) -> list[str]:
    numbers = {"batch": BATCH, "mini": MINI, "epochs": EPOCHS, "new": NEW, "rank": RANK, "seed": seed}
    flags = [text for name, number in numbers.items() for text in (f"--{name}", str(number))]
    return [*flags, "--prompts", str(prompts_file(PROMPTS, PROMPT)), "--targets", *TARGETS]
