"""Computes a batch-invariant linear layer: a row's result does not depend on the other rows.

So a token's activations are bitwise equal in a prompt, in a batch and alone. On the CPU a kernel of
our own reads the weights as they are stored (fp32 or bf16, no packed copy). Departs from torch's
linear, whose GEMM libraries sum in another order for few rows, and which needs both factors in one
dtype.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, autocast, check_rule, whole
from socpo_fast.ops._head import MIN_ROWS
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op


def linear_ref(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Computes `linear`, unchecked."""
    # Below MIN_ROWS rows a library GEMM sums in another order, so zero rows are added.
    missing = MIN_ROWS - x_TD.shape[0] if x_TD.is_cpu else 0
    padded_TD = F.pad(x_TD, (0, 0, 0, missing)) if missing > 0 else x_TD
    bias_N = bias_N if bias_N is None else bias_N.to(x_TD.dtype)
    return F.linear(padded_TD, weight_ND.to(x_TD.dtype), bias_N)[: x_TD.shape[0]]


def linear(
    x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Computes one linear layer.

        out[t, n] = sum_d x[t, d] weight[n, d] + bias[n]

    Args:
        x_TD:      [T, D] floating point (cpp: fp32), rows contiguous.
        weight_ND: [N, D], x's dtype, or bf16 with fp32 x, then converted as it is read.
        bias_N:    [N], weight's dtype, or None.
        impl:      "auto", "ref" or "cpp".

    Returns:
        out_TN [T, N], x's dtype; fp32 sums.

    Raises:
        ValueError: a shape, dtype or stride breaks the rules above.

    Gradient: x, weight, bias; in cpp by `torch.ops.socpo.matmul_`, for fp32 weights.
    Bitwise (cpp): batch-invariant and thread-invariant.
    """
    x_TD, weight_ND = autocast(x_TD, whole("linear", "weight_ND", weight_ND))
    if bias_N is not None:
        bias_N = whole("linear", "bias_N", bias_N).to(weight_ND.dtype)
    check = TensorChecker("linear")
    check_factors(check, "x_TD", x_TD, "weight_ND", weight_ND)
    check.optional((weight_ND.dtype,), bias_N=bias_N)
    impl = pick_impl("linear", impl, x_TD)
    # The registered op has a derivative for weights of x's dtype only.
    needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_ND.requires_grad)
    if impl == "ref" or (needs_grad and weight_ND.dtype != x_TD.dtype):
        return linear_ref(x_TD, weight_ND, bias_N)
    return _linear(x_TD, weight_ND, bias_N, impl)


def check_factors(
    check: TensorChecker,
    x_name: str,
    x: Tensor,
    weight_name: str,
    weight: Tensor,
) -> None:
    """Checks both factors of a product of rows x with a weight; fp32 x allows a bf16 weight."""
    check(x_name, x, FLOATS)
    check(
        weight_name,
        weight,
        (x.dtype, torch.bfloat16) if x.dtype == torch.float32 else (x.dtype,),
    )
    check_rule(
        check.where,
        f"strides of {weight_name}",
        weight.stride(),
        weight.is_contiguous(),
        "contiguous",
    )
    check_rule(check.where, "D", x.shape[1], x.shape[1] > 0, ">= 1")


def _save(ctx: Any, inputs: tuple, outputs: Tensor) -> None:
    # x is needed for dweight only; frozen weights let go of it after the forward.
    x_TD, weight_ND, _, ctx.impl = inputs
    ctx.save_for_backward(x_TD if ctx.needs_input_grad[1] else None, weight_ND)


def _backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
    """Computes dx = grad weight, dweight = grad^T x and dbias, the sum of grad's rows."""
    x_TD, weight_ND = ctx.saved_tensors
    grad_TN = grad_TN.contiguous()
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    return (
        _matmul(grad_TN, weight_ND, ctx.impl) if needs_x else None,
        _matmul(grad_TN.t(), x_TD, ctx.impl) if needs_weight else None,
        grad_TN.sum(0) if needs_bias else None,
        None,
    )


def _matmul_kernel(a: Tensor, b: Tensor, impl: str) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[1]))
    kernels_of("linear", impl).matmul_(out, a, b, False)
    return out


_linear = define_op(
    "linear(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    lambda x, weight, bias, impl: kernels_of("linear", impl).linear(x, weight, bias),
    fake=lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
    derivative=(_save, _backward),
)
# An op by itself, since torch.compile traces _backward, which may call registered ops only.
_matmul = define_op(
    "matmul(Tensor a, Tensor b, str impl) -> Tensor",
    _matmul_kernel,
    fake=lambda a, b, impl: a.new_empty((a.shape[0], b.shape[1])),
)
