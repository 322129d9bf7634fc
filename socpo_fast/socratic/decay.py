"""From verdicts to rewards: 1 for a correct attempt, 0 for a wrong one, then decay over the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from socpo_fast.ops.decay_advantage import Schedule, decay_factors, decay_rewards
from socpo_fast.types import Rollout


def assign_rewards(rollouts: Sequence[Rollout], *, schedule: Schedule, factor: float | None = None) -> list[float]:
    """Write every turn's reward of one batch, after decay; returns f_1, f_2, .. of the attempts there are.

    Every attempt is credited with its own verdict (step-wise credit): the wrong first attempt of a rescued rollout
    keeps 0. Warns when no first attempt of the batch is correct, since help then earns nothing.
    """
    turns = [(turn, idx) for rollout in rollouts for idx, turn in enumerate(rollout.turns)]
    raw_A = torch.tensor([turn.raw_reward for turn, _ in turns], dtype=torch.float32)
    attempt_idx_A = torch.tensor([idx for _, idx in turns], dtype=torch.int64)
    factors = decay_factors(raw_A, attempt_idx_A, schedule=schedule, factor=factor)
    rewards_A = decay_rewards(raw_A, attempt_idx_A, schedule=schedule, factor=factor)
    for (turn, _), reward in zip(turns, rewards_A.tolist(), strict=True):
        turn.reward = reward
    if schedule == "batch_mean" and len(factors) > 1 and factors[1] == 0.0:
        warnings.warn(
            "reward decay: no first attempt of the batch is correct, so guided ones earn nothing", stacklevel=2
        )
    return factors[1:]
