"""Decides how close is close enough, for every numeric test of the project.

    |actual - truth| <= 2 |plain - truth| + tolerance          element by element

truth is the reference in fp64. plain is the reference in the kernel's own dtype. So an
implementation may be about as wrong as straightforward PyTorch, element by element, and no more.
The tolerance covers elements where plain is right by luck. It is absolute, so keep what is compared
near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_error_rule(
    actual: Tensor, plain: Tensor, truth: Tensor, *, name: str, dtype: torch.dtype | None = None
) -> None:
    """Asserts that `actual` keeps the rule; dtype is the one of the work, by default actual's.

    NaN and infinities must be at the same positions in actual and truth, infinities with the same
    sign.
    """
    assert actual.shape == plain.shape == truth.shape, (
        f"{name}: {actual.shape}, {plain.shape}, {truth.shape} differ"
    )
    assert truth.dtype == torch.float64, f"{name}: truth must be fp64, got {truth.dtype}"
    tolerance = TOLERANCE[dtype or actual.dtype]
    actual_64, plain_64, truth_64 = (x.detach().cpu().double() for x in (actual, plain, truth))
    finite = truth_64.isfinite()
    excess = (
        (actual_64 - truth_64).abs()
        - 2 * (plain_64 - truth_64).abs().nan_to_num(nan=0.0, posinf=0.0)
        - tolerance
    )
    same = (actual_64 == truth_64) | (actual_64.isnan() & truth_64.isnan())
    excess = torch.where(
        finite, excess.nan_to_num(nan=torch.inf), torch.where(same, -1.0, torch.inf)
    )
    if excess.numel() == 0 or excess.max() <= 0:
        return
    worst = _coordinate(excess, int(excess.argmax()))
    raise AssertionError(
        f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements break the error rule; "
        f"worst at {list(worst)}: "
        f"actual {actual_64[worst].item():.9g}, plain {plain_64[worst].item():.9g}, truth "
        f"{truth_64[worst].item():.9g} "
        f"(tolerance {tolerance:g})"
    )


def assert_bitwise_equal(a: Tensor, b: Tensor, *, name: str) -> None:
    """Asserts the same shape, dtype and bits; NaN equals NaN, 0.0 differs from -0.0."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), (
        f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}"
    )
    a_cpu = a.detach().cpu()
    b_cpu = b.detach().cpu()
    equal = a_cpu == b_cpu
    if a.dtype.is_floating_point:
        equal = (equal & (a_cpu.signbit() == b_cpu.signbit())) | (a_cpu.isnan() & b_cpu.isnan())
    if equal.all():
        return
    first = _coordinate(equal, int((~equal).flatten().int().argmax()))
    raise AssertionError(
        f"{name}: {int((~equal).sum())} of {equal.numel()} elements differ; first at "
        f"{list(first)}: "
        f"{a_cpu[first].item()!r} and {b_cpu[first].item()!r}"
    )


def assert_equal_across_variants(
    a: Tensor,
    b: Tensor,
    *,
    device: str,
    name: str,
    dtype: torch.dtype | None = None,
    scale: float | Tensor = 1.0,
) -> None:
    """Asserts that the results of two variants of a Triton kernel agree.

    Triton compiles a kernel anew for every dtype, constexpr, absent pointer, number that is 1 and
    alignment. Two such variants may contract different products into multiply-adds. They may also
    lay out a row differently, and so sum it in another order. On a card ("cuda") they therefore
    keep the error rule, each as the other's truth. On a "cpu" the interpreter runs the same Python
    for both, and our C++ promises equal bits, so there they must be bitwise equal.

    Args:
        dtype: the narrowest dtype of the work, by default that of `a`.
        scale: divides the values to bring them near 1, where the tolerance of the rule belongs.
    """
    if device == "cpu" or not a.is_floating_point():
        assert_bitwise_equal(a, b, name=name)
        return
    assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
    scale_cpu = scale.detach().cpu().double() if isinstance(scale, Tensor) else scale
    a_64, b_64 = (x.detach().cpu().double() / scale_cpu for x in (a, b))
    variants_name = f"{name} of two compiled variants"
    assert_error_rule(a_64, b_64, b_64, name=variants_name, dtype=dtype or a.dtype)


def _coordinate(x: Tensor, flat_idx: int) -> tuple[int, ...]:
    """Returns the index into x of an element of x.flatten()."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_idx), x.shape))
