"""From raw rewards to advantages in one launch: decay, group baseline and whitening of a whole batch.

Read top-down: decay_advantage sorts attempts into groups and launches _decay_advantage_kernel, a single program that
walks over the attempts in tiles: _decay_factors, then sums along the groups, then whitening. A batch has hundreds of
attempts; one program needs no grid-wide barrier, and its cost grows with A alone, however they are grouped.

Everything is in fp64, like the reference in ops/decay_advantage.py: sums of fp32 rewards are then exact, so equal
rewards centre to exactly 0. Sums along a group are a segmented scan, whose order depends on A and the tile only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import ARCHITECTURES, INTERPRETER, AotConfig, AotConfigs, Tile, architecture_of

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
    num_tokens_A: Tensor | None = None,
    group_keys: tuple[Tensor, ...] = (),
    *,
    schedule: str,
    factor: float | None,
    num_factors: int,
    estimator: str = "none",
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Rewards after decay and, unless estimator is "none", advantages, as ops/decay_advantage.py defines them.

    Args: group_keys are int64 [A] tensors; attempts that agree in all of them are a group. num_factors is more than any
    attempt index. num_tokens_A is needed by estimators that whiten.

    Returns: decayed rewards [A] fp32, advantages [A] fp32 ([0] without an estimator).
    """
    num_attempts = rewards_A.numel()
    decayed_A = torch.empty_like(rewards_A, dtype=torch.float32, memory_format=torch.contiguous_format)
    advantages_A = torch.empty_like(decayed_A[:0] if estimator == "none" else decayed_A)
    if num_attempts == 0:
        return decayed_A, advantages_A
    grouped = estimator not in ("none", "reinforce_plus_plus")
    order_A, begin_A, end_A = _group_order(group_keys) if grouped else (None, None, None)
    tile = TILES[architecture_of(rewards_A)][torch.float64]
    with torch.cuda.device_of(rewards_A):
        _decay_advantage_kernel[(1,)](
            rewards_A.double().contiguous(),
            attempt_idx_A.contiguous(),
            None if num_tokens_A is None else num_tokens_A.contiguous(),
            order_A,
            begin_A,
            end_A,
            rewards_A.new_empty((3, num_attempts), dtype=torch.float64),
            decayed_A,
            None if estimator == "none" else advantages_A,
            num_attempts,
            1.0 if factor is None else float(factor),
            float(eps),
            SCHEDULE=schedule,
            ESTIMATOR=estimator,
            BLOCK_A=tile.block,
            BLOCK_K=triton.next_power_of_2(num_factors),
            num_warps=tile.num_warps,
        )
    return decayed_A, advantages_A


def _group_order(keys: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Attempts group after group, in index order within each; where the group of each place begins and ends."""
    order_A = torch.arange(keys[0].numel(), device=keys[0].device)
    for key_A in reversed(keys):  # stable: the last sort is by the first key
        order_A = order_A[key_A[order_A].argsort(stable=True)]
    changes_A = torch.zeros_like(order_A, dtype=torch.bool)
    for key_A in keys:
        changes_A[1:] |= key_A[order_A].diff() != 0
    group_A = changes_A.cumsum(0)  # ascending
    return order_A, torch.searchsorted(group_A, group_A), torch.searchsorted(group_A, group_A, right=True)


def aot_configs() -> AotConfigs:
    """Every estimator and every schedule once, and decay alone, at up to 8 attempts a rollout."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            for estimator, schedule in (
                ("none", "batch_mean"),
                ("reinforce_plus_plus", "constant"),
                ("reinforce_plus_plus_baseline", "batch_mean"),
                ("grpo", "batch_mean"),
                ("dr_grpo", "none"),
                ("rloo", "none"),
            ):
                pointers: dict[str, torch.dtype | None] = {"rewards_ptr": dtype, "scratch_ptr": dtype}
                pointers |= dict.fromkeys(("attempt_ptr", "num_tokens_ptr"), torch.int64)
                pointers |= dict.fromkeys(("decayed_ptr", "advantages_ptr"), torch.float32)
                if estimator == "none":
                    pointers |= {"advantages_ptr": None, "num_tokens_ptr": None}
                grouped = None if estimator in ("none", "reinforce_plus_plus") else torch.int64
                pointers |= dict.fromkeys(("order_ptr", "begin_ptr", "end_ptr"), grouped)
                yield AotConfig(
                    _decay_advantage_kernel,
                    architecture,
                    dtype,
                    f"{estimator}, {schedule}" if estimator != "none" else f"decay alone, {schedule}",
                    num_warps,
                    pointers,
                    {"SCHEDULE": schedule, "ESTIMATOR": estimator, "BLOCK_A": block, "BLOCK_K": 8},
                )


@triton.jit(do_not_specialize=["num_attempts"])  # it differs from batch to batch: one compiled kernel for all
def _decay_advantage_kernel(
    rewards_ptr,
    attempt_ptr,
    num_tokens_ptr,
    order_ptr,
    begin_ptr,
    end_ptr,
    scratch_ptr,
    decayed_ptr,
    advantages_ptr,
    num_attempts,
    factor: tl.float64,
    eps: tl.float64,
    SCHEDULE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    whiten: tl.constexpr = ESTIMATOR == "reinforce_plus_plus" or ESTIMATOR == "reinforce_plus_plus_baseline"
    grouped: tl.constexpr = order_ptr is not None
    lanes = tl.arange(0, BLOCK_A)
    zero = tl.zeros((), tl.float64)
    value_ptr, sum_ptr, square_sum_ptr = scratch_ptr, scratch_ptr + num_attempts, scratch_ptr + 2 * num_attempts
    factors = _decay_factors(rewards_ptr, attempt_ptr, num_attempts, factor, SCHEDULE, BLOCK_A, BLOCK_K)

    # Decayed rewards, and their sums along each group. From here on, place i is the i-th attempt in group order.
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + lanes
        inside = i < num_attempts
        attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
        value = tl.load(rewards_ptr + attempt_of_place, inside, other=0.0)
        if SCHEDULE != "none":
            is_k = tl.load(attempt_ptr + attempt_of_place, inside, other=0)[:, None] == tl.arange(0, BLOCK_K)[None, :]
            value *= tl.sum(tl.where(is_k, factors[None, :], 0.0), 1)
            value = value.to(tl.float32).to(tl.float64)  # what decay_rewards hands to compute_advantages
        tl.store(decayed_ptr + attempt_of_place, value.to(tl.float32), inside)
        tl.store(value_ptr + i, value, inside)
        if grouped:
            begin = tl.load(begin_ptr + i, inside, other=0)
            sums, carry = _sums_along_groups(value, begin, start, carry, BLOCK_A)
            tl.store(sum_ptr + i, sums, inside)
    tl.debug_barrier()

    # Less the group's baseline; the sum over loss tokens.
    token_sums, tokens = tl.zeros((BLOCK_A,), tl.float64), tl.zeros((BLOCK_A,), tl.float64)
    carry = zero
    for start in range(0, num_attempts, BLOCK_A):
        i = start + lanes
        inside = i < num_attempts
        value = tl.load(value_ptr + i, inside, other=0.0)
        if grouped:
            begin, end = tl.load(begin_ptr + i, inside, other=0), tl.load(end_ptr + i, inside, other=1)
            count = (end - begin).to(tl.float64)
            total = tl.load(sum_ptr + end - 1, inside, other=0.0)
            baseline = (total - value) / tl.maximum(count - 1, 1.0) if ESTIMATOR == "rloo" else total / count
            value = tl.where(count == 1, value, value - baseline)
            tl.store(value_ptr + i, value, inside)
            if ESTIMATOR == "grpo":
                sums, carry = _sums_along_groups(value * value, begin, start, carry, BLOCK_A)
                tl.store(square_sum_ptr + i, sums, inside)
        if whiten:
            attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
            num_tokens = tl.load(num_tokens_ptr + attempt_of_place, inside, other=0).to(tl.float64)
            token_sums += num_tokens * value
            tokens += num_tokens
    tl.debug_barrier()

    shift, scale = zero, tl.full((), 1.0, tl.float64)
    if whiten:
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
    if ESTIMATOR != "none":
        for start in range(0, num_attempts, BLOCK_A):
            i = start + lanes
            inside = i < num_attempts
            attempt_of_place = tl.load(order_ptr + i, inside, other=0) if grouped else i
            value = (tl.load(value_ptr + i, inside, other=0.0) - shift) / scale
            if ESTIMATOR == "grpo":
                begin, end = tl.load(begin_ptr + i, inside, other=0), tl.load(end_ptr + i, inside, other=1)
                count = (end - begin).to(tl.float64)
                square_sum = tl.load(square_sum_ptr + end - 1, inside, other=0.0)
                std = tl.where(count == 1, 1.0, tl.sqrt(square_sum / tl.maximum(count - 1, 1.0)))
                value /= std + tl.full((), eps, tl.float64)
            tl.store(advantages_ptr + attempt_of_place, value.to(tl.float32), inside)


@triton.jit
def _decay_factors(
    rewards_ptr,
    attempt_ptr,
    num_attempts,
    factor,
    SCHEDULE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K] fp64: what the raw reward of attempt 0, 1, .. is multiplied by; the recurrence of decay_factors."""
    kinds = tl.arange(0, BLOCK_K)
    factors = tl.full((BLOCK_K,), 1.0, tl.float64)
    if SCHEDULE == "constant":
        latest = tl.full((), 1.0, tl.float64)
        for n in range(1, BLOCK_K):
            latest *= tl.full((), factor, tl.float64)
            factors = tl.where(kinds == n, latest, factors)
    if SCHEDULE == "batch_mean":
        sums, counts = tl.zeros((BLOCK_K,), tl.float64), tl.zeros((BLOCK_K,), tl.float64)
        for start in range(0, num_attempts, BLOCK_A):
            i = start + tl.arange(0, BLOCK_A)
            inside = i < num_attempts
            is_k = tl.load(attempt_ptr + i, inside, other=-1)[:, None] == kinds[None, :]
            sums += tl.sum(tl.where(is_k, tl.load(rewards_ptr + i, inside, other=0.0)[:, None], 0.0), 0)
            counts += tl.sum(is_k.to(tl.float64), 0)
        decayed_sum, count = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
        for n in range(BLOCK_K):
            if n > 0:
                factors = tl.where(kinds == n, decayed_sum / count, factors)
            decayed_sum += tl.sum(tl.where(kinds == n, factors * sums, 0.0), 0)
            count += tl.sum(tl.where(kinds == n, counts, 0.0), 0)
    return factors


@triton.jit
def _sums_along_groups(value, begin, start, carry, BLOCK_A: tl.constexpr):
    """Of each place the sum over its group up to it, and the last one, which the next tile's first group may continue.

    begin is where the group of each place begins, carry the sum so far of the group open at `start`, the first place.
    """
    lanes = tl.arange(0, BLOCK_A)
    _, sums = tl.associative_scan(((begin == start + lanes).to(tl.int32), value), 0, _add_within_group)
    sums += tl.where(begin < start, carry, 0.0)
    return sums, tl.sum(tl.where(lanes == BLOCK_A - 1, sums, 0.0), 0)


@triton.jit
def _add_within_group(begins_a, sum_a, begins_b, sum_b):
    return begins_a | begins_b, tl.where(begins_b != 0, sum_b, sum_a + sum_b)
