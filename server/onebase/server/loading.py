"""What is there from the start: the adapters of the state directory, and those that the settings name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from onebase.server.catalog import LoadedAdapter, NewAdapter
from onebase.server.config import AdapterSource, ConfigError, ServerConfig
from onebase.server.durability import Durable
from onebase.server.edge import Edge
from onebase.server.jobs import AdapterKind, LoraSpec
from onebase.server.registry import Entry
from onebase.server.restoring import Rooms, Told, check_trained, restore


async def load(edge: Edge, config: ServerConfig, there: Callable[[Entry, float], None], told: Told) -> None:
    """Takes up what the state directory holds, then loads the adapters that the settings name.

    Args:
        edge: where they come to.
        config: names them.
        there: is told each adapter of the settings, and the seconds that it took.
        told: of those of the state directory.

    Raises:
        ConfigError: the settings and the state do not fit together.
        OnebaseError: one of them cannot be loaded.
    """
    try:
        await asyncio.to_thread(edge.disks.sweep)
    except OSError as error:
        raise ConfigError(f"temporary directory is {error.filename!r}: {error.strerror}") from error
    if isinstance(edge.keeper, Durable):
        edge.keeper.residency.told = edge.registry.update
        rooms = Rooms(edge.worker, edge.registry, edge.sessions, edge.idempotency)
        frozen = [(source.name, AdapterKind.REWARD) for source in config.rewards]
        frozen += [(source.name, AdapterKind.REFERENCE) for source in config.references]
        await restore(edge.keeper, rooms, told, frozen=frozen)
    for kind, sources in (
        (AdapterKind.REWARD, config.rewards),
        (AdapterKind.REFERENCE, config.references),
        (AdapterKind.CRITIC, config.critics),
        (AdapterKind.POLICY, config.policies),
    ):
        for source in sources:
            if kind.trained and _is_there(edge, source.name, kind):
                continue
            began = time.monotonic()
            entry = await _load_one(edge, config, kind, source)
            there(entry, time.monotonic() - began)


def _is_there(edge: Edge, name: str, kind: AdapterKind) -> bool:
    """Whether the state directory has this adapter: it goes on from there."""
    check_trained(edge.registry.find(name), name, kind)
    return edge.registry.find(name) is not None or edge.registry.damaged(name)


async def _load_one(edge: Edge, config: ServerConfig, kind: AdapterKind, source: AdapterSource) -> Entry:
    if source.path is None:
        lora = LoraSpec(rank=config.policy_rank, alpha=config.policy_alpha)
        return await edge.catalog.create(NewAdapter(source.name, lora, value_head=True, kind=kind), None)
    loaded = LoadedAdapter(
        source.name,
        kind,
        source.path.expanduser().resolve(),  # the operator's own paths need no root
        value_head=kind.trained,
        append_eos=source.append_eos,
        pooling=source.pooling,
        kept=kind.trained,
    )
    return await edge.catalog.load(loaded, None)
