"""From the rewards of a batch to one advantage an attempt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from socpo_fast.ops.decay_advantage import BaselineGroup, Estimator, compute_advantages
from socpo_fast.types import Rollout


def assign_advantages(
    rollouts: Sequence[Rollout], *, estimator: Estimator, baseline_group: BaselineGroup = "question", eps: float = 1e-6
) -> None:
    """Write `advantages` of every rollout of one batch; `rewards` must be there. Every token of an attempt counts."""
    rows = [
        (reward, attempt.num_tokens, rollout.question_idx, attempt.attempt_idx)
        for rollout in rollouts
        for reward, attempt in zip(rollout.rewards, rollout.attempts, strict=True)
    ]
    rewards_A = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    counts_A3 = torch.tensor([row[1:] for row in rows], dtype=torch.int64).view(-1, 3)
    counts = (column_A.contiguous() for column_A in counts_A3.unbind(1))
    advantages_A = compute_advantages(rewards_A, *counts, estimator=estimator, baseline_group=baseline_group, eps=eps)
    advantages = iter(advantages_A.tolist())
    for rollout in rollouts:
        rollout.advantages = [next(advantages) for _ in rollout.attempts]
