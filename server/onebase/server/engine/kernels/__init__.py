"""Kernels for CUDA, each with a torch reference of the same numbers. They know nothing of models or batches.

`table` makes the index tensors, `update` is the one call for a layer, `segmented_lora` holds the Triton kernels (the
only module that imports Triton, and only when it is used), `reference` says the same in torch.
"""

from onebase.server.engine.kernels.availability import available
from onebase.server.engine.kernels.table import LoraTable, LoraTables, Tiles
from onebase.server.engine.kernels.update import add_lora

__all__ = ["LoraTable", "LoraTables", "Tiles", "add_lora", "available"]
