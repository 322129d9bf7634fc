"""LM head and log-softmax of single targets: linear_logprob_ref is the formula by chunks, linear_logprob the op.

The full [N, V] logits never exist: each chunk is projected, reduced to two numbers a row and projected again in the
backward. That costs a fourth GEMM; `linear_policy_loss`, which knows its own upstream gradient, does not need it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from socpo_fast.ops._checks import FLOATS, INDEX, WIDE_FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import IMPLS, choose_impl

_CHUNK_LOGITS = 1 << 25  # logits alive at once in the reference, 128 MiB in fp32


def linear_logprob_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob`, unchecked, one chunk of rows at a time."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    weight_VD = weight_VD.to(dtype)  # once, so that the chunks' dW add up in this dtype
    # index_select, not indexing: its backward adds repeated rows in index order, whatever the number of threads
    hidden_ND = (hidden_TD if rows_N is None else hidden_TD.index_select(0, rows_N)).to(dtype)
    num_rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])
    scales = temperature.to(dtype).split(num_rows) if isinstance(temperature, Tensor) else None
    chunks = [
        checkpoint(
            _chunk_logprob,
            hidden,
            weight_VD,
            targets,
            temperature if scales is None else scales[chunk_idx][:, None],
            entropy_grad,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for chunk_idx, (hidden, targets) in enumerate(
            zip(hidden_ND.split(num_rows), targets_N.split(num_rows), strict=True)
        )
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the entropy of its row, without storing the [N, V] logits.

        z[n] = hidden[rows[n]] @ weight.T / temperature[n]
        logprob[n] = z[n, targets[n]] - logsumexp(z[n])        entropy[n] = -sum over v of p[n, v] log p[n, v]

    Args:
        hidden_TD:    [T, D] fp32, fp64, bf16 or fp16, row-contiguous. Packed tokens, no padding.
        weight_VD:    [V, D], same dtype, row-contiguous. The LM head.
        targets_N:    [N] int64, each in [0, V).
        temperature:  > 0, a float or [N] fp32 or fp64. The sampler's own; no default, since a mismatch biases every
                      ratio.
        rows_N:       [N] int64, each in [0, T): the row of hidden that predicts target n; may repeat. None is row n,
                      with N = T.
        entropy_grad: whether entropy carries a gradient.
        impl:         "auto" or "ref".

    Returns:
        logprobs_N [N] fp32 (fp64 for fp64 inputs), nats, <= 0;  entropy_N [N], same dtype, nats, >= 0.

    Raises:
        ValueError: a shape, dtype, device, stride, index or temperature breaks the rules above.

    Gradient: hidden (repeated rows summed in index order) and weight, for any upstream gradient; fp32 accumulation.
    Memory: one chunk of logits. Bitwise: same inputs, same bits.
    Source: Wijmans et al. 2024, arXiv:2411.09009, section 4.
    """
    check = TensorChecker("linear_logprob")
    check_linear_inputs(check, hidden_TD, weight_VD, targets_N, temperature, rows_N)
    choose_impl("linear_logprob", impl, IMPLS["linear_logprob"], hidden_TD.device)
    return linear_logprob_ref(
        hidden_TD, weight_VD, targets_N, temperature=temperature, rows_N=rows_N, entropy_grad=entropy_grad
    )


def check_linear_inputs(
    check: TensorChecker,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    temperature: float | Tensor,
    rows_N: Tensor | None,
) -> None:
    """The rules of linear_logprob's docstring; afterwards `check` knows T, D, V, N and the device."""
    check("hidden_TD", hidden_TD, FLOATS)
    check("weight_VD", weight_VD, (hidden_TD.dtype,))
    for name, x in (("hidden_TD", hidden_TD), ("weight_VD", weight_VD)):
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"{check.where}: {name} strides must be (*, 1), got {x.stride()}; call .contiguous()")
    check_rule(check.where, "weight_VD", list(weight_VD.shape), weight_VD.shape[0] > 0, "[V, D] with V > 0")
    if rows_N is None:
        check.sizes["N"] = hidden_TD.shape[0]
    else:
        check("rows_N", rows_N, INDEX)
        check.index_range("rows_N", rows_N, hidden_TD.shape[0])
    check("targets_N", targets_N, INDEX)
    check.index_range("targets_N", targets_N, weight_VD.shape[0])
    if isinstance(temperature, Tensor):
        check("temperature_N", temperature, WIDE_FLOATS)
        positive = temperature.isfinite() & (temperature > 0)
        check_rule(check.where, "temperature", "a tensor", bool(positive.all()), "finite and > 0 in every row")
    else:
        check_rule(check.where, "temperature", temperature, 0 < temperature < float("inf"), "finite and > 0")


def _chunk_logprob(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, temperature: float | Tensor, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies of one chunk of rows; -inf logits are outcomes of probability 0."""
    logprobs_NV = torch.log_softmax(hidden @ weight_VD.T / temperature, dim=-1)
    logprobs = logprobs_NV.gather(1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(logprobs_NV.exp() * logprobs_NV.masked_fill(logprobs_NV == -torch.inf, 0.0)).sum(-1)
    return logprobs, entropy
