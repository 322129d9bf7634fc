"""Turns the grades of a finished batch into rewards and advantages.

Read attempt_table, then assign_credit. The rewards of a batch go to the device of the loss once, as
one table, and come back once, for the record. Everything in between is one call of
ops.credit_attempts. The advantages also stay on that device, where the loss reads them.

    rollouts -> turns            A = 5 rows: rollout by rollout, attempts in order
    rollout 0: attempts 0 1      rewards_A      0   1   0   0   1
    rollout 1: attempts 0 1 2    attempt_idx_A  0   1   0   1   2
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
    """The attempts of a batch as columns, rollout by rollout. Ranks gather these columns."""

    rewards_A: Tensor  # [A] fp32, raw
    num_tokens_A: Tensor  # [A] int64, loss tokens
    question_idx_A: Tensor  # [A] int64
    attempt_idx_A: Tensor  # [A] int64
    rollout_idx_A: Tensor  # [A] int64


def attempt_table(rollouts: Sequence[Rollout]) -> AttemptTable:
    """Returns the raw rewards of all attempts, with question, rollout and attempt index of each.

    Every token of an attempt is a loss token.

    Raises:
        ValueError: two rollouts of a question have the same rollout_idx; they would be credited as
            one.
    """
    name_counts = Counter((rollout.question_idx, rollout.rollout_idx) for rollout in rollouts)
    for (question_idx, rollout_idx), count in name_counts.items():
        if count > 1:
            raise ValueError(
                f"attempt_table: rollout_idx must be unique in a question, got {rollout_idx} of "
                "question "
                f"{question_idx} {count} times; give each rollout its own"
            )
    turns = [(rollout, turn) for rollout in rollouts for turn in rollout.turns]
    int_rows = [
        (
            turn.attempt.num_tokens,
            rollout.question_idx,
            turn.attempt.attempt_idx,
            rollout.rollout_idx,
        )
        for rollout, turn in turns
    ]
    rewards_A = torch.tensor([turn.raw_reward for _, turn in turns], dtype=torch.float32)
    counts_4A = torch.tensor(int_rows, dtype=torch.int64).view(-1, 4).t().contiguous()
    return AttemptTable(rewards_A, *counts_4A.unbind())


def assign_credit(
    rollouts: Sequence[Rollout], *, options: CreditOptions, device: torch.device | str = "cpu"
) -> tuple[list[float], Tensor]:
    """Sets reward and advantage of every turn of a batch.

    It warns when no first attempt of the batch is correct, since guided attempts then earn nothing.

    Returns:
        (factors, advantages_A). The decay factors f_1, f_2, .. of the attempt indices that occur;
        advantages [A] fp32 on the device, in the order of the turns, rollout by rollout.
    """
    credit = credit_attempts(
        *(column_A.to(device) for column_A in attempt_table(rollouts)),
        options=options,
    )
    # Stacked, so that one copy from the device brings both.
    rewards_advantages = torch.stack((credit.rewards_A, credit.advantages_A), dim=1).tolist()
    turns = (turn for rollout in rollouts for turn in rollout.turns)
    for turn, (reward, advantage) in zip(turns, rewards_advantages, strict=True):
        turn.reward = reward
        turn.advantage = advantage
    # f_0 is 1 by definition.
    factors: list[float] = credit.factors_K[1:].tolist()
    if options.schedule == "batch_mean" and factors and factors[0] == 0.0:
        warnings.warn(
            "reward decay: no first attempt of the batch is correct, so guided ones earn nothing",
            stacklevel=2,
        )
    return factors, credit.advantages_A
