"""Compares rms_norm and its backward with fp64; tests batch-invariance and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import rms_norm
from socpo_fast.ops.rms_norm import rms_norm_ref
from tests.helpers.elementwise import (
    DEVICE,
    KERNELS,
    assert_as_right_as_ref,
    assert_batch_invariant,
    assert_same_bits,
    needs_cpp,
    randn,
    thread_counts,
    values_and_gradients,
)
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)

EPS = 1e-5
# Widths: one; less than a vector; vectors with a tail, prime; SmolLM2's; Llama 8B's. Rows: none,
# one, one more than a partial sum of the weight's gradient, several partial sums.
SHAPES = [(97, 1), (33, 7), (65, 101), (1, 576), (0, 576), (97, 576), (2, 4096)]


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), KERNELS)
def test_as_right_as_ref(
    impl: str, dtype: torch.dtype, shape: tuple[int, int], has_residual: bool
) -> None:
    rows, width = shape
    inputs = [randn(rows, width), 1 + 0.5 * randn(width, seed=1), 2 * randn(rows, width, seed=2)][
        : 2 + has_residual
    ]
    of_weight = max(1.0, rows**0.5)  # its gradient is a sum over rows

    def run(
        x: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps=EPS, residual_TD=residual, impl=impl)

    def ref(
        x: Tensor, weight: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm_ref(x, weight, eps=EPS, residual_TD=residual)

    scales = [4.0] * (1 + has_residual) + [4.0, 4 * of_weight, 4.0][: 2 + has_residual]
    assert_as_right_as_ref(
        run, ref, inputs, dtype, DEVICE if impl == "triton" else "cpu", scales=scales
    )


@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_rows_far_from_one(impl: str) -> None:
    """Zeros and tiny numbers, where eps decides, and squares of 1e15 keep the error rule.

    NaN stays in its row.
    """
    device = DEVICE if impl == "triton" else "cpu"
    x = randn(6, 130) * torch.tensor([0.0, 1e-4, 1e15, 1.0, torch.nan, 1.0])[:, None]
    weight = randn(130, seed=1)
    actual = rms_norm(x.to(device), weight.to(device), eps=EPS, impl=impl)
    truth = rms_norm_ref(x.double(), weight.double(), eps=EPS)
    assert_error_rule(actual, rms_norm_ref(x, weight, eps=EPS), truth, name="y")


@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_bf16_weight_under_fp32(impl: str) -> None:
    device = DEVICE if impl == "triton" else "cpu"
    x = randn(70, 101).to(device)
    weight = randn(101, seed=1).bfloat16().to(device).requires_grad_()
    y = rms_norm(x, weight, eps=EPS, impl=impl)
    y_wide = rms_norm(x, weight.float(), eps=EPS, impl=impl)
    assert_equal_across_variants(y, y_wide, device=device, name="y", scale=4.0)
    y.backward(torch.ones_like(y))
    wide = weight.detach().float().requires_grad_()
    rms_norm(x, wide, eps=EPS, impl=impl).sum().backward()
    # The gradient is a sum over rows.
    grad = wide.grad.bfloat16()
    scale = wide.grad.abs().max()
    assert_equal_across_variants(weight.grad, grad, device=device, name="gradient", scale=scale)


@pytest.mark.parametrize("has_residual", [False, True])
def test_ref_gradcheck(has_residual: bool) -> None:
    inputs = [x.double().requires_grad_() for x in (randn(3, 5), randn(5), randn(3, 5, seed=1))]
    assert torch.autograd.gradcheck(
        lambda x, w, r: rms_norm(x, w, eps=EPS, residual_TD=r if has_residual else None), inputs
    )


@pytest.mark.parametrize("width", [7, 130, 576])
@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_batch_and_thread_invariant(impl: str, width: int) -> None:
    """Rows alone equal them in a batch, and C++ outputs and gradients are thread-invariant."""
    device = DEVICE if impl == "triton" else "cpu"
    inputs = [randn(300, width), randn(width), randn(300, width, seed=1)]

    def run(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps=EPS, residual_TD=residual, impl=impl)

    all_rows = values_and_gradients(run, inputs, torch.float32, device)
    x, weight, residual = (x.to(device) for x in inputs)
    for rows in (slice(0, 1), slice(299, 300), slice(3, 20), slice(0, 150), slice(1, None)):
        assert_batch_invariant(
            lambda x, residual: run(x, weight, residual), [x, residual], all_rows[:2], rows, device
        )
    for num_threads in thread_counts() if impl == "cpp" else ():
        assert_same_bits(
            values_and_gradients(run, inputs, torch.float32, device),
            all_rows,
            f"{num_threads} threads",
        )


@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_strided_inputs_and_heads(impl: str) -> None:
    """Strided inputs equal their copies.

    Cases: every other row and column, and q's heads as a slice of qkv, whose rows have gaps.
    """
    device = DEVICE if impl == "triton" else "cpu"
    x = randn(20, 60)[::2, ::2].to(device)
    weight = randn(60)[::2].to(device)
    residual = randn(30, 10).T.to(device)
    strided = rms_norm(x, weight, eps=EPS, residual_TD=residual, impl=impl)
    from_copies = rms_norm(
        *(t.contiguous() for t in (x, weight)),
        eps=EPS,
        residual_TD=residual.contiguous(),
        impl=impl,
    )
    assert_same_bits(list(strided), list(from_copies), "strided")
    heads = randn(6, 7, 16)[:, 2:5]
    head_weight = randn(16)
    expected = rms_norm(heads.reshape(-1, 16), head_weight, eps=EPS).view(6, 3, 16)
    assert_bitwise_equal(rms_norm(heads, head_weight, eps=EPS), expected, name="heads")


def test_gradient_of_what_is_used_only() -> None:
    """Gradients are right where an output is unused or a weight frozen.

    The sum of the last layer goes nowhere, and a frozen weight requires no gradient.
    """
    x = randn(5, 8).requires_grad_()
    residual = randn(5, 8, seed=1)
    y, _ = rms_norm(x, randn(8), eps=EPS, residual_TD=residual)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected, _ = rms_norm_ref(x, randn(8), eps=EPS, residual_TD=residual)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])
    assert not rms_norm(x.detach(), randn(8), eps=EPS).requires_grad
    with torch.no_grad():
        assert not rms_norm(x, randn(8), eps=EPS).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight_D": torch.ones(3)},
            r"weight_D must be float32/bfloat16 \[D=4\], got float32 \[3\]",
        ),
        ({"weight_D": torch.ones(4, dtype=torch.float16)}, "weight_D must be float32/bfloat16"),
        ({"residual_TD": torch.ones(2, 4)}, r"residual_TD must be float32 \[T=3, D=4\]"),
        ({"residual_TD": torch.ones(3, 4).double()}, "residual_TD must be float32"),
        ({"x_TD": torch.ones(3, 0), "weight_D": torch.ones(0)}, "D must be >= 1, got 0"),
        ({"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
        (
            {"x_TD": torch.ones(3, 4).double(), "weight_D": torch.ones(4).double(), "impl": "cpp"},
            "one of auto, ref for float64, got",
        ),
        (
            {"x_TD": torch.ones(3, 4).half(), "weight_D": torch.ones(4).half(), "impl": "cpp"},
            "one of auto, ref, triton for float16",
        ),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
        rms_norm(**({"x_TD": torch.ones(3, 4), "weight_D": torch.ones(4), "eps": EPS} | change))


@needs_cpp
def test_opcheck() -> None:
    x = randn(5, 6)
    weight = randn(6)
    for residual in (None, randn(5, 6, seed=1)):
        torch.library.opcheck(torch.ops.socpo.rms_norm.default, (x, weight, EPS, residual))
        torch.library.opcheck(
            torch.ops.socpo.rms_norm_backward.default, (x, weight.bfloat16(), EPS, x, residual)
        )
