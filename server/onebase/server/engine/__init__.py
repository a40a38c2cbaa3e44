"""The engine: the only place that imports torch. Mixed batches of any adapters over one base."""

import importlib
import sys

# PEFT imports bitsandbytes where it finds it, for layers that we do not take from it, and with it comes a third of the
# seconds that a server needs to start. What is None here is not found; `quantized` imports it where it is needed.
if "bitsandbytes" not in sys.modules:
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    importlib.import_module("peft")
    del sys.modules["bitsandbytes"]

from onebase.server.engine.engine import Engine
from onebase.server.engine.loading import open_engine

__all__ = ["Engine", "open_engine"]
