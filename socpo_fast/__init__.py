"""Trains language models with SocraticPO on one node.

Rollouts with a teacher in the loop and REINFORCE++ updates run in one process, on one copy of the
weights. The public names are listed in __all__.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from socpo_fast.engine import Engine
    from socpo_fast.integrations.async_engine import AsyncEngine
    from socpo_fast.integrations.episode import socratic_episode
    from socpo_fast.integrations.tensors import pad_rollouts, socratic_advantages
    from socpo_fast.model import adopt_student, load_student, save_student
    from socpo_fast.socratic.credit import attempt_table
    from socpo_fast.socratic.episode import Episode, RolloutOptions
    from socpo_fast.socratic.rollout import arollouts, socratic_rollouts
    from socpo_fast.training.step import policy_gradients
    from socpo_fast.training_run import TrainingRun, train
    from socpo_fast.types import (
        Attempt,
        Guidance,
        GuidanceRequest,
        Question,
        Rollout,
        SamplingParams,
        Turn,
    )

__version__ = "0.1.0"

# Public name -> the module that defines it. The imports above are for type checkers only.
_HOME = {
    "AsyncEngine": "socpo_fast.integrations.async_engine",
    "Attempt": "socpo_fast.types",
    "Engine": "socpo_fast.engine",
    "Episode": "socpo_fast.socratic.episode",
    "Guidance": "socpo_fast.types",
    "GuidanceRequest": "socpo_fast.types",
    "Question": "socpo_fast.types",
    "Rollout": "socpo_fast.types",
    "RolloutOptions": "socpo_fast.socratic.episode",
    "SamplingParams": "socpo_fast.types",
    "TrainingRun": "socpo_fast.training_run",
    "Turn": "socpo_fast.types",
    "adopt_student": "socpo_fast.model",
    "arollouts": "socpo_fast.socratic.rollout",
    "attempt_table": "socpo_fast.socratic.credit",
    "load_student": "socpo_fast.model",
    "pad_rollouts": "socpo_fast.integrations.tensors",
    "policy_gradients": "socpo_fast.training.step",
    "save_student": "socpo_fast.model",
    "socratic_advantages": "socpo_fast.integrations.tensors",
    "socratic_episode": "socpo_fast.integrations.episode",
    "socratic_rollouts": "socpo_fast.socratic.rollout",
    "train": "socpo_fast.training_run",
}
__all__ = [
    "AsyncEngine",
    "Attempt",
    "Engine",
    "Episode",
    "Guidance",
    "GuidanceRequest",
    "Question",
    "Rollout",
    "RolloutOptions",
    "SamplingParams",
    "TrainingRun",
    "Turn",
    "adopt_student",
    "arollouts",
    "attempt_table",
    "load_student",
    "pad_rollouts",
    "policy_gradients",
    "save_student",
    "socratic_advantages",
    "socratic_episode",
    "socratic_rollouts",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    # Importing the package must not import torch, which takes seconds. The command line can then
    # refuse a mistake at once.
    if name not in _HOME:
        raise AttributeError(f"module 'socpo_fast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Lists the public names, also those that are not imported yet."""
    return __all__
