"""Adapters that are not in device memory: everything that is known of them but their numbers.

What comes back is what went, bit for bit: weights, heads, AdamW's moments, and the version, also where the directory
that it is read from has a lower number. Old versions that were kept for those who may ask do not come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from onebase.server.engine.adapters import Adapter, Weights
from onebase.server.engine.formats import Formats, Target
from onebase.server.errors import DataLoss
from onebase.server.jobs import AdapterFacts, AdapterMemory, LoadAdapterJob


@dataclass(frozen=True)
class Absent:
    """An adapter without its numbers."""

    shell: Adapter
    """Its settings; nothing of it is on the device."""
    facts: AdapterFacts
    targets: dict[str, Target]
    """The layers that it adapts, so that nobody need look for them again."""
    stepped: bool
    """Whether it has moments."""
    open: Callable[[], AbstractContextManager[Path]]
    """Gives the directory that it is read from."""

    @classmethod
    def of(cls, adapter: Adapter, open_: Callable[[], AbstractContextManager[Path]]) -> Absent:
        """What stays of an adapter that is neither read nor trained."""
        old = adapter.weights
        targets = {
            name: Target(pair.a.shape[0], pair.scaling, pair.a.shape[1], pair.b.shape[0])
            for name, pair in old.lora.items()
        }
        shell = dataclasses.replace(adapter, weights=Weights(old.version, {}, serial=old.serial), moments=None, old=[])
        facts = dataclasses.replace(adapter.facts(), memory=AdapterMemory(), resident=False)
        return cls(shell, facts, targets, adapter.moments is not None, open_)

    def read(self, formats: Formats, max_rank: int) -> Adapter:
        """The adapter as it was. Any thread may call this; it waits for files.

        Raises:
            OnebaseError: the directory cannot be read, or it holds a newer version.
        """
        facts = self.facts
        with self.open() as path:
            job = LoadAdapterJob(
                uid=facts.uid,
                name=self.shell.name,
                kind=facts.kind,
                path=path,
                with_optimizer=self.stepped,
                least_version=facts.version,
            )
            loaded = formats.load(job, max_rank, self.targets)
        weights = loaded.weights
        there = (weights.version, weights.count, weights.value_head is not None)
        if there != (facts.version, facts.parameter_count, facts.value_head):
            raise DataLoss("CHECKPOINT_DAMAGED", f"the checkpoint is of version {weights.version}, or of another shape")
        weights.serial = self.shell.weights.serial  # what the cache keeps of its prompts is still of these numbers
        return dataclasses.replace(self.shell, weights=weights, moments=loaded.moments)
