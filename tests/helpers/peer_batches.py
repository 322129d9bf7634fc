"""Makes random batches of attempts and of loss rows, in our form and in that of other trainers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_ATTEMPTS = 3
MAX_TOKENS = 9  # of an attempt
BRIDGE = 2  # tokens between two attempts of a row


class Attempts(NamedTuple):
    """The attempts of a random batch, rollout by rollout."""

    rewards_A: Tensor
    num_tokens_A: Tensor
    question_idx_A: Tensor
    attempt_idx_A: Tensor
    rollout_idx_A: Tensor

    def token_rows(self, rewards_A: Tensor) -> dict[str, Any]:
        """Returns verl's arguments, with one row an attempt and its reward on the last token."""
        mask_AL = (torch.arange(MAX_TOKENS) < self.num_tokens_A[:, None]).long()
        rewards_AL = torch.zeros(mask_AL.shape, dtype=torch.float64)
        rewards_AL[torch.arange(len(mask_AL)), self.num_tokens_A - 1] = rewards_A.double()
        return verls_rows(rewards_AL, mask_AL, self.question_idx_A)

    def rollout_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns raw rewards, mask and attempts [B, T] of rows that hold a rollout, and groups."""
        first_A = self.attempt_idx_A == 0
        row_A = first_A.cumsum(0) - 1
        attempt_BT = torch.full(
            (int(first_A.sum()), MAX_ATTEMPTS * (MAX_TOKENS + BRIDGE)), -1, dtype=torch.int64
        )
        rewards_BT = torch.zeros(attempt_BT.shape, dtype=torch.float64)
        for a, (row, idx) in enumerate(zip(row_A, self.attempt_idx_A, strict=True)):
            start = idx * (MAX_TOKENS + BRIDGE)
            stop = start + self.num_tokens_A[a]
            attempt_BT[row, start:stop] = a
            rewards_BT[row, stop - 1] = self.rewards_A[a]
        return rewards_BT, attempt_BT >= 0, attempt_BT, self.question_idx_A[first_A]


def random_attempts(seed: int) -> Attempts:
    """Returns a batch of up to 24 rollouts.

    Rewards are fractions or binary, or all 0. A few questions have a single attempt.
    """
    torch.manual_seed(seed)
    num_rollouts = int(torch.randint(3, 25, ()))
    num_attempts_B = torch.randint(1, MAX_ATTEMPTS + 1, (num_rollouts,))
    rollout_A = torch.arange(num_rollouts).repeat_interleave(num_attempts_B)
    attempt_idx_A = torch.cat([torch.arange(int(num)) for num in num_attempts_B])
    question_idx_B = torch.randint(0, 1 + num_rollouts // (1 + seed % 4), (num_rollouts,))
    num_attempts = len(rollout_A)
    if seed % 7 == 0:
        rewards_A = torch.zeros(num_attempts)
    else:
        rewards_A = torch.rand(num_attempts)
        rewards_A = rewards_A if seed % 3 else (rewards_A < 0.3).float()
    return Attempts(
        rewards_A=rewards_A,
        num_tokens_A=torch.randint(1, MAX_TOKENS + 1, (num_attempts,)),
        question_idx_A=question_idx_B[rollout_A],
        attempt_idx_A=attempt_idx_A,
        rollout_idx_A=rollout_A,
    )


def verls_rows(rewards_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> dict[str, Any]:
    """Returns the arguments of verl's estimators; it names groups by strings."""
    index = np.array([f"question {idx}" for idx in group_B.tolist()], dtype=object)
    return {"token_level_rewards": rewards_BT, "response_mask": mask_BT, "index": index}


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Compares within a tolerance, which is relative to the largest number if that is above 1."""
    tolerance *= max(1.0, float(theirs.detach().abs().max()))
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


class LossCase(NamedTuple):
    """Rows of a random update: hidden states, head, and what the loss needs of each token."""

    hidden_BTD: Tensor
    weight_VD: Tensor
    targets_BT: Tensor
    mask_BT: Tensor  # fp32; several runs of ones a row, and one row without any
    old_logprobs_BT: Tensor
    advantages_BT: Tensor
    temperature: float

    def logprobs_BT(self) -> Tensor:
        """Returns the log-probs as the peers make them: from the logits of every token."""
        logits = self.hidden_BTD @ self.weight_VD.T / self.temperature
        return logits.log_softmax(-1).gather(-1, self.targets_BT[..., None])[..., 0]


def random_loss_case(seed: int) -> LossCase:
    """Returns 5 rows of 13 tokens, many of them clipped.

    Every fifth case is on-policy, and every seventh has advantages of 0.
    """
    torch.manual_seed(seed)
    num_rows, num_tokens, width, vocab_size = 5, 13, 8, 31
    shape = num_rows, num_tokens
    seq_lens_B = torch.randint(1, num_tokens + 1, (num_rows, 1))
    seq_lens_B[seed % num_rows] = 0
    mask_BT = (torch.arange(num_tokens) < seq_lens_B).float()
    mask_BT[:, 3:5] = 0  # a bridge
    case = LossCase(
        hidden_BTD=torch.randn(*shape, width, requires_grad=True),
        weight_VD=torch.randn(vocab_size, width, requires_grad=True),
        targets_BT=torch.randint(0, vocab_size, shape),
        mask_BT=mask_BT,
        old_logprobs_BT=torch.empty(0),
        advantages_BT=torch.randn(shape) * (seed % 7 > 0),
        temperature=1.0 if seed % 2 else 0.7,
    )
    drift = 0.6 * torch.randn(shape) * (seed % 5 > 0)
    return case._replace(old_logprobs_BT=case.logprobs_BT().detach() + drift)
