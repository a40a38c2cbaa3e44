"""Kernels for CUDA, each with a torch reference of the same numbers. They know nothing of models or batches.

`table` makes the index tensors, `update` is the one call for a layer, `segmented_lora` holds the Triton kernels (the
only module that imports Triton, and only when it is used), `reference` says the same in torch, and `trial` finds out
whether the two agree on this machine.
"""

from onebase.server.engine.kernels.availability import available
from onebase.server.engine.kernels.table import AdapterEntries, LoraTable, LoraTables, Tiles
from onebase.server.engine.kernels.trial import KernelFailure, try_out
from onebase.server.engine.kernels.update import add_lora

__all__ = [
    "AdapterEntries",
    "KernelFailure",
    "LoraTable",
    "LoraTables",
    "Tiles",
    "add_lora",
    "available",
    "try_out",
]
