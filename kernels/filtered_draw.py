"""Draws tokens restricted by top-k, top-p and min-p on a GPU, without a sort.

Read top-down: filtered_draw launches _filtered_draw_kernel, a program a row. It finds a threshold
for top-k by counting logits and one for top-p by adding up probabilities, and then draws among the
tokens that are kept. _find_threshold narrows an interval of thresholds, eight candidates a pass:

    thresholds       low = c0   c1   c2   c3 | c4   c5   c6   c7   high
    amount above                  >= target  |  < target             (count or probability)
    next pass                                low = c3 + 1, high = c4

A threshold is the int32 _key of a logit: floats and their keys have the same order. A pass leaves
an eighth of the interval, so eleven passes find any of 2^32 floats. Blocks without a logit above
the lower bound are not read again: after a pass or two, these are nearly all blocks.

Departures from the textbook. Nothing is sorted, counted with atomics or read by the host, and the
grid depends on the batch size only. Of equal logits at the threshold, those with the lowest ids are
kept, as by a stable sort. Sums are fp32, in a fixed order: where a boundary is within their
rounding, the kept set may differ from that of an exact sum.
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

# block: how many logits of a row a program holds at once
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float32: Tile(1024, 1)},
    **{architecture: {torch.float32: Tile(2048, 8)} for architecture in ARCHITECTURES},
}
_NUM_CANDIDATES = tl.constexpr(8)  # thresholds tried in a pass
_LOWEST_KEY = tl.constexpr(-2147483648)


class Filters(NamedTuple):
    """The filters of each draw, [B], as in ops/sample.py."""

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
    """Replaces the draws of rows with a filter: token ids, log-probs, kept mass, in place.

    Args: z_BV: fp32, contiguous, logits over temperature; sums_2B: the largest z of each row, and
    the log of the sum of exp(z - largest). A row whose sum is not finite keeps its draw.
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
    """Yields the launch above for even and odd sizes of the vocabulary."""
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
            kernel_and_dtype = (_filtered_draw_kernel, architecture, dtype)
            for label, odd_sizes in (("even sizes", False), ("odd sizes", True)):
                yield AotConfig(
                    *kernel_and_dtype,
                    label,
                    tile.num_warps,
                    pointers,
                    {"BLOCK_V": tile.block},
                    odd_sizes,
                )


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
    """Draws one token, if its row has a filter."""
    draw = tl.program_id(0)
    top_k = tl.load(top_k_ptr + draw)
    top_p = tl.load(top_p_ptr + draw)
    min_p = tl.load(min_p_ptr + draw)
    z_max = tl.load(sums_ptr + draw)
    log_total = tl.load(sums_ptr + num_draws + draw)
    is_filtered = ((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0)
    if is_filtered & (tl.abs(log_total) < float("inf")):
        z_ptr += draw.to(tl.int64) * vocab
        block_max_ptr += draw.to(tl.int64) * num_blocks
        for block in range(num_blocks):
            z, _ = _load_block(z_ptr, block, vocab, BLOCK_V)
            tl.store(block_max_ptr + block, tl.max(z, 0))
        tl.debug_barrier()  # threads read below what other threads have stored

        # All logits above the threshold are kept, and the first num_ties of those equal to it.
        # Thresholds are keys in 64 bits: sums and differences of two keys must not overflow.
        threshold = tl.full((), _LOWEST_KEY, tl.int64)
        num_ties = tl.full((), 2147483647, tl.int64)
        total = tl.exp(log_total)
        if (top_k > 0) & (top_k < vocab):
            threshold, above = _find_threshold(
                z_ptr,
                block_max_ptr,
                z_max,
                threshold,
                top_k.to(tl.float32),
                vocab,
                num_blocks,
                True,
                BLOCK_V,
            )
            num_ties = top_k - above.to(tl.int64)
            mass = _mass_above(z_ptr, block_max_ptr, z_max, threshold, vocab, num_blocks, BLOCK_V)
            total = mass + num_ties.to(tl.float32) * _rel_prob_at(threshold, z_max)
        if top_p < 1:
            # top_p is a share of what top-k has left, so its threshold is no lower.
            lower_bound = threshold
            threshold, above = _find_threshold(
                z_ptr,
                block_max_ptr,
                z_max,
                lower_bound,
                top_p * total,
                vocab,
                num_blocks,
                False,
                BLOCK_V,
            )
            # The fewest ties that reach top_p. exp(z - z_max) may be 0, hence 1e-38; the upper
            # bound is just below 2^31, to fit a count.
            rel_prob = _rel_prob_at(threshold, z_max)
            ties_needed = tl.ceil((top_p * total - above) / tl.maximum(rel_prob, 1e-38))
            num_needed = tl.minimum(tl.maximum(ties_needed, 1.0), 2147483000.0).to(tl.int64)
            num_ties = tl.where(
                threshold == lower_bound, tl.minimum(num_needed, num_ties), num_needed
            )

        # The draw: the largest z + noise of the kept tokens, the lowest id of equal ones.
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
                rel_prob = tl.exp(z - z_max)
                is_kept = (keys > threshold) | (is_tie & (tie_rank < num_ties))
                is_kept = is_kept & (rel_prob >= min_p) & (token_ids < vocab)
                kept_mass += tl.sum(tl.where(is_kept, rel_prob, 0.0), 0)
                noise = tl.sum(gumbel(row_key, token_ids), 0)  # from [1, BLOCK_V] to [BLOCK_V]
                scores = tl.where(is_kept, z + tl.where(is_greedy, 0.0, noise), float("-inf"))
                block_best = tl.max(scores, 0)
                block_best_id = tl.min(
                    tl.where(is_kept & (scores == block_best), token_ids, vocab), 0
                )
                block_best_z = tl.max(tl.where(token_ids == block_best_id, z, float("-inf")), 0)
                best_z = tl.where(block_best > best, block_best_z, best_z)
                best_id = tl.where(block_best > best, block_best_id.to(tl.int64), best_id)
                best = tl.maximum(best, block_best)
        tl.store(token_ids_ptr + draw, best_id)
        tl.store(logprobs_ptr + draw, (best_z - z_max) - log_total)
        tl.store(kept_mass_ptr + draw, kept_mass * tl.exp(-log_total))


@triton.jit
def _find_threshold(
    z_ptr,
    block_max_ptr,
    z_max,
    lower_bound,
    target,
    vocab,
    num_blocks,
    BY_COUNT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Returns the lowest key >= lower_bound with less than target above it, and how much that is.

    The amount is a count of logits, or a sum of exp(z - z_max).
    """
    # The key of the largest logit always qualifies: nothing is above it.
    low = lower_bound
    high = _key(z_max).to(tl.int64)
    above = 0.0
    while low < high:
        # Evenly spaced; low is a candidate, high is not.
        candidates = (
            low + (high - low) * tl.arange(0, _NUM_CANDIDATES).to(tl.int64) // _NUM_CANDIDATES
        )
        amounts = tl.zeros((_NUM_CANDIDATES,), tl.float32)
        for block in range(num_blocks):
            if _key(tl.load(block_max_ptr + block)) > low:
                z, token_ids = _load_block(z_ptr, block, vocab, BLOCK_V)
                amount = tl.where(token_ids < vocab, 1.0, 0.0) if BY_COUNT else tl.exp(z - z_max)
                is_above = _key(z).to(tl.int64)[None, :] > candidates[:, None]
                amounts += tl.sum(tl.where(is_above, amount[None, :], 0.0), 1)
        # The first candidate with little enough above it is the new upper bound; the threshold is
        # above the candidate before it.
        qualifies = amounts < target
        new_high = tl.min(tl.where(qualifies, candidates, high), 0)
        above = tl.where(new_high < high, tl.max(tl.where(qualifies, amounts, 0.0), 0), above)
        low = tl.max(tl.where(qualifies, low, candidates + 1), 0)
        high = new_high
    return high, above


@triton.jit
def _mass_above(z_ptr, block_max_ptr, z_max, threshold, vocab, num_blocks, BLOCK_V: tl.constexpr):
    """Returns the sum of exp(z - z_max) of logits whose key is above a threshold."""
    mass = 0.0
    for block in range(num_blocks):
        if _key(tl.load(block_max_ptr + block)) > threshold:
            z, _ = _load_block(z_ptr, block, vocab, BLOCK_V)
            is_above = _key(z).to(tl.int64) > threshold
            mass += tl.sum(tl.where(is_above, tl.exp(z - z_max), 0.0), 0)
    return mass


@triton.jit
def _load_block(z_ptr, block, vocab, BLOCK_V: tl.constexpr):
    """Loads a block of logits, -inf beyond the vocabulary; returns it and its token ids."""
    token_ids = block * BLOCK_V + tl.arange(0, BLOCK_V)
    return tl.load(z_ptr + token_ids, token_ids < vocab, other=float("-inf")), token_ids


@triton.jit
def _key(z):
    """Maps floats to int32 in the same order; 0 and -0 have the same key."""
    # The bits of positive floats are ordered as integers. Those of negative ones are ordered the
    # other way round: all bits but the sign are flipped.
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _rel_prob_at(key, z_max):
    """Returns exp(z - z_max) of the logit that has this key; flipping again undoes _key."""
    bits = key.to(tl.int32)
    return tl.exp((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - z_max)
