"""What the tests of rms_norm, swiglu and rotary share: values with their gradients, and the three
ways to get them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from socpo_fast.ops._impl import extension_is_built
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cpp = pytest.mark.skipif(not extension_is_built(), reason="extension not built")
# Every kernel with the dtypes it takes. Triton's interpreter cuts bf16 off instead of rounding it.
KERNELS = [
    pytest.param("cpp", torch.float32, marks=needs_cpp),
    ("triton", torch.float32),
    ("triton", torch.float16),
    *([("triton", torch.bfloat16)] if DEVICE == "cuda" else []),
    ("ref", torch.bfloat16),
]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """fp32 that bf16 and fp16 hold exactly, so that every dtype computes on the same numbers."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))
    return values.to(torch.bfloat16).float()


def values_and_gradients(
    function: Function, inputs: list[Tensor], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Outputs of function(*inputs), then the gradient of each input under a random upstream
    gradient.
    """
    moved = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    out = function(*moved)
    outputs = list(out) if isinstance(out, tuple) else [out]
    upstream = [randn(*x.shape, seed=idx + 7).to(x) for idx, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, moved, upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def assert_as_right_as_ref(
    run: Function,
    ref: Function,
    inputs: list[Tensor],
    dtype: torch.dtype,
    device: str,
    *,
    scales: list[float],
) -> None:
    """Holds outputs and gradients to the error rule, each divided by its scale."""
    actual = values_and_gradients(run, inputs, dtype, device)
    plain, truth = (values_and_gradients(ref, inputs, t, "cpu") for t in (dtype, torch.float64))
    for idx, three in enumerate(zip(actual, plain, truth, strict=True)):
        a, p, t = (x.cpu() / scales[idx] for x in three)
        assert_error_rule(a, p, t, name=f"result {idx}", dtype=dtype)


def assert_same_bits(one: list[Tensor], other: list[Tensor], name: str) -> None:
    for idx, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_bitwise_equal(a, b, name=f"{name}, result {idx}")


def assert_rows_alone_have_their_bits(
    run: Function, inputs: list[Tensor], whole: list[Tensor], rows: slice, device: str
) -> None:
    """Rows of all inputs alone against the same rows of what all of them gave.

    A copy starts at a multiple of 16 bytes, as every tensor does. A slice may start anywhere, for
    which Triton compiles another variant.
    """
    across_variants = partial(assert_equal_across_variants, device=device)
    for name, compare, part in (
        ("a copy of rows", assert_bitwise_equal, [x[rows].clone() for x in inputs]),
        ("rows", across_variants, [x[rows] for x in inputs]),
    ):
        out = run(*part)
        outputs = list(out) if isinstance(out, tuple) else [out]
        for idx, (alone, together) in enumerate(zip(outputs, whole, strict=True)):
            compare(alone, together[rows], name=f"{name} {rows}, result {idx}")


def thread_counts() -> Iterator[int]:
    """1, 2, 3 and 5 threads, and back to what it was."""
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            yield num_threads
    finally:
        torch.set_num_threads(before)
