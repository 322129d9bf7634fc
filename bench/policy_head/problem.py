"""Makes a policy-loss problem with its exact results in fp64, and checks results against them.

Read make_problem, with_truth, then errors_of. The exact results ("truth") come from one pass over
the loss rows in fp64: logits, log-prob, d loss / d logit. The gradients [N, D] and [V, D] in fp64
would take too much memory, so they are compared through products with a few random vectors q.
If a row is g + e instead of g, the squares of e @ q average to the squared length of e, so that
every single row of dX and dW is checked. Hidden states and weight are rounded to their dtype first:
the truth is that of the rounded problem, and rounding the inputs is no error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import CPU
from socpo_fast.ops import policy_loss

TEMPERATURE = 1.0


class Bounds(NamedTuple):
    """The largest errors that pass."""

    whole: float  # of the loss, and of a gradient relative to its norm
    row: float  # of a row of dX or dW, relative to the length of that row


# How (whole, row) were chosen. The smallest fault is one vocabulary column left out, and its row's
# error is 1. Correct results in fp32 are off by about 1e-6 and 1e-5. In bf16 ours is off by 2e-3
# and 1e-2. With logits rounded to bf16 (one near 8 is off by up to 0.03) it is 5e-3 and 0.1, which
# still passes. Log-probs rounded to bf16 are off by 2e-2, which does not.
BOUNDS = {torch.float32: Bounds(1e-5, 1e-2), torch.bfloat16: Bounds(1e-2, 0.5)}

_NUM_PROBES = 8
_CHUNK_NUMBERS = 1 << 25  # fp64 logits alive at once


def useful_flops(num_rows: int, vocab_size: int, hidden_size: int) -> float:
    """Returns the FLOPs of logits, dX and dW over the loss rows, each computed once."""
    return 6.0 * num_rows * vocab_size * hidden_size


def useful_bytes(num_rows: int, vocab_size: int, hidden_size: int, element_size: int = 4) -> float:
    """Returns the least traffic: hidden rows and weight read once, their gradients written once."""
    return 2.0 * element_size * hidden_size * (num_rows + vocab_size)


@dataclass(frozen=True)
class Problem:
    """The inputs of a trainer's microbatch, with the exact results.

    No ratio is clipped, so each loss row needs all three GEMMs.
    """

    hidden_TD: Tensor  # requires grad, as weight_VD does
    weight_VD: Tensor
    targets_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor  # 0 outside rows_N
    rows_N: Tensor  # the loss rows, ascending
    probes_DK: Tensor  # fp64
    loss: float  # this and the next three are the truth
    loss_scale: float  # sum of weight |advantage| ratio: the loss itself may cancel to near 0
    hidden_probe_TK: Tensor  # dX @ probes
    weight_probe_VK: Tensor  # dW @ probes

    @property
    def device(self) -> torch.device:
        return self.weight_VD.device

    def accepts(self, errors: Errors) -> bool:
        """Whether errors are within the bounds of the problem's dtype; NaN never is."""
        bounds = BOUNDS[self.weight_VD.dtype]
        errors_of_whole = errors.loss, errors.hidden, errors.weight
        return all(error <= bounds.whole for error in errors_of_whole) and errors.row <= bounds.row


@dataclass(frozen=True)
class Errors:
    """Relative errors against fp64; `row` is that of the worst row of dX or dW."""

    loss: float
    hidden: float
    weight: float
    row: float


def random_weight(
    vocab_size: int,
    hidden_size: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws a head whose logits have standard deviation 2 on hidden states of unit variance.

    All random numbers of this file are drawn on the CPU, so they are the same on every device.
    """
    weight = torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(1))
    return weight.mul_(2 / hidden_size**0.5).to(device, dtype).requires_grad_()


def make_problem(weight_VD: Tensor, num_tokens: int, percent_loss: int) -> Problem:
    """Makes random hidden states and targets; a random percent_loss of the rows carry loss."""
    generator = torch.Generator().manual_seed(2)
    device = weight_VD.device
    dtype = weight_VD.dtype
    vocab_size, hidden_size = weight_VD.shape
    num_rows = max(1, num_tokens * percent_loss // 100)
    rows_N = torch.randperm(num_tokens, generator=generator)[:num_rows].sort().values
    weights_T = torch.zeros(num_tokens).index_fill_(0, rows_N, 1 / num_rows)
    hidden_TD = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    targets_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    log_ratio_T = (torch.rand(num_tokens, generator=generator) - 0.5) * 0.2
    advantages_T = torch.randn(num_tokens, generator=generator)
    return with_truth(
        hidden_TD=hidden_TD.requires_grad_(),
        weight_VD=weight_VD,
        targets_T=targets_T.to(device),
        log_ratio_T=log_ratio_T.to(device),
        advantages_T=advantages_T.to(device),
        weights_T=weights_T.to(device),
    )


@torch.no_grad()
def with_truth(
    *,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
) -> Problem:
    """Returns the problem in which row t's ratio is exp(log_ratio_T[t]), with its truth."""
    rows_N = weights_T.nonzero()[:, 0]
    hidden = hidden_TD.double()
    weight = weight_VD.double()
    generator = torch.Generator().manual_seed(3)
    probes = torch.randn(hidden.shape[1], _NUM_PROBES, generator=generator, dtype=torch.float64)
    probes = probes.to(hidden.device)
    weight_probe_in = weight @ probes
    hidden_probe_in = hidden @ probes
    old_logprobs = torch.zeros_like(log_ratio_T)
    hidden_probe = torch.zeros_like(hidden_probe_in)
    weight_probe = torch.zeros_like(weight_probe_in)
    loss = loss_scale = 0.0
    for rows in rows_N.split(max(1, _CHUNK_NUMBERS // weight.shape[0])):
        row_idx = torch.arange(rows.numel(), device=rows.device)
        targets = targets_T[rows]
        logits = hidden[rows] @ weight.T
        logsumexp = logits.logsumexp(1, keepdim=True)
        logprobs = logits[row_idx, targets] - logsumexp[:, 0]
        old_logprobs[rows] = (logprobs - log_ratio_T[rows]).float()
        with torch.enable_grad():
            logprobs.requires_grad_()
            advantages = advantages_T[rows].double()
            weights = weights_T[rows].double()
            result = policy_loss(
                logprobs, old_logprobs[rows].double(), advantages, weights_N=weights
            )
            (coefficients,) = torch.autograd.grad(result.loss, logprobs)
        loss += result.loss.item()
        loss_scale += (weights * advantages.abs() * result.ratio).sum().item()
        grad_logits = logits.sub_(logsumexp).exp_().mul_(-coefficients[:, None])
        grad_logits[row_idx, targets] += coefficients
        hidden_probe[rows] = grad_logits @ weight_probe_in
        weight_probe += grad_logits.T @ hidden_probe_in[rows]
    return Problem(
        hidden_TD,
        weight_VD,
        targets_T,
        old_logprobs,
        advantages_T,
        weights_T,
        rows_N,
        probes,
        loss,
        loss_scale,
        hidden_probe,
        weight_probe,
    )


@torch.no_grad()
def errors_of(
    problem: Problem, loss: Tensor, grad_hidden_TD: Tensor, grad_weight_VD: Tensor
) -> Errors:
    """Compares a contender's results with the truth."""
    hidden, hidden_row = _gradient_error(grad_hidden_TD, problem.hidden_probe_TK, problem.probes_DK)
    weight, weight_row = _gradient_error(grad_weight_VD, problem.weight_probe_VK, problem.probes_DK)
    loss_error = abs(loss.item() - problem.loss) / problem.loss_scale
    return Errors(loss_error, hidden, weight, max(hidden_row, weight_row))


def _gradient_error(
    gradient_RD: Tensor, truth_RK: Tensor, probes_DK: Tensor
) -> tuple[float, float]:
    """Returns the relative errors of a gradient and of its worst row; NaN if it has any NaN."""
    if gradient_RD.shape != (truth_RK.shape[0], probes_DK.shape[0]):
        return float("inf"), float("inf")
    probed = torch.cat([block.double() @ probes_DK for block in gradient_RD.split(8192)])
    error_R = (probed - truth_RK).square().sum(1)
    square_R = truth_RK.square().sum(1)
    # A row of nearly 0 may have a large relative error from rounding alone. With this floor it may
    # be off by 1e-8 of a typical row (in fp32: the bound of 1e-2 times the root of 1e-12).
    floor = 1e-12 * square_R.mean()
    return (
        float((error_R.sum() / square_R.sum()).sqrt()),
        float((error_R / (square_R + floor)).max().sqrt()),
    )
