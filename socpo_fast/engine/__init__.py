"""The rollout engine: paged KV, continuous batching, attempts that resume on kept pages.

Read engine.py -> scheduler.py and pages.py -> steps.py -> runner.py -> decode.py.
"""

from socpo_fast.engine.engine import Engine
from socpo_fast.engine.sequence import fresh_batch
from socpo_fast.types import EngineStats

__all__ = ["Engine", "EngineStats", "fresh_batch"]
