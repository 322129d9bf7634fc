"""Turns the raw rewards of a batch into one advantage per attempt.

    raw rewards --decay--> times factors_K --credit--> rewards_A --baseline, whiten--> advantages_A

Read credit_attempts_ref, which is the formula, then credit_attempts. decay_rewards, and
compute_advantages in its own file, return parts of its result.

Departures from the textbook:

- The factor of attempt n is the batch's mean reward of all earlier attempts, after their decay. So
  a success with guidance never earns more than a success without it.
- A baseline's group is a question, with its first and later attempts together. If attempts were
  grouped by index, dividing by the group's std would undo the decay.
- Whitening counts an attempt once per loss token. But with outcome rewards and no discount all
  tokens of an attempt have the same advantage, so nothing of size [A, length] exists.

Everything is in fp64, and sums over a group run in index order for any number of threads, so equal
rewards are centred to exactly 0. A is a few hundred: csrc/decay_advantage.cpp uses one thread, and
kernels/decay_advantage.py one launch of one program.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from socpo_fast.ops._checks import INDEX, WIDE_FLOATS, TensorChecker, check_rule, has_no_values
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op
from socpo_fast.ops.credit_options import CreditOptions
from socpo_fast.registries import ESTIMATORS, Baseline, Estimator

WHITEN_EPS = 1e-8
# Attempts of a rollout. A table has an entry per attempt index, and another kind of index passed by
# mistake would make it huge.
MAX_ATTEMPTS = 256
_REWARDS_ONLY = Estimator(baseline="none")


class Credit(NamedTuple):
    """The rewards and advantages of a batch's attempts, on the device of their raw rewards."""

    rewards_A: Tensor  # [A] fp32, after decay and credit
    advantages_A: Tensor  # [A] fp32
    factors_K: Tensor  # [K] fp64: the decay factors of attempts 0, 1, ..


def credit_attempts_ref(
    raw_A: Tensor,
    attempt_idx_A: Tensor,
    num_tokens_A: Tensor | None,
    keys_GA: Tensor | None,
    last_A: Tensor | None,
    *,
    factors: list[float] | None,
    num_factors: int,
    estimator: Estimator,
    eps: float,
) -> Credit:
    """Computes `credit_attempts`, unchecked, on the host.

    last_A [A] int64 is the attempt whose reward an attempt earns; None: its own. factors None:
    means of the batch's rewards. keys_GA is explained in _run.
    """
    factors = _batch_means(raw_A, attempt_idx_A, num_factors) if factors is None else factors
    factors_K = torch.tensor(factors, dtype=torch.float64)
    earned_A = (raw_A * factors_K[attempt_idx_A]).float()
    earned_A = earned_A if last_A is None else earned_A[last_A]
    x_A = earned_A.double()
    if keys_GA is not None:
        group_A = keys_GA.unique(dim=1, return_inverse=True)[1]
        count_A = group_A.bincount()[group_A].double()
        sum_A = group_A.bincount(x_A)[group_A]
        num_others_A = (count_A - 1).clamp(min=1)
        baseline_A = (
            (sum_A - x_A) / num_others_A if estimator.baseline == "others" else sum_A / count_A
        )
        # A single attempt would be its own baseline, and learn nothing; it is left as it is.
        x_A = torch.where(count_A == 1, x_A, x_A - baseline_A)
        if estimator.divides_by_std:
            variance_A = group_A.bincount(x_A.square())[group_A] / num_others_A
            x_A = x_A / (torch.where(count_A == 1, 1.0, variance_A.sqrt()) + eps)
    if estimator.whitens:
        assert num_tokens_A is not None, "only rewards are asked for without it"
        # Mean and variance over tokens, all tokens of an attempt having the same value.
        weight_A = num_tokens_A.double()
        x_A = x_A - (weight_A * x_A).sum() / weight_A.sum()
        variance = (weight_A * x_A.square()).sum() / (weight_A.sum() - 1)
        x_A = x_A / torch.sqrt(variance + WHITEN_EPS)
    return Credit(earned_A, x_A.float(), factors_K)


def credit_attempts(
    rewards_A: Tensor,
    num_tokens_A: Tensor,
    question_idx_A: Tensor,
    attempt_idx_A: Tensor,
    rollout_idx_A: Tensor | None = None,
    *,
    options: CreditOptions,
    impl: str = "auto",
) -> Credit:
    """Computes rewards after decay, and advantages, of a batch; CreditOptions has the formulas.

    Args:
        rewards_A:      [A] fp32 or fp64, finite. Raw rewards of all attempts of the batch.
        num_tokens_A:   [A] int64, >= 0. Loss tokens of each attempt.
        question_idx_A: [A] int64, any values; equal values are one question of the batch.
        attempt_idx_A:  [A] int64, in [0, 256). 0 is an attempt without guidance; batch_mean needs
                        at least one.
        rollout_idx_A:  [A] int64, any values; attempts with equal question and rollout are one
                        rollout. Needed if options.credit is "trajectory".
        impl:           "auto", "ref", "cpp" or "triton".

    Returns:
        Credit. Advantages are all zero, with a warning, if the batch has no loss tokens.

    Raises:
        ValueError: an argument breaks the rules above, or a whitened batch has a single loss token.

    Gradient: none. Memory: no [A, length] tensor. Bitwise: same inputs, same bits.
    """
    where = "compute_advantages"
    estimator = ESTIMATORS[options.estimator]
    check = TensorChecker(where)
    num_factors = _check_rewards(check, rewards_A, attempt_idx_A, options)
    check.each(INDEX, num_tokens_A=num_tokens_A, question_idx_A=question_idx_A)
    check.finite("num_tokens_A", num_tokens_A, at_least=0)
    rollouts_2A = None
    if options.credit == "trajectory":
        check_rule(
            where, "rollout_idx_A", None, rollout_idx_A is not None, "given with credit trajectory"
        )
        assert rollout_idx_A is not None
        check("rollout_idx_A", rollout_idx_A, INDEX)
        rollouts_2A = torch.stack((question_idx_A, rollout_idx_A))
    has_tokens = has_no_values(num_tokens_A) or bool(num_tokens_A.any())
    if not has_tokens:
        warnings.warn(f"{where}: the batch has no loss tokens; all advantages are 0", stacklevel=2)
        estimator = _REWARDS_ONLY
    elif estimator.whitens and not has_no_values(num_tokens_A) and num_tokens_A.sum() == 1:
        raise ValueError(
            f"{where}: num_tokens_A must sum to at least 2 to be whitened "
            f"({options.estimator}), got 1; use a larger batch"
        )
    keys = (
        (question_idx_A, attempt_idx_A)
        if options.baseline_group == "question_attempt"
        else (question_idx_A,)
    )
    keys_GA = None if estimator.baseline == "none" else torch.stack(keys)
    credit = _run(
        where,
        impl,
        options,
        num_factors,
        estimator,
        rewards_A,
        attempt_idx_A,
        num_tokens_A,
        keys_GA,
        rollouts_2A,
    )
    if has_tokens:
        return credit
    return credit._replace(advantages_A=torch.zeros_like(credit.rewards_A))


def decay_rewards(
    rewards_A: Tensor,
    attempt_idx_A: Tensor,
    *,
    schedule: str = "batch_mean",
    factor: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns rewards after decay: a success with guidance is worth less than one without.

    Args: those of `credit_attempts` and `CreditOptions`.

    Returns:
        [A] fp32, on the device of rewards_A. Rewards of attempt 0 are not changed.

    Raises:
        ValueError: as `credit_attempts` and `CreditOptions`.

    Gradient: none. Bitwise: same inputs, same bits.
    """
    where = "decay_rewards"
    options = CreditOptions(schedule=schedule, factor=factor)
    num_factors = _check_rewards(TensorChecker(where), rewards_A, attempt_idx_A, options)
    return _run(
        where, impl, options, num_factors, _REWARDS_ONLY, rewards_A, attempt_idx_A
    ).rewards_A


def _run(
    where: str,
    impl: str,
    options: CreditOptions,
    num_factors: int,
    estimator: Estimator,
    rewards_A: Tensor,
    attempt_idx_A: Tensor,
    num_tokens_A: Tensor | None = None,
    keys_GA: Tensor | None = None,
    rollouts_2A: Tensor | None = None,
) -> Credit:
    """Picks the implementation and calls it.

    num_tokens_A: None if only rewards are needed.
    keys_GA:      [G, A] int64: attempts whose columns are equal are a group; None: no baseline.
    rollouts_2A:  [2, A] int64: attempts whose columns are equal are one rollout, and all earn the
                  reward of its last attempt; None: each attempt earns its own.
    """
    raw_A = rewards_A.detach().double()
    outputs = _credit_attempts(
        raw_A,
        attempt_idx_A,
        num_tokens_A,
        keys_GA,
        rollouts_2A,
        options.factors(num_factors),
        num_factors,
        estimator.baseline,
        estimator.divides_by_std,
        estimator.whitens,
        options.eps,
        pick_impl(where, impl, raw_A),
    )
    return Credit(*outputs)


def _kernel(
    raw_A: Tensor,
    attempt_idx_A: Tensor,
    num_tokens_A: Tensor | None,
    keys_GA: Tensor | None,
    rollouts_2A: Tensor | None,
    factors: list[float] | None,
    num_factors: int,
    baseline: Baseline,
    divides_by_std: bool,
    whitens: bool,
    eps: float,
    impl: str,
) -> tuple[Tensor, ...]:
    last_A = None if rollouts_2A is None else _last_of_rollout(rollouts_2A, attempt_idx_A)
    tensors = num_tokens_A, keys_GA, last_A
    if impl != "ref":
        return kernels_of("decay_advantage", impl).decay_advantage(
            raw_A,
            attempt_idx_A,
            *tensors,
            factors,
            num_factors,
            baseline,
            divides_by_std,
            whitens,
            eps,
        )
    credit = credit_attempts_ref(
        raw_A.cpu(),
        attempt_idx_A.cpu(),
        *(None if x is None else x.cpu() for x in tensors),
        factors=factors,
        num_factors=num_factors,
        estimator=Estimator(baseline=baseline, divides_by_std=divides_by_std, whitens=whitens),
        eps=eps,
    )
    return tuple(x.to(raw_A.device) for x in credit)


def _fake(raw_A: Tensor, *args: Any) -> tuple[Tensor, ...]:
    earned_A = raw_A.new_empty(raw_A.shape, dtype=torch.float32)
    return earned_A, torch.empty_like(earned_A), raw_A.new_empty((args[5],))  # num_factors


_credit_attempts = define_op(
    "credit_attempts(Tensor raw, Tensor attempt_idx, Tensor? num_tokens, Tensor? keys, "
    "Tensor? rollouts, float[]? factors, SymInt num_factors, str baseline, bool divides_by_std, "
    "bool whitens, float eps, str impl) -> (Tensor earned, Tensor advantages, Tensor factors)",
    _kernel,
    fake=_fake,
)


def _check_rewards(
    check: TensorChecker, rewards_A: Tensor, attempt_idx_A: Tensor, options: CreditOptions
) -> int:
    """Checks rewards and indices; returns the largest attempt index + 1, or 0 without attempts."""
    check("rewards_A", rewards_A, WIDE_FLOATS)
    check("attempt_idx_A", attempt_idx_A, INDEX)
    check.every("rewards_A", rewards_A, rewards_A.float().isfinite(), "finite in fp32")
    check.finite("attempt_idx_A", attempt_idx_A, at_least=0)
    # Without values, as under torch.compile, the table of factors has its largest size.
    if has_no_values(rewards_A):
        return MAX_ATTEMPTS
    if rewards_A.numel() == 0:
        return 0
    first, last = (int(idx) for idx in attempt_idx_A.aminmax())
    if options.schedule == "batch_mean":
        check_rule(check.where, "attempt_idx_A", first, first == 0, "0 for at least one attempt")
    check_rule(check.where, "attempt_idx_A", last, last < MAX_ATTEMPTS, f"below {MAX_ATTEMPTS}")
    return last + 1


def _last_of_rollout(rollouts_2A: Tensor, attempt_idx_A: Tensor) -> Tensor:
    """Returns [A]: for each attempt, the row of the last attempt of its rollout."""
    num_attempts = attempt_idx_A.numel()
    rollout_A = rollouts_2A.unique(dim=1, return_inverse=True)[1]
    # One number holds attempt index and row. A maximum over a rollout finds its last attempt (of
    # equal indices the last row), and the row is the remainder.
    code_A = attempt_idx_A * num_attempts + torch.arange(num_attempts, device=attempt_idx_A.device)
    last_A = torch.zeros_like(code_A).scatter_reduce_(0, rollout_A, code_A, "amax")[rollout_A]
    return last_A % max(num_attempts, 1)


def _batch_means(raw_A: Tensor, attempt_idx_A: Tensor, num_factors: int) -> list[float]:
    """Returns f_0, f_1, .. of the schedule batch_mean.

    f_n depends on f_0 .. f_(n - 1), so this is a loop over the few attempt indices.
    """
    sums = attempt_idx_A.bincount(raw_A, num_factors).tolist()
    counts = attempt_idx_A.bincount(minlength=num_factors).tolist()
    factors: list[float] = []
    decayed_sum = 0.0
    count = 0
    for n in range(num_factors):
        factors.append(decayed_sum / count if n > 0 else 1.0)
        decayed_sum += factors[n] * sums[n]
        count += counts[n]
    return factors
