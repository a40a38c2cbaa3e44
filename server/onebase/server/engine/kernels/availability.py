"""Whether the Triton kernels can run. Asking never imports Triton, and a machine without it is no error."""

from __future__ import annotations

import importlib.util
import os

import torch

LEAST_CAPABILITY = (8, 0)
"""The first NVIDIA architecture (Ampere) whose tensor cores multiply bfloat16."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device: CUDA from LEAST_CAPABILITY on, or a CPU under Triton's interpreter.

    The interpreter is asked for by TRITON_INTERPRET=1 in the environment, before anything imports Triton. It is for
    tests: it is far slower than torch.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return interpreted()
    return (
        device.type == "cuda"
        and not interpreted()
        and torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
