"""From the grades of a finished batch to rewards and advantages: attempt_table, then assign_credit.

The rewards of a batch go to the device of the loss once, as one table, and come back once, for the
record; everything in between is one call of ops.credit_attempts. Advantages stay there, too: the
loss reads them where they are.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from socpo_fast.ops import CreditOptions, credit_attempts
from socpo_fast.types import Rollout


class AttemptTable(NamedTuple):
    """The attempts of a batch as columns, rollout by rollout: what to gather across ranks."""

    rewards_A: Tensor  # [A] fp32, raw
    num_tokens_A: Tensor  # [A] int64, loss tokens
    question_idx_A: Tensor  # [A] int64
    attempt_idx_A: Tensor  # [A] int64
    rollout_idx_A: Tensor  # [A] int64


def attempt_table(rollouts: Sequence[Rollout]) -> AttemptTable:
    """Returns the raw rewards of all attempts and whose they are; every token of an attempt counts.

    Raises:
        ValueError: two rollouts of a question have one rollout_idx, and would be credited as one.
    """
    names = Counter((rollout.question_idx, rollout.rollout_idx) for rollout in rollouts)
    for (question_idx, rollout_idx), times in names.items():
        if times > 1:
            raise ValueError(
                f"attempt_table: rollout_idx must be unique in a question, got {rollout_idx} of "
                "question "
                f"{question_idx} {times} times; give each rollout its own"
            )
    turns = [(rollout, turn) for rollout in rollouts for turn in rollout.turns]
    counts = [
        (
            turn.attempt.num_tokens,
            rollout.question_idx,
            turn.attempt.attempt_idx,
            rollout.rollout_idx,
        )
        for rollout, turn in turns
    ]
    rewards_A = torch.tensor([turn.raw_reward for _, turn in turns], dtype=torch.float32)
    counts_4A = torch.tensor(counts, dtype=torch.int64).view(-1, 4).t().contiguous()
    return AttemptTable(rewards_A, *counts_4A.unbind())


def assign_credit(
    rollouts: Sequence[Rollout], *, options: CreditOptions, device: torch.device | str = "cpu"
) -> tuple[list[float], Tensor]:
    """Writes every turn's reward and advantage of one batch.

    Returns:
        f_1, f_2, .. of the attempts there are; advantages [A] fp32 on the device, those of the
        turns rollout by rollout.

    Warns when no first attempt of the batch is correct, since help then earns nothing.
    """
    credit = credit_attempts(
        *(column_A.to(device) for column_A in attempt_table(rollouts)),
        options=options,
    )
    earned = torch.stack((credit.rewards_A, credit.advantages_A), dim=1).tolist()
    turns = (turn for rollout in rollouts for turn in rollout.turns)
    for turn, (reward, advantage) in zip(turns, earned, strict=True):
        turn.reward = reward
        turn.advantage = advantage
    factors: list[float] = credit.factors_K[1:].tolist()
    if options.schedule == "batch_mean" and factors and factors[0] == 0.0:
        warnings.warn(
            "reward decay: no first attempt of the batch is correct, so guided ones earn nothing",
            stacklevel=2,
        )
    return factors, credit.advantages_A
