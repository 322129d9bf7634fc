"""The gated activation of an MLP on the two halves of one GEMM's output, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import auto_impl, choose_impl, impls_of, kernels_of


def swiglu_ref(gate_up_TJ: Tensor) -> Tensor:
    gate_TI, up_TI = gate_up_TJ.to(torch.promote_types(gate_up_TJ.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate_TI) * up_TI).to(gate_up_TJ.dtype)


def swiglu(gate_up_TJ: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up.

        out[t, i] = gate[t, i] sigmoid(gate[t, i]) up[t, i]     gate = gate_up[:, :J / 2], up = gate_up[:, J / 2:]

    Args:
        gate_up_TJ: [T, J] floating point (cpp: fp32; triton: not fp64), J even.
        impl:       "auto", "ref", "cpp" or "triton".

    Returns:
        [T, J / 2], the same dtype.

    Raises:
        ValueError: J is odd, or a dtype breaks the rules above.

    Gradient: gate_up, without a graph of its own. Memory: the input is kept for the backward. Bitwise (not ref):
    element by element the same bits, wherever it stands and however many threads work (torch's silu finishes a
    thread's share with other instructions).
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    TensorChecker("swiglu")("gate_up_TJ", gate_up_TJ, FLOATS)
    check_rule("swiglu", "J", gate_up_TJ.shape[1], gate_up_TJ.shape[1] % 2 == 0, "even")
    return _run(choose_impl("swiglu", impl, impls_of("swiglu", gate_up_TJ.dtype), gate_up_TJ.device), gate_up_TJ)


def swiglu_unchecked(gate_up_TJ: Tensor) -> Tensor:
    """`swiglu` for a tensor known to be right."""
    return _run(auto_impl("swiglu", gate_up_TJ.device.type, gate_up_TJ.dtype), gate_up_TJ)


def _run(impl: str, gate_up_TJ: Tensor) -> Tensor:
    if impl == "ref":
        return swiglu_ref(gate_up_TJ)
    if torch.is_grad_enabled():
        return _Swiglu.apply(impl, gate_up_TJ)
    return kernels_of("swiglu", impl).swiglu(gate_up_TJ)


class _Swiglu(torch.autograd.Function):
    """With s = sigmoid(gate): dgate = grad up s (1 + gate (1 - s)), dup = grad gate s."""

    @staticmethod
    def forward(ctx: Any, impl: str, gate_up_TJ: Tensor) -> Tensor:
        ctx.impl = impl
        ctx.save_for_backward(gate_up_TJ)
        return kernels_of("swiglu", impl).swiglu(gate_up_TJ)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TI: Tensor) -> tuple[None, Tensor]:
        return None, kernels_of("swiglu", ctx.impl).swiglu_backward(*ctx.saved_tensors, grad_TI)
