"""Takes one step of AdamW on one parameter, in place; a bf16 parameter has an exact fp32 master.

Read split_master, join_master -> adamw_ref -> adamw.

A learning rate of 1e-6 moves a weight by a hundredth of the spacing of bf16 numbers, so a parameter
stored in bf16 only would never change. Mixed precision usually keeps a second copy in fp32. Here
the parameter itself is the master's high half and low_bits is the remainder: four bytes a weight
instead of six, and no copy after a step.

    fp32 master    s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm
    parameter      the left half, rounded to nearest: what the forward and the engine read
    low_bits       the right half, as a signed remainder in [-32768, 32767]
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op

INFINITY_BITS = 0x7F800000  # infinity in fp32; larger bit patterns are NaN


class StepFactors(NamedTuple):
    """The factors of a step, the same for every element; rounded to fp32 where they are used."""

    decay: float  # lr weight_decay
    beta1: float
    new_in_avg: float  # 1 - beta1
    beta2: float
    new_in_avg_sq: float  # 1 - beta2
    root_correction: float  # sqrt(1 - beta2^step)
    eps: float
    step_size: float  # lr / (1 - beta1^step)

    @classmethod
    def of(
        cls,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> Self:
        """Computes the factors from the settings of `adamw`."""
        beta1, beta2 = betas
        return cls(
            decay=lr * weight_decay,
            beta1=beta1,
            new_in_avg=1 - beta1,
            beta2=beta2,
            new_in_avg_sq=1 - beta2,
            root_correction=math.sqrt(1 - beta2**step),
            eps=eps,
            step_size=lr / (1 - beta1**step),
        )


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bf16 nearest to each fp32 number and the int16 remainder for join_master.

    Ties are rounded away from zero. Rounding ties to even, as x.bfloat16() does, could leave a
    remainder of +32768, which int16 cannot hold. Exact for every finite number whose high half is
    finite.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(param: Tensor, low_bits: Tensor) -> Tensor:
    """Returns the fp32 master of a bf16 parameter."""
    high = param.view(torch.int16).to(torch.int32) << 16
    return (high + low_bits.to(torch.int32)).view(torch.float32)


def adamw_ref(
    param: Tensor,
    low_bits: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    *factors: float,
) -> None:
    """Takes the step of `adamw`, unchecked.

    Every operation rounds once. The kernels do the same operations in the same order, and are
    bitwise equal.
    """
    step_factors = StepFactors(*factors)
    old = param.to(exp_avg.dtype) if low_bits is None else join_master(param, low_bits)
    if scale is not None:
        grad = grad * scale
    new_avg = exp_avg * step_factors.beta1 + grad * step_factors.new_in_avg
    new_avg_sq = exp_avg_sq * step_factors.beta2 + grad * grad * step_factors.new_in_avg_sq
    # In fp64: the library behind torch's fp32 sqrt rounds one number in a hundred the wrong way.
    root = new_avg_sq.double().sqrt().to(new_avg_sq.dtype)
    # Divided by a tensor: for a number, torch on a GPU multiplies by the reciprocal instead.
    denominator = root / root.new_full((), step_factors.root_correction) + step_factors.eps
    # The decay is added to the step first. Subtracted by itself, old * 1e-8 would be rounded away.
    new = old - (new_avg / denominator * step_factors.step_size + old * step_factors.decay)
    is_taken = new.to(param.dtype).isfinite()
    if low_bits is not None:
        # From this bit pattern on, the high half is rounded up to infinity; NaNs are above it, too.
        is_taken = new.view(torch.int32) & 0x7FFFFFFF < INFINITY_BITS - 0x8000
    is_taken &= new_avg_sq.isfinite()
    if scale is not None:
        is_taken &= scale.isfinite() & (scale > 0)
    for moment, new_moment in ((exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        moment.copy_(new_moment.where(is_taken, moment))
    new = new.where(is_taken, old)
    if low_bits is None:
        param.copy_(new)
    else:
        for half, new_half in zip((param, low_bits), split_master(new), strict=True):
            half.copy_(new_half)


@torch.no_grad()
def adamw(
    param: Tensor,
    low_bits: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Takes one step of AdamW, in place.

        g = scale grad        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        param = param - (lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
                         + lr weight_decay param)

    Args:
        param:       [..] fp32, bf16, fp16 or fp64, contiguous (cpp: fp32, bf16; triton: not fp64).
                     fp16 is computed in fp32 and rounded, which loses small steps.
        low_bits:    param's shape, int16: the low half of a bf16 param's fp32 master; None for
                     other dtypes.
        exp_avg, exp_avg_sq, grad: param's shape, fp32 (fp64 for fp64). grad is only read.
        lr:           >= 0.
        betas:        each in [0, 1).
        eps:          > 0.
        weight_decay: >= 0, decoupled.
        step:         >= 1, counted from the first step taken.
        scale:        [] of grad's dtype and device, or None for 1: the factor of gradient clipping.
                      Unless it is finite and > 0, the step changes nothing; the host does not
                      wait to know it.
        impl:         "auto", "ref", "cpp" or "triton".

    Raises:
        ValueError: a shape, dtype or number breaks the rules above.

    An element whose new value or v would not be finite (in param's dtype) is not changed, and its
    moments are not either.
    Memory: none (cpp, triton). Bitwise: the implementations are equal to each other, and a bf16
    param with its low_bits to an fp32 param.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    check = TensorChecker("adamw")
    check.flat("param_N", param, FLOATS)
    wide = (torch.promote_types(param.dtype, torch.float32),)
    for name, x in (("exp_avg_N", exp_avg), ("exp_avg_sq_N", exp_avg_sq), ("grad_N", grad)):
        check.flat(name, x, wide)
    needs_low_bits = param.dtype == torch.bfloat16
    rule = f"{'a tensor' if needs_low_bits else 'None'} for a param of {param.dtype}"
    check_rule(
        "adamw", "low_bits", type(low_bits).__name__, (low_bits is not None) == needs_low_bits, rule
    )
    if low_bits is not None:
        check.flat("low_bits_N", low_bits, (torch.int16,))
    check.optional(wide, scale_=scale)
    rules = (
        ("lr", lr, 0 <= lr < math.inf, "finite and >= 0"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "each in [0, 1)"),
        ("eps", eps, 0 < eps < math.inf, "finite and > 0"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "finite and >= 0"),
        ("step", step, step >= 1, ">= 1"),
    )
    for name, value, holds, rule in rules:
        check_rule("adamw", name, value, holds, rule)
    factors = StepFactors.of(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step)
    _adamw(
        param,
        low_bits,
        exp_avg,
        exp_avg_sq,
        grad,
        scale,
        list(factors),
        pick_impl("adamw", impl, param),
    )


def _kernel(
    param: Tensor,
    low_bits: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    factors: list[float],
    impl: str,
) -> None:
    step = adamw_ref if impl == "ref" else kernels_of("adamw", impl).adamw
    step(param, low_bits, exp_avg, exp_avg_sq, grad, scale, *factors)


_adamw = define_op(
    "adamw(Tensor(a!) param, Tensor(b!)? low_bits, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor grad, Tensor? scale, float[] factors, str impl) -> ()",
    _kernel,
    fake=lambda *_: None,
)
