"""Computes RMSNorm together with the residual addition before it, forward and backward.

Departs from the textbook: the op returns the norm and the sum, so the residual stream is read and
written once a norm instead of three times.

    residual --(+)--------------------------> sum      the residual of the next norm
    x --------'  '---> rms_norm -----------> y        the input of the next sublayer
"""

from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule, is_autocasting, whole
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op

Pair = tuple[Tensor, Tensor]
Norm = Tensor | Pair


def rms_norm_ref(
    x_TD: Tensor, weight_D: Tensor, *, eps: float, residual_TD: Tensor | None = None
) -> Norm:
    """Computes `rms_norm`, unchecked."""
    sum_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide = sum_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    y_TD = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(
        x_TD.dtype
    )
    return y_TD if residual_TD is None else (y_TD, sum_TD)


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    residual_TD: Tensor | None = None,
    impl: str = "auto",
) -> Norm:
    """Computes the root mean square norm of x, or of x + residual.

        sum  = x + residual
        y[t] = weight * sum[t] / sqrt(mean over d of sum[t, d]^2 + eps)

    Args:
        x_TD:        [T, D] floating point (cpp: fp32; triton: not fp64).
        weight_D:    [D], x's dtype, or bf16 with fp32 x.
        eps:         > 0, from the model's config; no default, since a wrong one goes unnoticed.
        residual_TD: like x_TD, or None.
        impl:        "auto", "ref", "cpp" or "triton".

    Returns:
        y_TD [T, D], x's dtype; with a residual (y_TD, sum_TD). Statistics in at least fp32.

    Raises:
        ValueError: a shape, dtype or eps breaks the rules above.

    Gradient: x, weight, residual; no second derivative. The gradient of weight is summed in fp32 in
    a fixed order.
    Memory: sum is kept for the backward, y is not. Bitwise: batch-invariant; gradients are
    thread-invariant.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    weight_D = whole("rms_norm", "weight_D", weight_D)
    # Under autocast torch computes its own norms in fp32, and so does this one.
    if is_autocasting(x_TD) and x_TD.dtype != torch.float64:
        x_TD = x_TD.to(torch.float32)
        weight_D = weight_D.to(torch.float32)
        residual_TD = None if residual_TD is None else residual_TD.to(torch.float32)
    check = TensorChecker("rms_norm")
    check("x_TD" if x_TD.dim() == 2 else "x_THD", x_TD, FLOATS)
    check(
        "weight_D",
        weight_D,
        (x_TD.dtype, torch.bfloat16) if x_TD.dtype == torch.float32 else (x_TD.dtype,),
    )
    check.optional((x_TD.dtype,), residual_TD=residual_TD)
    check_rule("rms_norm", "D", x_TD.shape[-1], x_TD.shape[-1] > 0, ">= 1")
    check_rule("rms_norm", "eps", eps, 0 < eps < torch.inf, "a finite number > 0")
    impl = pick_impl("rms_norm", impl, x_TD)
    if impl == "ref":
        return rms_norm_ref(x_TD, weight_D, eps=eps, residual_TD=residual_TD)
    y_TD, sum_TD = _rms_norm(x_TD, weight_D, residual_TD, eps, impl)
    return y_TD if residual_TD is None else (y_TD, sum_TD)


def _save(ctx: Any, inputs: tuple, outputs: Pair) -> None:
    x, weight_D, residual, ctx.eps, ctx.impl = inputs
    # Without a residual the sum is x itself, and the op's second output is empty.
    ctx.has_residual = residual is not None
    ctx.save_for_backward(outputs[1] if ctx.has_residual else x, weight_D)
    if not ctx.has_residual:
        ctx.mark_non_differentiable(outputs[1])


def _backward(ctx: Any, grad_y: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    """Computes dsum = r (g - sum r^2 mean(g sum)) and dweight, the sum over rows of grad sum r.

    r = 1 / rms of a row, g = grad * weight. dsum is the gradient of both x and the residual.
    """
    sum_, weight_D = ctx.saved_tensors
    grad, grad_weight_D = _rms_norm_backward(
        sum_, weight_D, grad_y, grad_sum if ctx.has_residual else None, ctx.eps, ctx.impl
    )
    return grad, grad_weight_D, grad if ctx.has_residual else None, None, None


# sum is empty without a residual, since an output of a registered op must not be an input.
_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor weight, Tensor? residual, float eps, str impl) "
    "-> (Tensor y, Tensor sum)",
    lambda x, weight, residual, eps, impl: kernels_of("rms_norm", impl).rms_norm(
        x, weight, eps, residual
    ),
    fake=lambda x, weight, residual, *_: (
        x.new_empty(x.shape),
        x.new_empty((0,) if residual is None else x.shape),
    ),
    derivative=(_save, _backward),
)
# grad_sum: the gradient that reaches the sum from the layers after it; it is added to grad_x.
# grad_weight is fp32; autograd casts it to the weight's dtype.
_rms_norm_backward = define_op(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor grad_y, Tensor? grad_sum, float eps, "
    "str impl) -> (Tensor grad_x, Tensor grad_weight)",
    lambda x, weight, grad_y, grad_sum, eps, impl: kernels_of("rms_norm", impl).rms_norm_backward(
        x, weight, eps, grad_y, grad_sum
    ),
    fake=lambda x, weight, *_: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
    ),
)
