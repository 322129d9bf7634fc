"""LM head and log-softmax of single targets: linear_logprob_ref is the formula by chunks, linear_logprob the op.

The full [N, V] logits never exist: each chunk is projected, reduced to three numbers a row (_LinearLogprob.forward) and
projected again in the backward. That costs a fourth GEMM; `linear_policy_loss`, which knows its own upstream gradient,
does not need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from socpo_fast.ops._checks import FLOATS, INDEX, WIDE_FLOATS, TensorChecker, check_rule
from socpo_fast.ops._head import ChunkedHead, check_head_options, inverse_temperatures
from socpo_fast.ops._impl import kernels_of, pick_impl

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
    workspace_mib: float | None = None,
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
        workspace_mib: > 0, MiB that a chunk of logits may take; at least 16 rows are projected at
                      once. None is 208 on a CPU and 2048 on a card.
        impl:         "auto", "ref", "cpp" or "triton".

    Returns:
        logprobs_N [N] fp32 (fp64 for fp64 inputs), nats, <= 0;  entropy_N [N], same dtype, nats, >= 0.

    Raises:
        ValueError: a shape, dtype, device, stride, index or temperature breaks the rules above.

    Gradient: hidden (repeated rows summed in index order) and weight, for any upstream gradient; fp32 accumulation;
    with create_graph it has no graph.
    Memory: one chunk of logits. Bitwise: same inputs, same bits; on the CPU a row's outputs and its dX are those it
    would have alone.
    Source: Wijmans et al. 2024, arXiv:2411.09009, section 4.
    """
    check = TensorChecker("linear_logprob")
    check_linear_inputs(check, hidden_TD, weight_VD, targets_N, temperature, rows_N)
    check_head_options("linear_logprob", workspace_mib)
    impl = pick_impl("linear_logprob", impl, hidden_TD)
    if impl == "ref":
        return linear_logprob_ref(
            hidden_TD, weight_VD, targets_N, temperature=temperature, rows_N=rows_N, entropy_grad=entropy_grad
        )
    rows_N = torch.arange(targets_N.numel(), device=targets_N.device) if rows_N is None else rows_N
    inv_temperature_N = inverse_temperatures(temperature, targets_N.numel(), hidden_TD)
    logprobs_N, entropy_N = _LinearLogprob.apply(
        hidden_TD, weight_VD, targets_N.contiguous(), rows_N, inv_temperature_N, entropy_grad, workspace_mib, impl
    )
    return logprobs_N, entropy_N


class _LinearLogprob(torch.autograd.Function):
    """Two passes over the rows: log-probs forward, and logits again with their gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        rows_N: Tensor,
        inv_temperature_N: Tensor,
        entropy_grad: bool,
        workspace_mib: float | None,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(hidden_TD, weight_VD, rows_N, workspace_mib=workspace_mib)
        values_3N = head.logits.new_empty((3, targets_N.numel()))
        for part in head.chunks():
            rows = head.project(part), targets_N[part], inv_temperature_N[part]
            values_3N[:, part] = kernels_of("linear_policy_loss", impl).logprob_rows(*rows)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_N, rows_N, inv_temperature_N, values_3N)
        ctx.workspace_mib, ctx.impl, ctx.entropy_grad = workspace_mib, impl, entropy_grad
        logprobs_N, entropy_N = values_3N[0].clone(), values_3N[1].clone()
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, targets_N, rows_N, inv_temperature_N, values_3N = ctx.saved_tensors
        has_grad_N = grad_logprobs_N != 0
        if ctx.entropy_grad:
            has_grad_N = has_grad_N | (grad_entropy_N != 0)
        if has_grad_N.device.type == "cpu":  # rows without a gradient need no logits either
            wanted = has_grad_N.nonzero()[:, 0]
            targets_N, rows_N, inv_temperature_N, has_grad_N, grad_logprobs_N, grad_entropy_N = (
                x[wanted] for x in (targets_N, rows_N, inv_temperature_N, has_grad_N, grad_logprobs_N, grad_entropy_N)
            )
            values_3N = values_3N[:, wanted]
        head = ChunkedHead(
            hidden_TD,
            weight_VD,
            rows_N,
            workspace_mib=ctx.workspace_mib,
            needs_grad=(ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
        )
        for part in head.chunks():
            logits_NV = head.project(part)
            kernels_of("linear_policy_loss", ctx.impl).logprob_rows_backward(
                logits_NV,
                head.grad_logits[: logits_NV.shape[0]],
                targets_N[part],
                inv_temperature_N[part],
                values_3N[2, part],
                values_3N[1, part],
                grad_logprobs_N[part].contiguous(),
                grad_entropy_N[part].contiguous() if ctx.entropy_grad else None,
            )
            head.backward(part, has_grad_N[part])
        return (*(None if x is None else x.to(hidden_TD.dtype) for x in head.gradients()), *[None] * 6)


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
        check.every("temperature_N", temperature, temperature.isfinite() & (temperature > 0), "finite and > 0")
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
