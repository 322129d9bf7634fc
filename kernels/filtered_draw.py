"""Draws restricted by top-k, top-p and min-p on a GPU, without a sort.

Read top-down: filtered_draw launches _filtered_draw_kernel, a program a row. It looks for two
thresholds, for top-k by counting and for top-p by adding up, and then draws among what is left.
_find_threshold is a bisection over the bits of the logits, in which order is that of integers: each
pass over the row tries eight thresholds at once and leaves an eighth of what could be one, so
eleven passes find any of 2^32 floats. Blocks without a logit above the lower bound are not read
again, which after a pass or two is nearly all of them.

Departures from the textbook. Nothing is sorted, counted with atomics or read by the host, and the
grid depends on the batch alone. Of equal logits at the threshold those with the lowest ids are
kept, as a stable sort would. Sums are fp32, in a fixed order; where a boundary is within their
rounding the kept set may differ from that of an exact sum.
"""

from typing import NamedTuple

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
from socpo_fast.kernels._noise import gumbel

# block: logits of a row that a program holds at once
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float32: Tile(1024, 1)},
    **{architecture: {torch.float32: Tile(2048, 8)} for architecture in ARCHITECTURES},
}
_TRIED = tl.constexpr(8)  # thresholds a pass
_LOWEST = tl.constexpr(-2147483648)


class Filters(NamedTuple):
    """Of each draw, [B]: as in `sample` of ops/."""

    top_k: Tensor  # int64, 0 is off
    top_p: Tensor  # fp32, 1 is off
    min_p: Tensor  # fp32, 0 is off


def filtered_draw(
    z_BV: Tensor,
    sums_2B: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    filters: Filters,
    draws: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Replaces what rows with a filter have drawn: token ids, log-probs, kept mass, in place.

    Args: z fp32, contiguous, logits over temperature; sums: the largest z of each row, and the log
    of the sum of exp(z - largest). A row whose sum is not finite keeps its draw.
    """
    num_draws, vocab = z_BV.shape
    tile = TILES[architecture_of(z_BV)][torch.float32]
    num_blocks = triton.cdiv(vocab, tile.block)
    _filtered_draw_kernel[(num_draws,)](
        z_BV,
        sums_2B,
        row_keys_B,
        temperature_B,
        *(x.contiguous() for x in filters),
        sums_2B.new_empty((num_draws, num_blocks)),
        *draws,
        num_draws,
        vocab,
        num_blocks,
        BLOCK_V=tile.block,
        num_warps=tile.num_warps,
    )


def aot_configs() -> AotConfigs:
    pointers = dict.fromkeys(("row_keys_ptr", "top_k_ptr", "token_ids_ptr"), torch.int64)
    names = (
        "z_ptr",
        "sums_ptr",
        "temperature_ptr",
        "top_p_ptr",
        "min_p_ptr",
        "block_max_ptr",
        "logprobs_ptr",
    )
    pointers |= dict.fromkeys((*names, "kept_mass_ptr"), torch.float32)
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            of = (_filtered_draw_kernel, architecture, dtype)
            for label, odd in (("even sizes", False), ("odd sizes", True)):
                yield AotConfig(*of, label, tile.num_warps, pointers, {"BLOCK_V": tile.block}, odd)


@triton.jit(
    do_not_specialize=["num_draws", "num_blocks"],
    do_not_specialize_on_alignment=[
        "row_keys_ptr",
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "min_p_ptr",
    ],
)
def _filtered_draw_kernel(
    z_ptr,
    sums_ptr,
    row_keys_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    block_max_ptr,
    token_ids_ptr,
    logprobs_ptr,
    kept_mass_ptr,
    num_draws,
    vocab,
    num_blocks,
    BLOCK_V: tl.constexpr,
):
    draw = tl.program_id(0)
    top_k = tl.load(top_k_ptr + draw)
    top_p = tl.load(top_p_ptr + draw)
    min_p = tl.load(min_p_ptr + draw)
    highest = tl.load(sums_ptr + draw)
    log_total = tl.load(sums_ptr + num_draws + draw)
    is_filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    if is_filtered & (tl.abs(log_total) < float("inf")):
        z_ptr += draw.to(tl.int64) * vocab
        block_max_ptr += draw.to(tl.int64) * num_blocks
        for block in range(num_blocks):
            z, _ = _load_block(z_ptr, block, vocab, BLOCK_V)
            tl.store(block_max_ptr + block, tl.max(z, 0))
        tl.debug_barrier()  # what a thread stored others read

        # Above the threshold all are kept, of those at it the first `num_ties`.
        threshold = tl.full((), _LOWEST, tl.int64)
        num_ties = tl.full((), 2147483647, tl.int64)
        total = tl.exp(log_total)
        if (top_k > 0) & (top_k < vocab):
            threshold, above = _find_threshold(
                z_ptr,
                block_max_ptr,
                highest,
                threshold,
                top_k.to(tl.float32),
                vocab,
                num_blocks,
                True,
                BLOCK_V,
            )
            num_ties = top_k - above.to(tl.int64)
            mass = _mass_above(z_ptr, block_max_ptr, highest, threshold, vocab, num_blocks, BLOCK_V)
            total = mass + num_ties.to(tl.float32) * _share_at(threshold, highest)
        if top_p < 1:
            at_least = threshold
            threshold, above = _find_threshold(
                z_ptr,
                block_max_ptr,
                highest,
                at_least,
                top_p * total,
                vocab,
                num_blocks,
                False,
                BLOCK_V,
            )
            share = _share_at(threshold, highest)
            reached = tl.ceil((top_p * total - above) / tl.maximum(share, 1e-38))
            num_here = tl.minimum(tl.maximum(reached, 1.0), 2147483000.0).to(tl.int64)
            num_ties = tl.where(threshold == at_least, tl.minimum(num_here, num_ties), num_here)

        row_key = tl.full((1,), 0, tl.int64) + tl.load(row_keys_ptr + draw)
        is_greedy = tl.load(temperature_ptr + draw) == 0
        best = float("-inf")
        best_z = float("-inf")
        kept_mass = 0.0
        best_id = tl.full((), 0, tl.int64)
        num_seen = tl.full((), 0, tl.int64)
        for block in range(num_blocks):
            if _key(tl.load(block_max_ptr + block)) >= threshold:
                z, token_ids = _load_block(z_ptr, block, vocab, BLOCK_V)
                keys = _key(z)
                is_tie = (keys == threshold) & (token_ids < vocab)
                tie_rank = num_seen + tl.cumsum(is_tie.to(tl.int32), 0) - 1
                num_seen += tl.sum(is_tie.to(tl.int32), 0)
                share = tl.exp(z - highest)
                is_kept = (keys > threshold) | (is_tie & (tie_rank < num_ties))
                is_kept = is_kept & (share >= min_p) & (token_ids < vocab)
                kept_mass += tl.sum(tl.where(is_kept, share, 0.0), 0)
                noise = tl.sum(gumbel(row_key, token_ids), 0)  # of one row
                scores = tl.where(is_kept, z + tl.where(is_greedy, 0.0, noise), float("-inf"))
                here = tl.max(scores, 0)
                id_here = tl.min(tl.where(is_kept & (scores == here), token_ids, vocab), 0)
                z_here = tl.max(tl.where(token_ids == id_here, z, float("-inf")), 0)
                best_z = tl.where(here > best, z_here, best_z)
                best_id = tl.where(here > best, id_here.to(tl.int64), best_id)
                best = tl.maximum(best, here)
        tl.store(token_ids_ptr + draw, best_id)
        tl.store(logprobs_ptr + draw, (best_z - highest) - log_total)
        tl.store(kept_mass_ptr + draw, kept_mass * tl.exp(-log_total))


@triton.jit
def _find_threshold(
    z_ptr,
    block_max_ptr,
    highest,
    at_least,
    target,
    vocab,
    num_blocks,
    BY_COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The lowest key, no less than at_least, above which there is less than the target; and how
    much that is.

    A count of logits, or a sum of exp(z - highest).
    """
    # above the highest one there is nothing
    low = at_least
    high = _key(highest).to(tl.int64)
    above = 0.0
    while low < high:
        tried = (
            low + (high - low) * tl.arange(0, _TRIED).to(tl.int64) // _TRIED
        )  # low is among them, high is not
        amounts = tl.zeros((_TRIED,), tl.float32)
        for block in range(num_blocks):
            if _key(tl.load(block_max_ptr + block)) > low:
                z, token_ids = _load_block(z_ptr, block, vocab, BLOCK_V)
                amount = tl.where(token_ids < vocab, 1.0, 0.0) if BY_COUNT else tl.exp(z - highest)
                is_above = _key(z).to(tl.int64)[None, :] > tried[:, None]
                amounts += tl.sum(tl.where(is_above, amount[None, :], 0.0), 1)
        # The first that is low enough is a bound from above, the one before it from below.
        is_low = amounts < target
        new_high = tl.min(tl.where(is_low, tried, high), 0)
        above = tl.where(new_high < high, tl.max(tl.where(is_low, amounts, 0.0), 0), above)
        low = tl.max(tl.where(is_low, low, tried + 1), 0)
        high = new_high
    return high, above


@triton.jit
def _mass_above(z_ptr, block_max_ptr, highest, threshold, vocab, num_blocks, BLOCK_V: tl.constexpr):
    """The sum of exp(z - highest) of logits whose key is above a threshold."""
    mass = 0.0
    for block in range(num_blocks):
        if _key(tl.load(block_max_ptr + block)) > threshold:
            z, _ = _load_block(z_ptr, block, vocab, BLOCK_V)
            is_above = _key(z).to(tl.int64) > threshold
            mass += tl.sum(tl.where(is_above, tl.exp(z - highest), 0.0), 0)
    return mass


@triton.jit
def _load_block(z_ptr, block, vocab, BLOCK_V: tl.constexpr):
    """A block of logits, -inf behind the last one, and its token ids."""
    token_ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    return tl.load(z_ptr + token_ids, token_ids < vocab, other=float("-inf")), token_ids


@triton.jit
def _key(z):
    """An int32 for each float, in the same order; both zeros have one."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _share_at(key, highest):
    """exp(z - highest) of the logit that has this key."""
    bits = key.to(tl.int32)
    return tl.exp((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - highest)
