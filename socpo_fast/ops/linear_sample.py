"""Samples tokens from hidden states for the engine, without storing the [B, V] logits.

Read linear_sample_ref for the mathematics; distribution and noise are those of `sample`.

Departs from the textbook: the LM head is multiplied by tiles of the vocabulary. Of each tile a row
keeps a few numbers, which are merged in the order of the tiles:

    largest logit, sum of exps     -> log-prob
    weighted sum of exps           -> entropy
    best token by logit + noise    -> token id

Only rows with top-k, top-p or min-p store their logits.
"""

import torch
from torch import Tensor

from socpo_fast.ops._checks import INDEX, TensorChecker, autocast, check_rule, whole
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op
from socpo_fast.ops.linear import check_factors, linear_ref
from socpo_fast.ops.sample import check_draws, sample_ref

Draws = tuple[Tensor, Tensor, Tensor, Tensor]


def linear_sample_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    rows_B: Tensor | None = None,
) -> Draws:
    """Computes `linear_sample`, unchecked, with all logits at once."""
    hidden_BD = hidden_TD if rows_B is None else hidden_TD[rows_B]
    logits_BV = linear_ref(
        hidden_BD.to(torch.promote_types(hidden_TD.dtype, torch.float32)), weight_VD
    )
    token_ids_B, logprobs_B, kept_mass_B = sample_ref(
        logits_BV, row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B
    )
    # The entropy of a greedy row is that of its logits, as with temperature 1.
    temperature_B = temperature_B.masked_fill(temperature_B == 0, 1.0)
    probs_BV = (logits_BV.double() / temperature_B[:, None]).softmax(-1)
    return token_ids_B, logprobs_B, torch.special.entr(probs_BV).sum(-1).float(), kept_mass_B


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
    """Draws one token a row from the LM head's softmax, as `sample` does from the logits.

        logits[b]  = hidden[rows[b]] @ weight.T
        token, logprob, kept mass: those of `sample` for these logits
        entropy[b] = -sum over v of p[v] log p[v]
        p          = softmax(logits[b] / temperature[b]), without a division for a greedy row

    Args:
        hidden_TD:     [T, D] floating point (cpp: fp32), row-contiguous.
        weight_VD:     [V, D], hidden's dtype, or bf16 with fp32 hidden; row-contiguous, V < 2^31.
                       The LM head.
        row_keys_B:    [B] int64, one for each token to be drawn, from `row_keys`.
        temperature_B, top_k_B, top_p_B, min_p_B: [B], as in `sample`.
        rows_B:        [B] int64, each in [0, T): the row of hidden to draw from; may repeat. None:
                       draw b is from row b, and B = T.
        impl:          "auto", "ref", "cpp" or "triton".

    Returns:
        token_ids_B [B] int64;  logprobs_B, entropy_B [B] fp32, nats, under the temperature only,
        over the whole vocabulary;  kept_mass_B [B] fp32, probability of the tokens that the filters
        keep, 1 if all filters are off. A row whose logits have NaN, +inf or nothing finite has
        log-prob NaN and an arbitrary token.

    Raises:
        ValueError: a shape, dtype, stride or parameter breaks the rules above.

    Gradient: none. Memory (cpp): logits of a tile, and of the rows with a filter.
    Bitwise (cpp): batch-invariant and thread-invariant: a draw depends on its row, its key and its
    settings only.
    Source: Gumbel-max (Gumbel 1954); the tiles' maxima and sums as in Milakov and Gimelshein 2018.
    """
    hidden_TD, weight_VD = autocast(hidden_TD, whole("linear_sample", "weight_VD", weight_VD))
    check = TensorChecker("linear_sample")
    check_factors(check, "hidden_TD", hidden_TD, "weight_VD", weight_VD)
    check_draws(check, row_keys_B, temperature_B, top_k_B, top_p_B, min_p_B)
    if rows_B is not None:
        check("rows_B", rows_B, INDEX)
        check.index_range("rows_B", rows_B, hidden_TD.shape[0])
    else:
        check_rule(
            "linear_sample",
            "B without rows_B",
            len(row_keys_B),
            len(row_keys_B) == len(hidden_TD),
            "T",
        )
    return linear_sample_op(
        hidden_TD,
        weight_VD,
        row_keys_B,
        temperature_B,
        top_k_B,
        top_p_B,
        min_p_B,
        rows_B,
        None,
        pick_impl("linear_sample", impl, hidden_TD),
    )


def _kernel(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    rows_B: Tensor | None,
    is_filtered: bool | None,
    impl: str,
) -> Draws:
    # Filters need the whole row of logits, so triton stores them only if some row has a filter.
    settings = temperature_B, top_k_B, top_p_B, min_p_B
    if impl == "cpp":
        return torch.ops.socpo.linear_sample(hidden_TD, weight_VD, row_keys_B, *settings, rows_B)
    if impl == "triton":
        # The engine knows is_filtered on the host. Without it the host waits here for the GPU.
        if is_filtered is None:
            is_filtered = bool(((top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0)).any())
        return kernels_of("linear_sample", impl).linear_sample_triton(
            hidden_TD,
            weight_VD,
            row_keys_B,
            temperature_B,
            rows_B,
            settings[1:] if is_filtered else None,
        )
    return linear_sample_ref(hidden_TD, weight_VD, row_keys_B, *settings, rows_B)


# is_filtered: whether any draw has a filter on; None: unknown, read from the tensors.
linear_sample_op = define_op(
    "linear_sample(Tensor hidden, Tensor weight, Tensor row_keys, Tensor temperature, "
    "Tensor top_k, Tensor top_p, Tensor min_p, Tensor? rows, bool? is_filtered, str impl) "
    "-> (Tensor token_ids, Tensor logprobs, Tensor entropy, Tensor kept_mass)",
    _kernel,
    fake=lambda _hidden, _weight, row_keys, temperature, *_: (
        row_keys.new_empty(row_keys.shape),
        *(temperature.new_empty(row_keys.shape) for _ in range(3)),
    ),
)
