"""How long a person waits for a reward while others generate and train."""

from __future__ import annotations

import statistics
import threading
import time

from bench import Bench
from cases.ppo import NEW, POLICIES, PROMPT, REWARD, Arena, open_arena
from measure import Figure, over
from models import random_ids

from onebase.client import Client, connect
from onebase.client import types as t

IDLE_REQUESTS = 20
PAUSE_SECONDS = 0.05
"""Between a person's requests."""


def loaded_over_idle(bench: Bench) -> Figure:
    """p50 of one reward request while four policies generate and train, over p50 on an idle server: 39.9M fp32.

    Wall time; 32+32 tokens; the load is an iteration of four PPO trainers. Rounds of idle and loaded take turns.
    """
    arena = bench.once(open_arena, bench)
    idle, loaded, slowest = [], [], 0.0
    with connect(arena.server.address) as client:
        _waits(client, threading.Event(), IDLE_REQUESTS)  # warm
        for _ in range(bench.rounds):
            idle.append(statistics.median(_waits(client, threading.Event(), IDLE_REQUESTS)))
            done = threading.Event()
            load = threading.Thread(target=_load, args=(arena, done))
            load.start()
            time.sleep(PAUSE_SECONDS)
            waits = _waits(client, done)
            load.join()
            loaded.append(statistics.median(waits))
            slowest = max(slowest, *waits)
    detail = {
        "idle_p50_seconds": statistics.median(idle),
        "loaded_p50_seconds": statistics.median(loaded),
        "slowest_seconds": slowest,
    }
    return over(loaded, idle, detail)


def _load(arena: Arena, done: threading.Event) -> None:
    try:
        arena.iterate(POLICIES)
    finally:
        done.set()


def _waits(client: Client, done: threading.Event, most: int = 10**6) -> list[float]:
    """Seconds that each of a person's requests took: at least one, until `done` or so many."""
    ids = random_ids(1, PROMPT + NEW, seed=3)[0].numpy()
    sequence = t.Sequence(ids[:PROMPT], ids[PROMPT:])
    waits: list[float] = []
    while not waits or (len(waits) < most and not done.is_set()):
        began = time.perf_counter()
        client.reward(sequence, REWARD)
        waits.append(time.perf_counter() - began)
        time.sleep(PAUSE_SECONDS)
    return waits
