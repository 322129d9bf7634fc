"""From the rewards of a batch to one advantage an attempt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from socpo_fast.ops.decay_advantage import BaselineGroup, Estimator, compute_advantages
from socpo_fast.types import Rollout


def assign_advantages(
    rollouts: Sequence[Rollout], *, estimator: Estimator, baseline_group: BaselineGroup = "question", eps: float = 1e-6
) -> None:
    """Write every turn's advantage of one batch, from its reward. Every token of an attempt counts."""
    turns = [(rollout.question_idx, turn) for rollout in rollouts for turn in rollout.turns]
    rows = [
        (turn.reward, turn.attempt.num_tokens, question_idx, turn.attempt.attempt_idx) for question_idx, turn in turns
    ]
    rewards_A = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    counts_A3 = torch.tensor([row[1:] for row in rows], dtype=torch.int64).view(-1, 3)
    counts = (column_A.contiguous() for column_A in counts_A3.unbind(1))
    advantages_A = compute_advantages(rewards_A, *counts, estimator=estimator, baseline_group=baseline_group, eps=eps)
    for (_, turn), advantage in zip(turns, advantages_A.tolist(), strict=True):
        turn.advantage = advantage
