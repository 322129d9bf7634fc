"""RMSNorm with the residual connection's addition in the same pass, forward and backward.

Departs from the textbook: a layer hands on (sum, norm of the sum), so the stream of residuals is read and written once
a norm instead of three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import auto_impl, choose_impl, impls_of, kernels_of

Norm = Tensor | tuple[Tensor, Tensor]


def rms_norm_ref(x_TD: Tensor, weight_D: Tensor, *, eps: float, residual_TD: Tensor | None = None) -> Norm:
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide = sum_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    y_TD = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(x_TD.dtype)
    return y_TD if residual_TD is None else (y_TD, sum_TD)


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, *, eps: float, residual_TD: Tensor | None = None, impl: str = "auto"
) -> Norm:
    """Root mean square norm of x, or of x + residual.

        sum = x + residual          y[t] = weight * sum[t] / sqrt(mean over d of sum[t, d]^2 + eps)

    Args:
        x_TD:        [T, D] floating point (cpp: fp32; triton: not fp64).
        weight_D:    [D], x's dtype, or bf16 with fp32 x.
        eps:         > 0; the model's, no default.
        residual_TD: like x_TD, or None.
        impl:        "auto", "ref", "cpp" or "triton".

    Returns:
        y_TD [T, D], x's dtype; with a residual (y_TD, sum_TD). Statistics in at least fp32.

    Raises:
        ValueError: a shape, dtype or eps breaks the rules above.

    Gradient: x, weight, residual, without a graph of its own; the weight's summed in a fixed order, in fp32.
    Memory: sum is kept for the backward, y is not. Bitwise: a row's bits depend on that row only; gradients do not
    depend on the number of threads.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    check = TensorChecker("rms_norm")
    check("x_TD", x_TD, FLOATS)
    check("weight_D", weight_D, (x_TD.dtype, torch.bfloat16) if x_TD.dtype == torch.float32 else (x_TD.dtype,))
    if residual_TD is not None:
        check("residual_TD", residual_TD, (x_TD.dtype,))
    check_rule("rms_norm", "D", x_TD.shape[1], x_TD.shape[1] > 0, ">= 1")
    check_rule("rms_norm", "eps", eps, 0 < eps < torch.inf, "a finite number > 0")
    impl = choose_impl("rms_norm", impl, impls_of("rms_norm", x_TD.dtype), x_TD.device)
    return _run(impl, x_TD, weight_D, eps, residual_TD)


def rms_norm_unchecked(x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None = None) -> Norm:
    """`rms_norm` for tensors known to be right; x may have more dimensions in front."""
    return _run(auto_impl("rms_norm", x_TD.device.type, x_TD.dtype), x_TD, weight_D, eps, residual_TD)


def _run(impl: str, x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None) -> Norm:
    if impl == "ref":
        return rms_norm_ref(x_TD, weight_D, eps=eps, residual_TD=residual_TD)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(impl, x_TD, weight_D, eps, residual_TD)
    y_TD, sum_TD = kernels_of("rms_norm", impl).rms_norm(x_TD, weight_D, eps, residual_TD)
    return y_TD if residual_TD is None else (y_TD, sum_TD)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / rms and g = grad * weight: dsum = r (g - sum r^2 mean(g sum)), dweight = sum of grad sum r."""

    @staticmethod
    def forward(ctx: Any, impl: str, x_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor | None) -> Any:
        y_TD, sum_TD = kernels_of("rms_norm", impl).rms_norm(x_TD, weight_D, eps, residual_TD)
        ctx.save_for_backward(x_TD if residual_TD is None else sum_TD, weight_D)
        ctx.impl, ctx.eps, ctx.has_residual = impl, eps, residual_TD is not None
        return (y_TD, sum_TD) if ctx.has_residual else y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_TD: Tensor, grad_sum_TD: Tensor | None = None) -> tuple[Tensor | None, ...]:
        sum_TD, weight_D = ctx.saved_tensors
        kernels = kernels_of("rms_norm", ctx.impl)
        grad_TD, grad_weight_D = kernels.rms_norm_backward(sum_TD, weight_D, ctx.eps, grad_y_TD, grad_sum_TD)
        return None, grad_TD, grad_weight_D, None, grad_TD if ctx.has_residual else None
