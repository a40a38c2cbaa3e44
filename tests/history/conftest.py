"""What the checker's own tests begin with."""

from __future__ import annotations

import pytest
from history.world import World


@pytest.fixture
def world() -> World:
    """Two tenants with an adapter each of one name, trained and read."""
    world = World()
    for tenant, seed in (("red", 1), ("blue", 2)):
        world.do("create", "p", tenant=tenant, session=tenant, rank=2, seed=seed)
        for rows in (1, 2):
            world.train("p", rows, tenant=tenant, session=tenant)
            world.do("logprob", "p", tenant=tenant, rows=[0])
        world.do("get", "p", tenant=tenant)
    return world
