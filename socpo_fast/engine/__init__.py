from socpo_fast.engine.engine import Engine, EngineStats, Handle

__all__ = ["Engine", "EngineStats", "Handle"]
