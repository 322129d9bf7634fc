"""A linear layer whose rows do not know of each other: prompt, batch and single token give equal bits.

On the CPU it runs a kernel of our own over the weights as they are stored (fp32 or bf16, no packed copy). Departs from
torch's linear, whose GEMM libraries sum in another order for few rows, and which wants both factors in one dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._head import MIN_ROWS
from socpo_fast.ops._impl import auto_impl, choose_impl, impls_of


def linear_ref(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    missing = MIN_ROWS - x_TD.shape[0] if x_TD.is_cpu else 0  # below it a library GEMM's bits depend on the rows
    padded_TD = F.pad(x_TD, (0, 0, 0, missing)) if missing > 0 else x_TD
    bias_N = bias_N if bias_N is None else bias_N.to(x_TD.dtype)
    return F.linear(padded_TD, weight_ND.to(x_TD.dtype), bias_N)[: x_TD.shape[0]]


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """One linear layer.

        out[t, n] = sum_d x[t, d] weight[n, d] + bias[n]

    Args:
        x_TD:      [T, D] floating point (cpp: fp32), rows contiguous.
        weight_ND: [N, D], x's dtype, or bf16 with fp32 x: converted as it is read.
        bias_N:    [N], weight's dtype, or None.
        impl:      "auto", "ref" or "cpp".

    Returns:
        out_TN [T, N], x's dtype; fp32 sums.

    Raises:
        ValueError: a shape, dtype or stride breaks the rules above.

    Gradient: x, weight, bias; in cpp by `torch.ops.socpo.matmul_`, for fp32 weights.
    Bitwise (cpp): a row's bits depend on that row only, whatever the number of rows or threads.
    """
    check = TensorChecker("linear")
    check("x_TD", x_TD, FLOATS)
    weights = (x_TD.dtype, torch.bfloat16) if x_TD.dtype == torch.float32 else (x_TD.dtype,)
    check("weight_ND", weight_ND, weights)
    if bias_N is not None:
        check("bias_N", bias_N, (weight_ND.dtype,))
    check_rule("linear", "strides of weight_ND", weight_ND.stride(), weight_ND.is_contiguous(), "contiguous")
    check_rule("linear", "D", x_TD.shape[1], x_TD.shape[1] > 0, ">= 1")
    available = impls_of("linear", x_TD.dtype)
    return _run(choose_impl("linear", impl, available, x_TD.device), x_TD, weight_ND, bias_N)


def linear_unchecked(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`linear` for tensors known to be right."""
    return _run(auto_impl("linear", x_TD.device.type), x_TD, weight_ND, bias_N)


def _run(impl: str, x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    if impl == "ref" or x_TD.dtype != torch.float32:
        return linear_ref(x_TD, weight_ND, bias_N)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_ND.requires_grad):
        is_wide = weight_ND.dtype == torch.float32
        return _Linear.apply(x_TD, weight_ND, bias_N) if is_wide else linear_ref(x_TD, weight_ND, bias_N)
    return torch.ops.socpo.linear(x_TD, weight_ND, bias_N)


class _Linear(torch.autograd.Function):
    """dx = grad weight, dweight = grad^T x, dbias = the rows of grad added up."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ND)
        return torch.ops.socpo.linear(x_TD, weight_ND, bias_N)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ND = ctx.saved_tensors
        grad_TN = grad_TN.contiguous()
        grads: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = torch.empty_like(x_TD)
            torch.ops.socpo.matmul_(grads[0], grad_TN, weight_ND, False)
        if ctx.needs_input_grad[1]:
            grads[1] = torch.empty_like(weight_ND)
            torch.ops.socpo.matmul_(grads[1], grad_TN.t(), x_TD, False)
        if ctx.needs_input_grad[2]:
            grads[2] = grad_TN.sum(0)
        return tuple(grads)
