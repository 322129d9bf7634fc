"""Attention of training's packed rows, a tree of segments: Segment -> packed_attention_ref -> packed_attention.

A prompt is packed once and its branches (attempt, guidance, next attempt) stand behind it; each segment sees its
ancestors' rows through `context` and itself causally. Equal to attention over separate rows within rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import pick_impl


class Segment(NamedTuple):
    """Rows start:end attend to all rows of the context ranges, the ancestors in path order, and to themselves causally.

    The context of a second attempt is its prompt, the part of the first attempt that it sees, and the guidance.
    """

    start: int
    end: int
    context: tuple[tuple[int, int], ...] = ()


def packed_attention_ref(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Sequence[Segment], *, scale: float
) -> Tensor:
    """`packed_attention`, unchecked: scaled_dot_product_attention, one segment at a time."""
    if k_TKE.shape[1] == 1:  # shared, it makes the backward one matrix product, whose bits vary with threads
        k_TKE, v_TKE = (x_TKE.repeat_interleave(q_THE.shape[1], dim=1) for x_TKE in (k_TKE, v_TKE))
    # Cut the rows at every boundary once: the backward of one split is one concatenation, where each slice of its own
    # would cost a zero tensor of the full size.
    bounds = sorted({0, *(x for s in segments for x in (s.start, s.end, *(y for pair in s.context for y in pair)))})
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    piece_at = {bound: idx for idx, bound in enumerate(bounds)}
    q_pieces, k_pieces, v_pieces = q_THE.split(sizes), k_TKE.split(sizes), v_TKE.split(sizes)

    def gather(pieces: Sequence[Tensor], *ranges: tuple[int, int]) -> Tensor:
        """The rows of the ranges one after the other, as [1, heads, rows, E]."""
        picked = [piece for start, end in ranges for piece in pieces[piece_at[start] : piece_at[end]]]
        return (picked[0] if len(picked) == 1 else torch.cat(picked)).transpose(0, 1)[None]

    outputs = []
    for start, end, context in segments:
        q = gather(q_pieces, (start, end))
        k, v = gather(k_pieces, *context, (start, end)), gather(v_pieces, *context, (start, end))
        lengths = q.shape[2], k.shape[2]
        mask = q.new_ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if context else None
        o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else q_THE


def packed_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, segments: Sequence[Segment], *, scale: float, impl: str = "auto"
) -> Tensor:
    """Attention of packed rows in which every row sees its ancestors' rows and its own segment up to itself.

        seen(t) = rows of context of t's segment, then rows start .. t
        o[t]    = sum over s in seen(t) of softmax over seen(t)(scale q[t] . k[s]) v[s]

    Args:
        q_THE:    [T, H, E] fp32, fp64, bf16 or fp16; H a multiple of K.
        k_TKE:    [T, K, E], same dtype. Query head h reads key and value head h // (H / K).
        v_TKE:    [T, K, E], same dtype.
        segments: in order, a partition of [0, T) into non-empty ranges; context ranges non-empty, in order, without
                  overlap, all before the segment's start.
        scale:    > 0, usually E ** -0.5.
        impl:     "auto" or "ref".

    Returns:
        o_THE [T, H, E], dtype of q.

    Raises:
        ValueError: a shape, dtype, device, segment or the scale breaks the rules above.

    Gradient: q, k, v. Memory: one segment's scores at most. Bitwise: same inputs, same bits.
    """
    check = TensorChecker("packed_attention")
    check("q_THE", q_THE, FLOATS)
    check("k_TKE", k_TKE, (q_THE.dtype,))
    check("v_TKE", v_TKE, (q_THE.dtype,))
    heads, kv_heads = q_THE.shape[1], k_TKE.shape[1]
    check_rule(check.where, "H", heads, kv_heads > 0 and heads % kv_heads == 0, f"a multiple of K={kv_heads}")
    check_rule(check.where, "scale", scale, 0 < scale < float("inf"), "finite and > 0")
    _check_segments(segments, q_THE.shape[0])
    pick_impl("packed_attention", impl, q_THE)
    return packed_attention_ref(q_THE, k_TKE, v_TKE, segments, scale=scale)


def _check_segments(segments: Sequence[Segment], num_rows: int) -> None:
    """A partition of [0, num_rows) whose contexts lie before their segments."""
    where, previous_end = "packed_attention", 0
    for idx, (start, end, context) in enumerate(segments):
        if start != previous_end or end <= start:
            raise ValueError(f"{where}: segments[{idx}] must be non-empty from {previous_end} on, got [{start}, {end})")
        context_end = 0
        for a, b in context:
            if not context_end <= a < b <= start:
                raise ValueError(
                    f"{where}: segments[{idx}].context must be ascending ranges inside [0, {start}), got {context}"
                )
            context_end = b
        previous_end = end
    if previous_end != num_rows:
        raise ValueError(f"{where}: segments must end at T={num_rows}, got {previous_end}")
