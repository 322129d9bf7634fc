from socpo_fast.engine.engine import Engine
from socpo_fast.types import EngineStats, Handle

__all__ = ["Engine", "EngineStats", "Handle"]
