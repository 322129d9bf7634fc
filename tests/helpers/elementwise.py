"""Holds what the tests of rms_norm, swiglu and rotary share.

That is values with their gradients, the three implementations that give them, and comparisons. Read
values_and_gradients first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import available_impls
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cpp = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)
# Every kernel with the dtypes it takes. Triton's interpreter truncates to bf16 instead of rounding,
# so bf16 kernels are tested on a card only.
KERNELS = [
    pytest.param("cpp", torch.float32, marks=needs_cpp),
    ("triton", torch.float32),
    ("triton", torch.float16),
    *([("triton", torch.bfloat16)] if DEVICE == "cuda" else []),
    ("ref", torch.bfloat16),
]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Returns fp32 numbers that bf16 and fp16 hold exactly.

    So every dtype computes on the same numbers.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))
    return values.to(torch.bfloat16).float()


def values_and_gradients(
    function: Function, inputs: list[Tensor], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Returns the outputs of function(*inputs), then the gradient of each input.

    The upstream gradients are random, and the same in every call.
    """
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    upstream = [randn(*x.shape, seed=idx + 7).to(x) for idx, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
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
    """Asserts that outputs and gradients keep the error rule, each divided by its scale.

    The scales bring values near 1, where the tolerance of the rule belongs.
    """
    actual = values_and_gradients(run, inputs, dtype, device)
    plain, truth = (values_and_gradients(ref, inputs, t, "cpu") for t in (dtype, torch.float64))
    for idx, triple in enumerate(zip(actual, plain, truth, strict=True)):
        a, p, t = (x.cpu() / scales[idx] for x in triple)
        assert_error_rule(a, p, t, name=f"result {idx}", dtype=dtype)


def assert_same_bits(one: list[Tensor], other: list[Tensor], name: str) -> None:
    """Asserts that two lists of tensors are bitwise equal."""
    for idx, (a, b) in enumerate(zip(one, other, strict=True)):
        assert_bitwise_equal(a, b, name=f"{name}, result {idx}")


def assert_batch_invariant(
    run: Function, inputs: list[Tensor], all_outputs: list[Tensor], rows: slice, device: str
) -> None:
    """Asserts that some rows of the inputs give what they gave among all rows.

    A copy of rows starts at a multiple of 16 bytes, as every tensor does. A slice may start
    anywhere; for an unaligned start Triton compiles another variant, which may differ in the last
    bits.
    """
    across_variants = partial(assert_equal_across_variants, device=device)
    for name, compare, inputs_of_rows in (
        ("a copy of rows", assert_bitwise_equal, [x[rows].clone() for x in inputs]),
        ("rows", across_variants, [x[rows] for x in inputs]),
    ):
        result = run(*inputs_of_rows)
        outputs = list(result) if isinstance(result, tuple) else [result]
        for idx, (actual, expected) in enumerate(zip(outputs, all_outputs, strict=True)):
            compare(actual, expected[rows], name=f"{name} {rows}, result {idx}")


def thread_counts() -> Iterator[int]:
    """Yields 1, 2, 3 and 5, each set as torch's number of threads; restores the old number."""
    old_num_threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            yield num_threads
    finally:
        torch.set_num_threads(old_num_threads)
