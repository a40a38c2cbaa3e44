"""What is a tenant's is its own after a restart too: adapters, versions, sessions and answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from restarts.conftest import Start

from onebase.client import LoraSpec, NotFoundError, connect
from onebase.server.identity import Scope
from onebase.server.tokens import TokenFile

pytestmark = pytest.mark.e2e


@pytest.mark.fault(26, times=2)
def test_tenants_go_on_apart(start: Start, tmp_path: Path, seen: Callable[..., None]) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    red, blue = (tokens.add(tenant, tuple(Scope), (), None) for tenant in ("red", "blue"))
    flags = ("--tokens", str(tmp_path / "tokens.json"))
    with start(*flags) as server, connect(server.address, token=red) as client:
        session = client.open_session(label="before")
        made = session.create_adapter("mine", LoraSpec(rank=4), value_head=True)
        session.set_active("mine")
        session.create_adapter("hidden", LoraSpec(rank=4))
        with connect(server.address, token=blue) as other:
            other.create_adapter("mine", LoraSpec(rank=8))
        server.process.kill()
        server.process.wait()
        with start(*flags) as again:
            with connect(again.address, token=red) as mine, mine.open_session(resume=session.id) as same:
                assert (mine.adapter("mine").lora.rank, mine.adapter("mine").create_time) == (4, made.create_time)
                assert (same.id, same.ppo_adapter_name, mine.adapter("mine").leased) == (session.id, "mine", True)
            with connect(again.address, token=blue) as other:
                assert other.adapter("mine").lora.rank == 8
                with other.open_session(resume=session.id) as theirs:  # which means nothing to another tenant
                    assert theirs.id != session.id
                assert [one.name for one in other.adapters("policy")] == ["mine"]
                with pytest.raises(NotFoundError) as hidden:
                    other.generate("w5", adapter="hidden")
                seen("NOT_FOUND", hidden.value.reason)
