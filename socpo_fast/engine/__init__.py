from socpo_fast.engine.engine import Engine
from socpo_fast.engine.sequence import fresh_batch
from socpo_fast.types import EngineStats

__all__ = ["Engine", "EngineStats", "fresh_batch"]
