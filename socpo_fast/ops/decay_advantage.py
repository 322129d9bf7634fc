"""From the raw rewards of a batch to one advantage per attempt: decay_factors -> decay_rewards -> compute_advantages.

Departures from the textbook. The factor of attempt n is the batch's own mean reward of all earlier attempts, already
decayed, so help can never pay more than answering alone does. The group of a baseline is a question, its first and
later attempts together: grouped by attempt index, a division by the group's std would undo the decay. Whitening counts
an attempt once per loss token, yet with outcome rewards and no discount the advantage is one number per attempt, so
nothing of size [A, length] exists.

A is a few hundred: the reference computes in fp64 on the host, where segment sums run in index order whatever the
number of threads, and equal rewards centre to exactly 0. For tensors on a GPU, kernels/decay_advantage.py does the same
in one launch.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from socpo_fast.ops._checks import INDEX, WIDE_FLOATS, TensorChecker, check_rule, check_word
from socpo_fast.ops._impl import IMPLS, choose_impl, kernels_of

Schedule = Literal["batch_mean", "constant", "none"]
Estimator = Literal["reinforce_plus_plus_baseline", "reinforce_plus_plus", "grpo", "dr_grpo", "rloo"]
BaselineGroup = Literal["question", "question_attempt"]

_WHITENED = ("reinforce_plus_plus_baseline", "reinforce_plus_plus")
_WHITEN_EPS = 1e-8


def decay_factors(
    rewards_A: Tensor, attempt_idx_A: Tensor, *, schedule: Schedule = "batch_mean", factor: float | None = None
) -> list[float]:
    """What the raw reward of attempt 0, 1, .. of this batch is multiplied by; entry 1 is the metric `decay/f_1`.

        batch_mean   f_0 = 1,  f_n = mean of f_a R_i over all attempts i with index a < n
        constant     f_n = factor ** n
        none         f_n = 1

    Args:
        rewards_A:     [A] fp32 or fp64, finite. Raw rewards of all attempts of the batch.
        attempt_idx_A: [A] int64, >= 0. 0 is an answer without help; batch_mean needs at least one of them.
        schedule:      "batch_mean" (the paper's), "constant" or "none" (the ablation).
        factor:        in [0, 1], for "constant" only.

    Returns:
        One float per attempt index, up to the largest in the batch; empty when A = 0.

    Raises:
        ValueError: an argument breaks the rules above.

    Source: Liu et al. 2026, arXiv:2606.09887; figure 2 of its repository.
    """
    num_factors = _check_decay_inputs(TensorChecker("decay_rewards"), rewards_A, attempt_idx_A, schedule, factor)
    if schedule != "batch_mean" or num_factors == 0:
        return [1.0 if factor is None else factor**n for n in range(num_factors)]
    attempt_idx_A = attempt_idx_A.cpu()
    reward_sums = _segment_sum(rewards_A.cpu().double(), attempt_idx_A, num_factors).tolist()
    counts = attempt_idx_A.bincount().tolist()
    factors, decayed_sum, count = [1.0], reward_sums[0], counts[0]
    for n in range(1, num_factors):  # f_n needs f_1 .. f_(n - 1): a recurrence over the few attempt indices
        factors.append(decayed_sum / count)
        decayed_sum, count = decayed_sum + factors[n] * reward_sums[n], count + counts[n]
    return factors


def decay_rewards(
    rewards_A: Tensor,
    attempt_idx_A: Tensor,
    *,
    schedule: Schedule = "batch_mean",
    factor: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Rewards after decay: a success after help is worth less than one without.

        decayed[i] = f[attempt_idx[i]] * rewards[i]          f as in `decay_factors`

    Args:
        rewards_A, attempt_idx_A, schedule, factor: those of `decay_factors`.
        impl: "auto", "ref" or "triton".

    Returns:
        [A] fp32, on the device of rewards_A. Attempt 0 is untouched.

    Raises:
        ValueError: an argument breaks the rules of `decay_factors`.

    Gradient: none. Bitwise: same inputs, same bits.
    """
    if choose_impl("decay_rewards", impl, IMPLS["decay_rewards"], rewards_A.device) == "triton":
        num_factors = _check_decay_inputs(TensorChecker("decay_rewards"), rewards_A, attempt_idx_A, schedule, factor)
        launch = kernels_of("decay_advantage", "triton").decay_advantage
        return launch(rewards_A, attempt_idx_A, schedule=schedule, factor=factor, num_factors=num_factors)[0]
    factors = torch.tensor(
        decay_factors(rewards_A, attempt_idx_A, schedule=schedule, factor=factor), dtype=torch.float64
    )
    decayed_A = rewards_A.detach().cpu().double() * factors[attempt_idx_A.cpu()]
    return decayed_A.to(rewards_A.device, torch.float32)


def compute_advantages_ref(
    rewards_A: Tensor,
    num_tokens_A: Tensor,
    question_idx_A: Tensor,
    attempt_idx_A: Tensor,
    *,
    estimator: Estimator,
    baseline_group: BaselineGroup,
    eps: float,
) -> Tensor:
    """`compute_advantages` of decayed rewards, unchecked."""
    r_A, num_tokens_A = rewards_A.detach().cpu().double(), num_tokens_A.cpu().double()
    if estimator == "reinforce_plus_plus":
        return _whiten(r_A, num_tokens_A).to(rewards_A.device, torch.float32)
    group_A = _group_indices(question_idx_A.cpu(), attempt_idx_A.cpu(), baseline_group)
    count_A = group_A.bincount()[group_A].double()
    alone_A = count_A == 1
    sum_A = _segment_sum(r_A, group_A)[group_A]
    others_mean_A = (sum_A - r_A) / (count_A - 1).clamp(min=1)
    baseline_A = others_mean_A if estimator == "rloo" else sum_A / count_A
    advantages_A = torch.where(alone_A, r_A, r_A - baseline_A)
    if estimator == "reinforce_plus_plus_baseline":
        advantages_A = _whiten(advantages_A, num_tokens_A)
    elif estimator == "grpo":
        var_A = _segment_sum(advantages_A.square(), group_A)[group_A] / (count_A - 1).clamp(min=1)
        advantages_A = advantages_A / (torch.where(alone_A, 1.0, var_A.sqrt()) + eps)
    return advantages_A.to(rewards_A.device, torch.float32)


def compute_advantages(
    rewards_A: Tensor,
    num_tokens_A: Tensor,
    question_idx_A: Tensor,
    attempt_idx_A: Tensor,
    *,
    estimator: Estimator = "reinforce_plus_plus_baseline",
    baseline_group: BaselineGroup = "question",
    eps: float = 1e-6,
    schedule: Schedule = "none",
    factor: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """One advantage per attempt, from the decayed rewards of a whole batch.

        reinforce_plus_plus_baseline   whiten(r - group mean)
        reinforce_plus_plus            whiten(r)
        grpo                           (r - group mean) / (unbiased group std + eps)
        dr_grpo                        r - group mean
        rloo                           r - mean of the others of the group

        whiten(x) = (x - mean) / sqrt(var + 1e-8), mean and unbiased variance over the N = sum(num_tokens) loss tokens

    A group of one attempt has baseline 0 and std 1 in every estimator.

    Args:
        rewards_A:      [A] fp32 or fp64, finite, after decay; raw ones with a `schedule`.
        num_tokens_A:   [A] int64, >= 0. Loss tokens of each attempt.
        question_idx_A: [A] int64, any values; equal values are one question of the batch.
        attempt_idx_A:  [A] int64, >= 0. Used by baseline_group "question_attempt" and by a `schedule`.
        estimator:      one of the five above.
        baseline_group: "question", or "question_attempt" to group by attempt index as well (warns).
        eps:            >= 0, added to the std in grpo.
        schedule:       not "none": r = decay_rewards(rewards, attempt_idx, schedule, factor), in the same launch.
        factor:         in [0, 1], for schedule "constant" only.
        impl:           "auto", "ref" or "triton".

    Returns:
        [A] fp32, on the device of rewards_A. All zero, with a warning, when the batch has no loss tokens.

    Raises:
        ValueError: an argument breaks the rules above, or a whitened batch has a single loss token.

    Gradient: none. Bitwise: same inputs, same bits. No [A, length] tensor.
    Source: Hu et al. 2025, arXiv:2501.03262 (REINFORCE++); Shao et al. 2024, arXiv:2402.03300 (GRPO);
    Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """
    where = "compute_advantages"
    check = TensorChecker(where)
    num_factors = _check_decay_inputs(check, rewards_A, attempt_idx_A, schedule, factor)
    _check_advantage_inputs(check, num_tokens_A, question_idx_A, estimator, baseline_group, eps)
    if not num_tokens_A.any():
        warnings.warn(f"{where}: the batch has no loss tokens; all advantages are 0", stacklevel=2)
        return torch.zeros_like(rewards_A, dtype=torch.float32)
    if choose_impl(where, impl, IMPLS[where], rewards_A.device) == "triton":
        launch = kernels_of("decay_advantage", "triton").decay_advantage
        keys = (question_idx_A, attempt_idx_A) if baseline_group == "question_attempt" else (question_idx_A,)
        decay: dict[str, Any] = {"schedule": schedule, "factor": factor, "num_factors": num_factors}
        return launch(rewards_A, attempt_idx_A, num_tokens_A, keys, estimator=estimator, eps=eps, **decay)[1]
    if schedule != "none":
        rewards_A = decay_rewards(rewards_A, attempt_idx_A, schedule=schedule, factor=factor, impl="ref")
    given = rewards_A, num_tokens_A, question_idx_A, attempt_idx_A
    return compute_advantages_ref(*given, estimator=estimator, baseline_group=baseline_group, eps=eps)


def _check_decay_inputs(
    check: TensorChecker, rewards_A: Tensor, attempt_idx_A: Tensor, schedule: str, factor: float | None
) -> int:
    """The rules of decay_factors' docstring; the number of attempt indices up to the largest."""
    where = check.where
    check("rewards_A", rewards_A, WIDE_FLOATS)
    check("attempt_idx_A", attempt_idx_A, INDEX)
    check.finite("rewards_A", rewards_A)
    check.finite("attempt_idx_A", attempt_idx_A, at_least=0)
    check_word(where, "schedule", schedule, get_args(Schedule))
    if schedule == "constant":
        check_rule(where, "factor", factor, factor is not None and 0 <= factor <= 1, "in [0, 1] with schedule constant")
    else:
        check_rule(where, "factor", factor, factor is None, f"None with schedule {schedule}")
    if rewards_A.numel() == 0:
        return 0
    first, last = (int(idx) for idx in attempt_idx_A.aminmax())
    check_rule(where, "attempt_idx_A", first, schedule != "batch_mean" or first == 0, "0 for at least one attempt")
    return last + 1


def _check_advantage_inputs(
    check: TensorChecker,
    num_tokens_A: Tensor,
    question_idx_A: Tensor,
    estimator: str,
    baseline_group: str,
    eps: float,
) -> None:
    """The other rules of compute_advantages' docstring, and the warning about grouping by attempt index."""
    where = check.where
    check("num_tokens_A", num_tokens_A, INDEX)
    check("question_idx_A", question_idx_A, INDEX)
    check.finite("num_tokens_A", num_tokens_A, at_least=0)
    check_word(where, "estimator", estimator, get_args(Estimator))
    check_word(where, "baseline_group", baseline_group, get_args(BaselineGroup))
    check_rule(where, "eps", eps, 0 <= eps < float("inf"), "finite and >= 0")
    if estimator in _WHITENED and num_tokens_A.sum() == 1:
        raise ValueError(
            f"{where}: num_tokens_A must sum to at least 2 to be whitened ({estimator}), got 1; use a larger batch"
        )
    if baseline_group == "question_attempt":
        warnings.warn(
            "compute_advantages: baseline_group question_attempt compares guided attempts with guided attempts only, "
            "which cancels reward decay; use question",
            stacklevel=3,
        )


def _group_indices(question_idx_A: Tensor, attempt_idx_A: Tensor, baseline_group: str) -> Tensor:
    """[A] int64, groups counted from 0."""
    group_A = question_idx_A.unique(return_inverse=True)[1]
    if baseline_group == "question_attempt":
        _, attempt_A = attempt_idx_A.unique(return_inverse=True)
        group_A = (group_A * (attempt_A.max() + 1) + attempt_A).unique(return_inverse=True)[1]
    return group_A


def _segment_sum(x_A: Tensor, segment_A: Tensor, num_segments: int | None = None) -> Tensor:
    """Sum of x over each segment, added in index order."""
    size = int(segment_A.max()) + 1 if num_segments is None else num_segments
    return x_A.new_zeros(size).index_add_(0, segment_A, x_A)


def _whiten(x_A: Tensor, num_tokens_A: Tensor) -> Tensor:
    """Mean 0 and unbiased variance 1 over loss tokens, attempt i standing for num_tokens_A[i] of them."""
    num_tokens = num_tokens_A.sum()
    deviation_A = x_A - (num_tokens_A * x_A).sum() / num_tokens
    variance = (num_tokens_A * deviation_A.square()).sum() / (num_tokens - 1)
    return deviation_A / torch.sqrt(variance + _WHITEN_EPS)
