"""Computes the gated activation of an MLP (SwiGLU), forward and backward.

One GEMM gives gate and up side by side, J = 2 I columns; the op reads both halves in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op


def swiglu_ref(gate_up_TJ: Tensor) -> Tensor:
    """Computes `swiglu`, unchecked."""
    gate_TI, up_TI = gate_up_TJ.to(torch.promote_types(gate_up_TJ.dtype, torch.float32)).chunk(
        2, dim=-1
    )
    return (F.silu(gate_TI) * up_TI).to(gate_up_TJ.dtype)


def swiglu(gate_up_TJ: Tensor, *, impl: str = "auto") -> Tensor:
    """Computes silu(gate) * up.

        out[t, i] = gate[t, i] sigmoid(gate[t, i]) up[t, i]
        gate      = gate_up[:, :J / 2],    up = gate_up[:, J / 2:]

    Args:
        gate_up_TJ: [T, J] floating point (cpp: fp32; triton: not fp64), J even.
        impl:       "auto", "ref", "cpp" or "triton".

    Returns:
        [T, J / 2], the same dtype.

    Raises:
        ValueError: J is odd, or a dtype breaks the rules above.

    Gradient: gate_up; no second derivative. Memory: the input is kept for the backward.
    Bitwise (not ref): an element's result depends on neither its position nor the number of threads
    (torch's silu computes the end of each thread's range with other instructions).
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    TensorChecker("swiglu")("gate_up_TJ", gate_up_TJ, FLOATS)
    check_rule("swiglu", "J", gate_up_TJ.shape[1], gate_up_TJ.shape[1] % 2 == 0, "even")
    impl = pick_impl("swiglu", impl, gate_up_TJ)
    return swiglu_ref(gate_up_TJ) if impl == "ref" else _swiglu(gate_up_TJ, impl)


def _save(ctx: Any, inputs: tuple, outputs: Tensor) -> None:
    # Only the input is kept. The backward computes the sigmoid again.
    gate_up_TJ, ctx.impl = inputs
    ctx.save_for_backward(gate_up_TJ)


def _backward(ctx: Any, grad_TI: Tensor) -> tuple[Tensor, None]:
    """Computes dgate = grad up s (1 + gate (1 - s)) and dup = grad gate s; s = sigmoid(gate)."""
    return _swiglu_backward(*ctx.saved_tensors, grad_TI, ctx.impl), None


_swiglu = define_op(
    "swiglu(Tensor gate_up, str impl) -> Tensor",
    lambda x, impl: kernels_of("swiglu", impl).swiglu(x),
    fake=lambda x, impl: x.new_empty((x.shape[0], x.shape[1] // 2)),
    derivative=(_save, _backward),
)
_swiglu_backward = define_op(
    "swiglu_backward(Tensor gate_up, Tensor grad, str impl) -> Tensor",
    lambda x, grad, impl: kernels_of("swiglu", impl).swiglu_backward(x, grad),
    fake=lambda x, grad, impl: x.new_empty(x.shape),
)
