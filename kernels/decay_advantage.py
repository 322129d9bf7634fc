"""From raw rewards to advantages in one launch: decay, group baseline and whitening of a whole
batch.

Read top-down: decay_advantage sorts attempts into groups and launches _decay_advantage_kernel, a
single program that walks over the attempts in tiles: the factors, then sums along the groups, then
whitening. A batch has hundreds of attempts; one program needs no grid-wide barrier, and its cost
grows with A alone, however they are grouped.

Everything is in fp64, like the reference in ops/decay_advantage.py: sums of fp32 rewards are then
exact, so equal rewards centre to exactly 0. Sums along a group are a segmented scan, whose order
depends on A and the tile only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    Tile,
    architecture_of,
)

TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float64: Tile(64, 1)},
    80: {torch.float64: Tile(512, 8)},
    90: {torch.float64: Tile(512, 8)},
    100: {torch.float64: Tile(512, 8)},
}

_WHITEN_EPS = tl.constexpr(1e-8)


def decay_advantage(
    rewards_A: Tensor,
    attempt_idx_A: Tensor,
    num_tokens_A: Tensor | None,
    keys_GA: Tensor | None,
    last_A: Tensor | None,
    factors: list[float] | None,
    num_factors: int,
    baseline: str,
    divides_by_std: bool,
    whitens: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards after decay and credit [A] fp32, advantages [A] fp32, factors [num_factors] fp64.

    The arguments are those of credit_attempts_ref in ops/decay_advantage.py, rewards_A in fp64, and
    the fields of an estimator.
    """
    num_attempts = rewards_A.numel()
    earned_A = torch.empty_like(
        rewards_A, dtype=torch.float32, memory_format=torch.contiguous_format
    )
    advantages_A = torch.empty_like(earned_A)
    factors_K = rewards_A.new_zeros(num_factors)
    if num_attempts == 0:
        return earned_A, advantages_A, factors_K
    order_A, begin_A, end_A = (None, None, None) if keys_GA is None else _group_order(keys_GA)
    tile = TILES[architecture_of(rewards_A)][torch.float64]
    with torch.cuda.device_of(rewards_A):
        _decay_advantage_kernel[(1,)](
            rewards_A.contiguous(),
            attempt_idx_A.contiguous(),
            None if num_tokens_A is None else num_tokens_A.contiguous(),
            last_A,
            order_A,
            begin_A,
            end_A,
            None if factors is None else rewards_A.new_tensor(factors),
            rewards_A.new_empty((3, num_attempts)),
            earned_A,
            advantages_A,
            factors_K,
            num_attempts,
            num_factors,
            float(eps),
            BASELINE=baseline,
            DIVIDE_BY_STD=divides_by_std,
            WHITEN=whitens,
            BLOCK_A=tile.block,
            num_warps=tile.num_warps,
        )
    return earned_A, advantages_A, factors_K


def _group_order(keys_GA: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attempts group after group, in index order within each; where the group of each place begins
    and ends.
    """
    order_A = torch.arange(keys_GA.shape[1], device=keys_GA.device)
    for key_A in reversed(keys_GA.unbind()):  # stable: the last sort is by the first key
        order_A = order_A[key_A[order_A].argsort(stable=True)]
    changes_A = torch.zeros_like(order_A, dtype=torch.bool)
    changes_A[1:] = (keys_GA[:, order_A].diff(dim=1) != 0).any(dim=0)
    group_A = changes_A.cumsum(0)  # ascending
    return (
        order_A,
        torch.searchsorted(group_A, group_A),
        torch.searchsorted(group_A, group_A, right=True),
    )


def aot_configs() -> AotConfigs:
    """Every way to compare attempts once, decay alone, and both kinds of factors and of credit."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            for baseline, divides_by_std, whitens, is_batch_mean, by_trajectory in (
                ("none", False, False, True, False),
                ("none", False, True, False, True),
                ("mean", False, True, True, False),
                ("mean", False, True, True, True),
                ("mean", True, False, True, False),
                ("mean", False, False, False, False),
                ("others", False, False, True, True),
            ):
                grouped = torch.int64 if baseline != "none" else None
                pointers: dict[str, torch.dtype | None] = {
                    "rewards_ptr": dtype,
                    "attempt_ptr": torch.int64,
                    "num_tokens_ptr": torch.int64 if whitens else None,
                    "last_ptr": torch.int64 if by_trajectory else None,
                    **dict.fromkeys(("order_ptr", "begin_ptr", "end_ptr"), grouped),
                    "given_factors_ptr": None if is_batch_mean else dtype,
                    "scratch_ptr": dtype,
                    **dict.fromkeys(("earned_ptr", "advantages_ptr"), torch.float32),
                    "factors_ptr": dtype,
                }
                words = [
                    f"baseline {baseline}",
                    *["by std"] * divides_by_std,
                    *["whitened"] * whitens,
                ]
                words += [
                    "batch means" if is_batch_mean else "given factors",
                    *["trajectory"] * by_trajectory,
                ]
                yield AotConfig(
                    _decay_advantage_kernel,
                    architecture,
                    dtype,
                    ", ".join(words),
                    num_warps,
                    pointers,
                    {
                        "BASELINE": baseline,
                        "DIVIDE_BY_STD": divides_by_std,
                        "WHITEN": whitens,
                        "BLOCK_A": block,
                    },
                )


@triton.jit(
    do_not_specialize=["num_attempts", "num_factors"]
)  # they differ from batch to batch: one compiled kernel
def _decay_advantage_kernel(
    rewards_ptr,
    attempt_ptr,
    num_tokens_ptr,
    last_ptr,
    order_ptr,
    begin_ptr,
    end_ptr,
    given_factors_ptr,
    scratch_ptr,
    earned_ptr,
    advantages_ptr,
    factors_ptr,
    num_attempts,
    num_factors,
    eps: tl.float64,
    BASELINE: tl.constexpr,
    DIVIDE_BY_STD: tl.constexpr,
    WHITEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    grouped: tl.constexpr = BASELINE != "none"
    lanes = tl.arange(0, BLOCK_A)
    zero = tl.zeros((), tl.float64)
    value_ptr = scratch_ptr
    sum_ptr = scratch_ptr + num_attempts
    square_sum_ptr = scratch_ptr + 2 * num_attempts
    if given_factors_ptr is not None:
        for n in range(num_factors):
            tl.store(factors_ptr + n, tl.load(given_factors_ptr + n))
    else:
        _store_batch_means(
            factors_ptr, rewards_ptr, attempt_ptr, num_attempts, num_factors, BLOCK_A
        )
    tl.debug_barrier()

    # What each attempt earns, and its sums along each group. From here on, place i is the i-th
    # attempt in group order.
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + lanes
        inside = i < num_attempts
        attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
        source = (
            attempt_of_place
            if last_ptr is None
            else tl.load(last_ptr + attempt_of_place, inside, other=0)
        )
        attempt_idx = tl.load(attempt_ptr + source, inside, other=0)
        value = tl.load(rewards_ptr + source, inside, other=0.0) * tl.load(
            factors_ptr + attempt_idx, inside, other=0.0
        )
        value = value.to(tl.float32).to(
            tl.float64
        )  # what decay_rewards hands to compute_advantages
        tl.store(earned_ptr + attempt_of_place, value.to(tl.float32), inside)
        tl.store(value_ptr + i, value, inside)
        if grouped:
            begin = tl.load(begin_ptr + i, inside, other=0)
            sums, carry = _sums_along_groups(value, begin, start, carry, BLOCK_A)
            tl.store(sum_ptr + i, sums, inside)
    tl.debug_barrier()

    # Less the group's baseline; the sum over loss tokens.
    token_sums = tl.zeros((BLOCK_A,), tl.float64)
    tokens = tl.zeros((BLOCK_A,), tl.float64)
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + lanes
        inside = i < num_attempts
        value = tl.load(value_ptr + i, inside, other=0.0)
        if grouped:
            begin = tl.load(begin_ptr + i, inside, other=0)
            end = tl.load(end_ptr + i, inside, other=1)
            count = (end - begin).to(tl.float64)
            total = tl.load(sum_ptr + end - 1, inside, other=0.0)
            baseline = (
                (total - value) / tl.maximum(count - 1, 1.0)
                if BASELINE == "others"
                else total / count
            )
            value = tl.where(count == 1, value, value - baseline)
            tl.store(value_ptr + i, value, inside)
            if DIVIDE_BY_STD:
                sums, carry = _sums_along_groups(value * value, begin, start, carry, BLOCK_A)
                tl.store(square_sum_ptr + i, sums, inside)
        if WHITEN:
            attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
            num_tokens = tl.load(num_tokens_ptr + attempt_of_place, inside, other=0).to(tl.float64)
            token_sums += num_tokens * value
            tokens += num_tokens
    tl.debug_barrier()

    shift = zero
    scale = tl.full((), 1.0, tl.float64)
    if WHITEN:
        num_loss_tokens = tl.sum(tokens, 0)
        shift = tl.sum(token_sums, 0) / num_loss_tokens
        squares = tl.zeros((BLOCK_A,), tl.float64)
        for start in range(0, num_attempts, BLOCK_A):
            i = start + lanes
            inside = i < num_attempts
            attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
            deviation = tl.load(value_ptr + i, inside, other=0.0) - shift
            num_tokens = tl.load(num_tokens_ptr + attempt_of_place, inside, other=0).to(tl.float64)
            squares += num_tokens * deviation * deviation
        scale = tl.sqrt(tl.sum(squares, 0) / (num_loss_tokens - 1) + _WHITEN_EPS)
    for start in range(0, num_attempts, BLOCK_A):
        i = start + lanes
        inside = i < num_attempts
        attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
        value = (tl.load(value_ptr + i, inside, other=0.0) - shift) / scale
        if DIVIDE_BY_STD:
            begin = tl.load(begin_ptr + i, inside, other=0)
            end = tl.load(end_ptr + i, inside, other=1)
            count = (end - begin).to(tl.float64)
            square_sum = tl.load(square_sum_ptr + end - 1, inside, other=0.0)
            std = tl.where(count == 1, 1.0, tl.sqrt(square_sum / tl.maximum(count - 1, 1.0)))
            value /= std + tl.full((), eps, tl.float64)
        tl.store(advantages_ptr + attempt_of_place, value.to(tl.float32), inside)


@triton.jit
def _store_batch_means(
    factors_ptr, rewards_ptr, attempt_ptr, num_attempts, num_factors, BLOCK_A: tl.constexpr
):
    """Factors by the recurrence of _batch_means in ops/decay_advantage.py, one attempt index at a
    time.
    """
    decayed_sum = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    factor = tl.full((), 1.0, tl.float64)
    for n in range(num_factors):
        if n > 0:
            factor = decayed_sum / count
        tl.store(factors_ptr + n, factor)
        for start in range(0, num_attempts, BLOCK_A):
            i = start + tl.arange(0, BLOCK_A)
            inside = i < num_attempts
            is_n = tl.load(attempt_ptr + i, inside, other=-1) == n
            reward = tl.load(rewards_ptr + i, inside, other=0.0)
            decayed_sum += factor * tl.sum(tl.where(is_n, reward, 0.0), 0)
            count += tl.sum(is_n.to(tl.float64), 0)


@triton.jit
def _sums_along_groups(value, begin, start, carry, BLOCK_A: tl.constexpr):
    """Of each place the sum over its group up to it, and the last one, which the next tile's first
    group may continue.

    begin is where the group of each place begins, carry the sum so far of the group open at
    `start`, the first place.
    """
    lanes = tl.arange(0, BLOCK_A)
    _, sums = tl.associative_scan(
        ((begin == start + lanes).to(tl.int32), value), 0, _add_within_group
    )
    sums += tl.where(begin < start, carry, 0.0)
    return sums, tl.sum(tl.where(lanes == BLOCK_A - 1, sums, 0.0), 0)


@triton.jit
def _add_within_group(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)
