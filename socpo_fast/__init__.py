"""SocraticPO on one node: rollouts with a tutor in the loop and REINFORCE++ in one process, one copy of the weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from socpo_fast.engine import Engine
    from socpo_fast.model import load_student, save_student
    from socpo_fast.socratic.rollout import socratic_rollouts
    from socpo_fast.train.step import policy_gradients
    from socpo_fast.types import Attempt, Rollout, SamplingParams

__version__ = "0.1.0"

_HOME = {
    "Attempt": "socpo_fast.types",
    "Engine": "socpo_fast.engine",
    "Rollout": "socpo_fast.types",
    "SamplingParams": "socpo_fast.types",
    "load_student": "socpo_fast.model",
    "policy_gradients": "socpo_fast.train.step",
    "save_student": "socpo_fast.model",
    "socratic_rollouts": "socpo_fast.socratic.rollout",
}
__all__ = [
    "Attempt",
    "Engine",
    "Rollout",
    "SamplingParams",
    "load_student",
    "policy_gradients",
    "save_student",
    "socratic_rollouts",
]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that a wrong command line is refused before torch is imported."""
    if name not in _HOME:
        raise AttributeError(f"module 'socpo_fast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
