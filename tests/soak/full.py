"""A state whose bounded tables are full before its server starts, as after weeks.

While they fill, memory grows as it should: half an hour of four tenants' answers is less than their bounds hold. So
a run would judge that growth in the place of a leak. Here each new answer pushes an old one out from the beginning.
The answers of passes are in memory alone: `Load.fill` has the server give them.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from onebase.server.store import MAX_ENDS, MAX_RESPONSES, Store
from onebase.v1 import training_pb2

ANSWER_BYTES = 165
"""The mean of what the trainers of `load` are answered: with larger ones here, memory would shrink during the run, and
hide a leak; with smaller ones it would grow."""


def fill(state: Path, tenants: Sequence[str]) -> None:
    """Makes the store of a state that is not there yet, with as many answers and ends of each tenant as it keeps."""
    state.mkdir(mode=0o700, parents=True)
    path = state / "registry.sqlite"
    Store(path).close()
    answer = training_pb2.OptimStepResponse(gradients_applied=1)
    answer.adapter.name = "t" * (ANSWER_BYTES - answer.ByteSize() - 6)  # what tags and lengths take
    response = answer.SerializeToString()
    answers, ends = [], []
    for tenant in tenants:
        for _ in range(MAX_RESPONSES):
            session, request = secrets.token_hex(16), secrets.token_hex(8)
            answers.append((session, f"{tenant}/OptimStep", request, secrets.token_bytes(32), response))
        ends += [(f"{tenant}/t{secrets.token_hex(6)}", tenant, 8) for _ in range(MAX_ENDS)]
    with closing(sqlite3.connect(path)) as db, db:
        columns = "session, method, request, digest, response"
        db.executemany(f"INSERT INTO responses ({columns}) VALUES (?, ?, ?, ?, ?)", answers)
        db.executemany("INSERT INTO ends (name, owner, least_version) VALUES (?, ?, ?)", ends)
