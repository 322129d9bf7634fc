"""LM head and draw in one op: from hidden states to tokens, without the [B, V] logits.

Read linear_sample_ref, then ops/sample.py for the draw itself. The vocabulary goes by in tiles: GEMM, softmax sums and
the running Gumbel-argmax of a tile follow each other while its logits are in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, INDEX, TensorChecker, check_rule
from socpo_fast.ops._impl import IMPLS, auto_impl, choose_impl
from socpo_fast.ops.linear import linear_ref
from socpo_fast.ops.sample import check_settings, sample_ref

Draws = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_sample_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    rows_B: Tensor | None = None,
) -> Draws:
    logits_TV = linear_ref(hidden_TD, weight_VD)
    logits_BV = logits_TV if rows_B is None else logits_TV[rows_B]
    token_ids_B, logprobs_B, kept_mass_B = sample_ref(
        logits_BV, row_keys_B, temperature_B=temperature_B, top_k_B=top_k_B, top_p_B=top_p_B, min_p_B=min_p_B
    )
    inverse_B = torch.where(temperature_B == 0, 1.0, 1.0 / temperature_B)
    all_logprobs_BV = (logits_BV.float() * inverse_B[:, None]).double().log_softmax(-1)
    terms_BV = all_logprobs_BV.exp() * all_logprobs_BV.clamp(min=-1e4)  # a token of -inf adds 0
    return token_ids_B, logprobs_B, -terms_BV.sum(-1).float(), kept_mass_B


def linear_sample(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    rows_B: Tensor | None = None,
    impl: str = "auto",
) -> Draws:
    """One token a draw: `sample` of the logits hidden @ weight^T, which are stored for filtered draws only.

    Args:
        hidden_TD:  [T, D] floating point (cpp: fp32), row-contiguous.
        weight_VD:  [V, D], hidden's dtype, or bf16 with fp32 hidden. The LM head, contiguous, V < 2^31.
        row_keys_B: [B] int64, from `row_keys`; temperature_B, top_k_B, top_p_B, min_p_B as in `sample`.
        rows_B:     [B] int64, the row of hidden a draw is from; may repeat, each row is projected once. None: b, T = B.
        impl:       "auto", "ref", "cpp" or "triton".

    Returns:
        token_ids_B [B] int64, logprobs_B and kept_mass_B [B] fp32 as in `sample`; entropy_B [B] fp32, nats, of
        softmax(logits / temperature) over the whole vocabulary (greedy: at temperature 1).

    Raises:
        ValueError: a shape, dtype or parameter breaks the rules above.

    Memory: a tile of logits a thread, and V numbers a row with a filtered draw. Bitwise (cpp): a draw's bits depend
    on its row and settings only. The token is that of `sample` on equal logits.
    Source: Gumbel-max (Gumbel 1954); online softmax (Milakov and Gimelshein 2018).
    """
    check = TensorChecker("linear_sample")
    check("hidden_TD", hidden_TD, FLOATS)
    weights = (hidden_TD.dtype, torch.bfloat16) if hidden_TD.dtype == torch.float32 else (hidden_TD.dtype,)
    check("weight_VD", weight_VD, weights)
    check_rule("linear_sample", "strides of weight_VD", weight_VD.stride(), weight_VD.is_contiguous(), "contiguous")
    check_rule("linear_sample", "D", weight_VD.shape[1], weight_VD.shape[1] > 0, ">= 1")
    check_rule("linear_sample", "V", weight_VD.shape[0], 0 < weight_VD.shape[0] < 2**31, "in [1, 2^31)")
    check("row_keys_B", row_keys_B, INDEX)
    check_settings("linear_sample", check, temperature_B, top_k_B, top_p_B, min_p_B)
    num_rows = hidden_TD.shape[0]
    if rows_B is None:
        check_rule("linear_sample", "T", num_rows, num_rows == len(row_keys_B), f"B={len(row_keys_B)} without rows_B")
    else:
        check("rows_B", rows_B, INDEX)
        check.index_range("rows_B", rows_B, num_rows)
    available = IMPLS["linear_sample"] if hidden_TD.dtype == torch.float32 else ("ref", "triton")
    impl = choose_impl("linear_sample", impl, available, hidden_TD.device)
    return _run(impl, hidden_TD, weight_VD, row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B, rows_B=rows_B)


def linear_sample_unchecked(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    rows_B: Tensor | None = None,
) -> Draws:
    """`linear_sample` for tensors known to be right."""
    impl = auto_impl("linear_sample", hidden_TD.device.type)
    return _run(impl, hidden_TD, weight_VD, row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B, rows_B=rows_B)


def _run(
    impl: str, hidden_TD: Tensor, weight_VD: Tensor, row_keys_B: Tensor, *settings: Tensor, rows_B: Tensor | None
) -> Draws:
    if impl == "cpp" and hidden_TD.dtype == torch.float32:
        rows_B = torch.arange(len(row_keys_B)) if rows_B is None else rows_B
        given = (hidden_TD, weight_VD, row_keys_B, *settings, rows_B)
        return torch.ops.socpo.linear_sample(*(x.contiguous() for x in given))
    names = ("temperature_B", "top_k_B", "top_p_B", "min_p_B")
    return linear_sample_ref(hidden_TD, weight_VD, row_keys_B, rows_B=rows_B, **dict(zip(names, settings, strict=True)))
