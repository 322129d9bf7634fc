"""Rules between settings of different sections. contradiction() refuses, doubts() warn; config.py calls both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socpo_fast.config import Config


def contradiction(config: Config) -> str | None:
    """The first rule between fields that is broken."""
    teacher, reward = config.teacher, config.reward
    guided = config.rollout.max_attempts > 1
    sources = (config.data.train, config.data.eval)
    per_batch, per_update = config.rollout.questions_per_batch, config.train.questions_per_update
    if per_batch % per_update:
        return f"train.questions_per_update must divide rollout.questions_per_batch {per_batch}, got {per_update}"
    if config.run.device == "cpu" and config.student.dtype != "float32":
        return f"student.dtype must be float32 on run.device cpu, got {config.student.dtype}; it is emulated there"
    if guided and teacher.kind == "local" and teacher.path is None:
        return "teacher.path must be a Hugging Face folder for teacher.kind local, got none; set teacher.path"
    if guided and teacher.kind == "endpoint" and None in (teacher.url, teacher.model):
        return "teacher.url and teacher.model must be set for teacher.kind endpoint, got none; set both"
    if guided and teacher.kind == "rule" and teacher.rule == "builtin" and not {*sources} <= {"builtin", None}:
        return f"teacher.rule must be your own module:function for data {sources}, got builtin; set it or teacher.kind"
    if config.engine.page_size & (config.engine.page_size - 1):
        return f"engine.page_size must be a power of two, got {config.engine.page_size}"
    if (reward.factor is None) == (reward.schedule == "constant"):
        return f"reward.factor must be set for reward.schedule constant and none otherwise, got {reward.factor}"
    return None


def doubts(config: Config) -> list[str]:
    """What is allowed but seldom meant."""
    estimator, found = config.advantage.estimator, []
    if config.rollout.group_size == 1 and estimator != "reinforce_plus_plus":
        found.append(f"rollout.group_size 1 leaves {estimator} little to compare; raise it or use reinforce_plus_plus")
    return found
