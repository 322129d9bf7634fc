"""Turns the raw rewards of a batch into advantages on a GPU, in one launch.

Read top-down: decay_advantage sorts attempts into groups and launches _decay_advantage_kernel, a
single program. It goes over all attempts several times, a tile of BLOCK_A at once:

    1. factors      what each attempt index is multiplied by
    2. rewards      after decay and credit, and running sums along the groups
    3. centring     minus the group's baseline; token-weighted sum for whitening
    4. whitening    token-weighted variance
    5. advantages   scaled and written

    attempts in group order   | a0 a3 a5 a7 | a1 a2 | a4 a6 ..
    tiles                     [ tile 0   ][ tile 1    ][ tile 2 ..   a group may span tiles, so
                                                                     its sum is carried over
A batch has hundreds of attempts, so one program is enough: it needs no barrier across the grid, and
its cost depends on A only, not on the groups.

All is computed in fp64, like the reference in ops/decay_advantage.py: sums of fp32 rewards are then
exact, so equal rewards centre to exactly 0. Sums along groups are a segmented scan, whose order
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
    """Returns rewards after decay and credit [A] fp32, advantages [A] fp32, factors [K] fp64.

    Args: those of credit_attempts_ref in ops/decay_advantage.py, with rewards_A in fp64, and the
    fields of an estimator. K is num_factors.
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
    """Returns attempts in group order, and where the group of each of them begins and ends.

    Within a group, attempts are in index order.
    """
    order_A = torch.arange(keys_GA.shape[1], device=keys_GA.device)
    # Sorts by all keys, the first one most significant: each sort is stable, so it keeps the order
    # of the keys that were sorted by before.
    for key_A in reversed(keys_GA.unbind()):
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
    """Yields each kind of baseline, decay without one, and both kinds of factors and of credit."""
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
                group_dtype = torch.int64 if baseline != "none" else None
                pointers: dict[str, torch.dtype | None] = {
                    "rewards_ptr": dtype,
                    "attempt_ptr": torch.int64,
                    "num_tokens_ptr": torch.int64 if whitens else None,
                    "last_ptr": torch.int64 if by_trajectory else None,
                    **dict.fromkeys(("order_ptr", "begin_ptr", "end_ptr"), group_dtype),
                    "given_factors_ptr": None if is_batch_mean else dtype,
                    "scratch_ptr": dtype,
                    **dict.fromkeys(("earned_ptr", "advantages_ptr"), torch.float32),
                    "factors_ptr": dtype,
                }
                label_parts = [
                    f"baseline {baseline}",
                    *["by std"] * divides_by_std,
                    *["whitened"] * whitens,
                ]
                label_parts += [
                    "batch means" if is_batch_mean else "given factors",
                    *["trajectory"] * by_trajectory,
                ]
                yield AotConfig(
                    _decay_advantage_kernel,
                    architecture,
                    dtype,
                    ", ".join(label_parts),
                    num_warps,
                    pointers,
                    {
                        "BASELINE": baseline,
                        "DIVIDE_BY_STD": divides_by_std,
                        "WHITEN": whitens,
                        "BLOCK_A": block,
                    },
                )


# These numbers differ from batch to batch: not specialising on them gives one compiled kernel.
@triton.jit(do_not_specialize=["num_attempts", "num_factors"])
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
    """Computes rewards, advantages and factors of a batch, in one program."""
    grouped: tl.constexpr = BASELINE != "none"
    offs_a = tl.arange(0, BLOCK_A)
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
    # One thread reads what another one has stored: all stores must be done. The same holds for the
    # barriers below.
    tl.debug_barrier()

    # What each attempt earns, and running sums along the groups. From here on, i counts attempts in
    # group order, and `attempt` is the index of the i-th one.
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + offs_a
        mask = i < num_attempts
        attempt = tl.load(order_ptr + i, mask, other=0) if grouped else i
        source = attempt if last_ptr is None else tl.load(last_ptr + attempt, mask, other=0)
        attempt_idx = tl.load(attempt_ptr + source, mask, other=0)
        value = tl.load(rewards_ptr + source, mask, other=0.0) * tl.load(
            factors_ptr + attempt_idx, mask, other=0.0
        )
        # Rounded to fp32, as decay_rewards returns it and compute_advantages reads it.
        value = value.to(tl.float32).to(tl.float64)
        tl.store(earned_ptr + attempt, value.to(tl.float32), mask)
        tl.store(value_ptr + i, value, mask)
        if grouped:
            begin = tl.load(begin_ptr + i, mask, other=0)
            sums, carry = _sums_along_groups(value, begin, start, carry, BLOCK_A)
            tl.store(sum_ptr + i, sums, mask)
    tl.debug_barrier()

    # Subtracts the group's baseline; adds up values over loss tokens for the mean of whitening.
    token_sums = tl.zeros((BLOCK_A,), tl.float64)
    tokens = tl.zeros((BLOCK_A,), tl.float64)
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + offs_a
        mask = i < num_attempts
        value = tl.load(value_ptr + i, mask, other=0.0)
        if grouped:
            begin = tl.load(begin_ptr + i, mask, other=0)
            end = tl.load(end_ptr + i, mask, other=1)
            count = (end - begin).to(tl.float64)
            total = tl.load(sum_ptr + end - 1, mask, other=0.0)
            baseline = (
                (total - value) / tl.maximum(count - 1, 1.0)
                if BASELINE == "others"
                else total / count
            )
            # A group of one attempt has nothing to compare with: it keeps its value.
            value = tl.where(count == 1, value, value - baseline)
            tl.store(value_ptr + i, value, mask)
            if DIVIDE_BY_STD:
                sums, carry = _sums_along_groups(value * value, begin, start, carry, BLOCK_A)
                tl.store(square_sum_ptr + i, sums, mask)
        if WHITEN:
            attempt = tl.load(order_ptr + i, mask, other=0) if grouped else i
            num_tokens = tl.load(num_tokens_ptr + attempt, mask, other=0).to(tl.float64)
            token_sums += num_tokens * value
            tokens += num_tokens
    tl.debug_barrier()

    # Whitening: mean 0, variance 1 over loss tokens. An attempt counts once for each of its tokens.
    shift = zero
    scale = tl.full((), 1.0, tl.float64)
    if WHITEN:
        num_loss_tokens = tl.sum(tokens, 0)
        shift = tl.sum(token_sums, 0) / num_loss_tokens
        squares = tl.zeros((BLOCK_A,), tl.float64)
        for start in range(0, num_attempts, BLOCK_A):
            i = start + offs_a
            mask = i < num_attempts
            attempt = tl.load(order_ptr + i, mask, other=0) if grouped else i
            deviation = tl.load(value_ptr + i, mask, other=0.0) - shift
            num_tokens = tl.load(num_tokens_ptr + attempt, mask, other=0).to(tl.float64)
            squares += num_tokens * deviation * deviation
        scale = tl.sqrt(tl.sum(squares, 0) / (num_loss_tokens - 1) + _WHITEN_EPS)
    for start in range(0, num_attempts, BLOCK_A):
        i = start + offs_a
        mask = i < num_attempts
        attempt = tl.load(order_ptr + i, mask, other=0) if grouped else i
        value = (tl.load(value_ptr + i, mask, other=0.0) - shift) / scale
        if DIVIDE_BY_STD:
            begin = tl.load(begin_ptr + i, mask, other=0)
            end = tl.load(end_ptr + i, mask, other=1)
            count = (end - begin).to(tl.float64)
            square_sum = tl.load(square_sum_ptr + end - 1, mask, other=0.0)
            std = tl.where(count == 1, 1.0, tl.sqrt(square_sum / tl.maximum(count - 1, 1.0)))
            value /= std + tl.full((), eps, tl.float64)
        tl.store(advantages_ptr + attempt, value.to(tl.float32), mask)


@triton.jit
def _store_batch_means(
    factors_ptr, rewards_ptr, attempt_ptr, num_attempts, num_factors, BLOCK_A: tl.constexpr
):
    """Stores factors by the recurrence of _batch_means in ops/decay_advantage.py.

    The factor of attempt index n is the mean of all earlier rewards, each times its own factor.
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
            mask = i < num_attempts
            is_n = tl.load(attempt_ptr + i, mask, other=-1) == n
            reward = tl.load(rewards_ptr + i, mask, other=0.0)
            decayed_sum += factor * tl.sum(tl.where(is_n, reward, 0.0), 0)
            count += tl.sum(is_n.to(tl.float64), 0)


@triton.jit
def _sums_along_groups(value, begin, start, carry, BLOCK_A: tl.constexpr):
    """Returns running sums of a tile along groups, and the last one, to carry to the next tile.

    begin [BLOCK_A] is where the group of each attempt begins, in group order. `start` is the first
    attempt of the tile, carry the sum so far of the group that it may continue.
    """
    offs_a = tl.arange(0, BLOCK_A)
    _, sums = tl.associative_scan(
        ((begin == start + offs_a).to(tl.int32), value), 0, _add_within_group
    )
    sums += tl.where(begin < start, carry, 0.0)
    return sums, tl.sum(tl.where(offs_a == BLOCK_A - 1, sums, 0.0), 0)


@triton.jit
def _add_within_group(begins_a, sum_a, begins_b, sum_b):
    """Joins two runs of a segmented scan: b starts anew if a group begins in it."""
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)
