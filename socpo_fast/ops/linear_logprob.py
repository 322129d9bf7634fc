"""Computes the log-probability of given target tokens from hidden states and an LM head.

Read linear_logprob_ref, the formula by chunks of rows, then linear_logprob, the op; its fused form
is in _fused_logprob.py. next_token_rows makes the arguments from a padded batch, which is what
Hugging Face models take.

Departure from the textbook: the [N, V] logits, the largest tensor of a training step by far (152k
columns for Qwen3), are never stored; only a chunk of rows has logits at any time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from socpo_fast.ops._checks import (
    FLOATS,
    INDEX,
    WIDE_FLOATS,
    TensorChecker,
    autocast,
    check_rule,
    is_autocasting,
    whole,
    without_autocast,
)
from socpo_fast.ops._fused_logprob import linear_logprob_op
from socpo_fast.ops._head import (
    NO_TARGET,
    keep_rows,
    row_indices,
    scales_of_logits,
    scatter_rows,
    wide_dtype,
)
from socpo_fast.ops._impl import pick_impl

_CHUNK_LOGITS = 1 << 25  # logits that the reference has at a time, 128 MiB in fp32


def linear_logprob_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    entropy_grad: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Computes `linear_logprob`, unchecked, one chunk of rows at a time."""
    dtype = wide_dtype(hidden_TD)
    # Converted once, not in each chunk, so that autograd adds the chunks' dW up in this dtype.
    weight_VD = weight_VD.to(dtype)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    has_target_N = targets_N != NO_TARGET
    scale_N = temperature.detach() if isinstance(temperature, Tensor) else None
    rows_N, targets_N, scale_N, is_kept_N = keep_rows(
        has_target_N, row_indices(rows_N, targets_N), targets_N.clamp(min=0), scale_N, has_target_N
    )
    # index_select, not indexing: its backward adds repeated rows in index order, whatever the
    # number of threads. Rows without a target become 0, since they may hold NaN.
    hidden_ND = hidden_TD.index_select(0, rows_N).to(dtype).where(is_kept_N[:, None], 0)
    num_rows = max(1, _CHUNK_LOGITS // weight_VD.shape[0])
    # checkpoint keeps only the inputs of a chunk; the backward computes its logits again.
    scales = None if scale_N is None else scale_N.to(dtype).split(num_rows)
    chunks = [
        checkpoint(
            _chunk_logprob,
            hidden,
            weight_VD,
            bias_V,
            targets,
            temperature if scales is None else scales[chunk_idx][:, None],
            softcap,
            logit_scale,
            entropy_grad,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for chunk_idx, (hidden, targets) in enumerate(
            zip(hidden_ND.split(num_rows), targets_N.split(num_rows), strict=True)
        )
    ]
    values_2N = torch.stack([torch.cat(values) for values in zip(*chunks, strict=True)])
    logprobs_N, entropy_N = scatter_rows(values_2N, has_target_N)
    return logprobs_N, entropy_N if entropy_grad else entropy_N.detach()


def linear_logprob(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    entropy_grad: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Computes each target's log-prob and its row's entropy without storing the [N, V] logits.

        u[n]       = logit_scale (hidden[rows[n]] @ weight.T + bias)
        z[n]       = u[n] / temperature[n]
                     or, with a softcap, softcap tanh(u[n] / softcap) / temperature[n]
        logprob[n] = z[n, targets[n]] - logsumexp(z[n])
        entropy[n] = -sum over v of p[n, v] log p[n, v]        p[n] = softmax(z[n])

    Args:
        hidden_TD:    [T, D] fp32, fp64, bf16 or fp16, row-contiguous. Packed tokens, no padding.
        weight_VD:    [V, D], same dtype, row-contiguous. The LM head; of a DTensor the full tensor.
        targets_N:    [N] int64, each in [0, V), or -100: a row without loss, outputs or gradient.
        temperature:  > 0, a float or [N] fp32 or fp64. The sampler's own; no default, since a
                      mismatch biases every ratio.
        rows_N:       [N] int64, each in [0, T): the row of hidden that predicts target n; may
                      repeat. None: target n is predicted by row n, and N = T.
        entropy_grad: whether entropy carries a gradient.
        bias_V:       [V], hidden's dtype, or None. The bias of the LM head.
        softcap:      > 0, bound of the logits before the temperature, or None.
        logit_scale:  > 0, the model's factor on its logits.
        workspace_mib: > 0, MiB that a chunk of logits may take; at least 16 rows are projected at
                      once. None means 208 on a CPU and 2048 on a GPU.
        impl:         "auto", "ref", "cpp" or "triton".

    Returns:
        logprobs_N [N] fp32 (fp64 for fp64 inputs), nats, <= 0;  entropy_N [N], same dtype, nats,
        >= 0. Both are NaN where the target is -100, whatever the hidden state holds; the upstream
        gradient of such a row is ignored.

    Raises:
        ValueError: a shape, dtype, device, stride, index, temperature or scale breaks these rules.
            Values of tensors raise on a CPU only; on a GPU they are a device assert, and under
            torch.compile they are not checked.

    Gradient: hidden (repeated rows summed in index order), weight and bias, for any upstream
    gradient; fp32 accumulation; with create_graph it has no graph. Under torch.autocast hidden,
    weight and bias are cast to its dtype.
    Memory: one chunk of logits. Bitwise: same inputs, same bits; with "cpp" a row's outputs and its
    dX are batch-invariant: they do not depend on the other rows.
    Source: Wijmans et al. 2024, arXiv:2411.09009, section 4.
    """
    check = TensorChecker("linear_logprob")
    scaling = temperature, softcap, logit_scale
    hidden_TD, weight_VD, bias_V = check_head(
        check, hidden_TD, weight_VD, bias_V, targets_N, rows_N, workspace_mib, *scaling
    )
    impl = pick_impl("linear_logprob", impl, hidden_TD)
    if impl == "ref":
        return linear_logprob_ref(
            hidden_TD,
            weight_VD,
            targets_N,
            temperature=temperature,
            rows_N=rows_N,
            entropy_grad=entropy_grad,
            bias_V=bias_V,
            softcap=softcap,
            logit_scale=logit_scale,
        )
    scales = scales_of_logits(targets_N.numel(), hidden_TD, *scaling)
    outputs = linear_logprob_op(
        hidden_TD, weight_VD, bias_V, rows_N, targets_N, *scales, entropy_grad, workspace_mib, impl
    )
    return outputs[:2]


def next_token_rows(hidden_BLD: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens a batch so that position l predicts label l + 1, with -100 for rows without loss.

        hidden_BLD = model.model(input_ids, attention_mask).last_hidden_state
        hidden_TD, targets_N, rows_N = next_token_rows(hidden_BLD, labels)
        logprobs_N, _ = linear_logprob(
            hidden_TD, model.lm_head.weight, targets_N, rows_N=rows_N, temperature=1.0,
        )
        loss = -logprobs_N.nanmean()       # equals the loss that the model returns for labels

    Args:
        hidden_BLD: [B, L, D] fp32, fp64, bf16 or fp16. The last hidden states.
        labels_BL:  [B, L] int64, each in [0, V), or -100 (prompt, padding).

    Returns:
        hidden_TD [T = B L, D];  targets_N, rows_N [N = B (L - 1)] int64. The shapes do not depend
        on the labels; the ops leave out rows whose target is -100.

    Raises:
        ValueError: a shape or dtype breaks the rules above.

    Gradient: hidden.
    """
    check = TensorChecker("next_token_rows")
    check("hidden_BLD", hidden_BLD, FLOATS)
    check("labels_BL", labels_BL, INDEX)
    rows_BL = torch.arange(labels_BL.numel(), device=labels_BL.device).view(labels_BL.shape)
    return hidden_BLD.flatten(0, 1), labels_BL[:, 1:].flatten(), rows_BL[:, :-1].flatten()


def check_head(
    check: TensorChecker,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    workspace_mib: float | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks the rules of linear_logprob's docstring; `check` then knows T, D, V, N and the device.

    Returns hidden, weight and bias: full tensors, cast to torch.autocast's dtype if it is on.
    """
    check("hidden_TD", hidden_TD, FLOATS)
    hidden_TD, weight_VD = autocast(hidden_TD, whole(check.where, "weight_VD", weight_VD))
    check("weight_VD", weight_VD, (hidden_TD.dtype,))
    for name, x in (("hidden_TD", hidden_TD), ("weight_VD", weight_VD)):
        check_rule(
            check.where,
            f"{name} strides",
            x.stride(),
            x.stride(1) == 1 or x.shape[1] <= 1,
            "(*, 1)",
            "call .contiguous()",
        )
    check_rule(
        check.where,
        "weight_VD",
        list(weight_VD.shape),
        weight_VD.shape[0] > 0,
        "[V, D] with V > 0",
    )
    if bias_V is not None:
        bias_V = whole(check.where, "bias_V", bias_V)
        if is_autocasting(hidden_TD):
            bias_V = bias_V.to(hidden_TD.dtype)
        check("bias_V", bias_V, (hidden_TD.dtype,))
    if rows_N is None:
        check.sizes["N"] = hidden_TD.shape[0]
    else:
        check("rows_N", rows_N, INDEX)
        check.index_range("rows_N", rows_N, hidden_TD.shape[0])
    check("targets_N", targets_N, INDEX)
    vocab = weight_VD.shape[0]
    fits_N = ((targets_N >= 0) & (targets_N < vocab)) | (targets_N == NO_TARGET)
    check.every("targets_N", targets_N, fits_N, f"in [0, {vocab})")
    if isinstance(temperature, Tensor):
        check("temperature_N", temperature, WIDE_FLOATS)
        check.every(
            "temperature_N",
            temperature,
            temperature.isfinite() & (temperature > 0),
            "finite and > 0",
        )
    else:
        check_rule(
            check.where,
            "temperature",
            temperature,
            0 < temperature < float("inf"),
            "finite and > 0",
        )
    for name, value in (("workspace_mib", workspace_mib), ("softcap", softcap)):
        check_rule(
            check.where, name, value, value is None or 0 < value < torch.inf, "finite and > 0"
        )
    check_rule(
        check.where,
        "logit_scale",
        logit_scale,
        0 < logit_scale < torch.inf,
        "finite and > 0",
    )
    return hidden_TD, weight_VD, bias_V


def _chunk_logprob(
    hidden: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Returns log-probs of the targets and entropies of one chunk of rows."""
    with without_autocast(hidden):
        logits = F.linear(hidden, weight_VD, bias_V)
    logits = logits if logit_scale == 1 else logits * logit_scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs_NV = torch.log_softmax(logits / temperature, dim=-1)
    logprobs = logprobs_NV.gather(1, targets[:, None])[:, 0]
    logprobs_NV = logprobs_NV if entropy_grad else logprobs_NV.detach()
    # A logit of -inf is a token of probability 0: it adds 0 to the entropy, not 0 * -inf = NaN.
    entropy = -(logprobs_NV.exp() * logprobs_NV.masked_fill(logprobs_NV == -torch.inf, 0.0)).sum(-1)
    return logprobs, entropy
