"""The engine: the only place that imports torch. Mixed batches of any adapters over one base."""

from onebase.server.engine.engine import Engine
from onebase.server.engine.loading import open_engine

__all__ = ["Engine", "open_engine"]
