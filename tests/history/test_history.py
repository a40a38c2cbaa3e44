"""The short form of the randomized history, as a part of `make test`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from history.run import run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]
KILLS = 8


def test_a_short_history_breaks_no_promise(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    outcome = run(tmp_path, KILLS, seed, lambda _: None, lively=0.6)
    text = [line for one in outcome.violations for line in one.lines()]
    assert not text, "\n".join([f"seed {seed}", *text])
    assert outcome.record["kills"] >= KILLS
    assert 0 < outcome.record["operations"] < outcome.record["sent"]
    assert outcome.record["versions"] > 0
    assert outcome.record["numbers_compared"] > 0
