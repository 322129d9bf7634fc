"""Compares swiglu and its backward with fp64.

Also tests that an element depends neither on its position nor on threads.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import swiglu
from socpo_fast.ops.swiglu import swiglu_ref
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
from tests.helpers.error_rule import assert_error_rule

# Widths: one; less than a vector; vectors with a tail, prime; SmolLM2's, which is more than a
# Triton tile. Rows: none, one, many.
SHAPES = [(5, 1), (3, 7), (97, 101), (0, 8), (1, 1536), (33, 1536)]
COMPILED_TAIL = 5e-6  # relative error of silu from -80 on, in a compiled kernel


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), KERNELS)
def test_as_right_as_ref(impl: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    device = DEVICE if impl == "triton" else "cpu"
    gate_up = 2 * randn(shape[0], 2 * shape[1])
    assert_as_right_as_ref(
        lambda x: swiglu(x, impl=impl), swiglu_ref, [gate_up], dtype, device, scales=[8.0, 8.0]
    )


def tails() -> Tensor:
    """Returns numbers from -80 to 100, zeros of both signs, and tiny and huge numbers."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])
    return torch.cat([torch.linspace(-80, 100, 2003), ends])


def test_error_bound_of_compiled_silu() -> None:
    """COMPILED_TAIL bounds the error of silu in a compiled kernel, from its instructions.

    There exp is ex2.approx of x times log2(e), with the product rounded to fp32. At 80 the product
    is 115, and half of its last place is a relative error of 2.6e-6 in exp. log2(e) itself is
    rounded too.
    """
    gate = tails()
    exp = torch.exp2((-gate * 1.4426950408889634).double()).float()
    silu = gate * (1 / (1 + exp))
    truth = gate.double() * torch.sigmoid(gate.double())
    error = ((silu.double() - truth).abs() / truth.abs()).nan_to_num().max()
    assert 3e-6 < error < COMPILED_TAIL - 3 * 2.0**-22  # the rest is for ex2.approx and div.full


# numpy warns in Triton's interpreter.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_silu_is_right_in_both_tails(impl: str) -> None:
    """silu is right relative to itself from -80 on, in every lane.

    Below -80, where exp is nearly 0, it is right absolutely.
    """
    gate = tails()
    is_compiled = impl == "triton" and DEVICE == "cuda"
    out = swiglu(
        torch.cat([gate, torch.ones_like(gate)])[None].to(DEVICE if impl == "triton" else "cpu"),
        impl=impl,
    )
    truth = gate.double() * torch.sigmoid(gate.double())
    bound = COMPILED_TAIL if is_compiled else 6e-7
    assert ((out[0].cpu().double() - truth).abs() <= bound * truth.abs()).all()
    ends = torch.tensor([[-87.5, -1e4, torch.inf, torch.nan, 1.0, 1.0, 2.0, 1.0]])
    out = swiglu(ends.to(DEVICE if impl == "triton" else "cpu"), impl=impl)
    assert_error_rule(out, swiglu_ref(ends), swiglu_ref(ends.double()), name="ends")


def test_ref_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda x: swiglu(x), randn(3, 10).double().requires_grad_())


# Widths: less than a vector, vectors with a tail, whole vectors. There are enough rows for several
# threads.
@pytest.mark.parametrize(("num_rows", "width"), [(5001, 7), (521, 126), (173, 384)])
@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_batch_and_thread_invariant(impl: str, num_rows: int, width: int) -> None:
    """Rows alone equal them in a batch, and C++ outputs and gradients are thread-invariant."""
    device, num_rows = (DEVICE, min(num_rows, 40)) if impl == "triton" else ("cpu", num_rows)
    x = randn(num_rows, 2 * width)

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return swiglu(x, impl=impl)

    all_rows = values_and_gradients(run, [x], torch.float32, device)
    for rows in (
        slice(0, 1),
        slice(num_rows - 1, None),
        slice(3, 20),
        slice(0, num_rows // 2),
        slice(1, None),
    ):
        assert_batch_invariant(run, [x.to(device)], all_rows[:1], rows, device)
    for num_threads in thread_counts() if impl == "cpp" else ():
        assert_same_bits(
            values_and_gradients(run, [x], torch.float32, device),
            all_rows,
            f"{num_threads} threads",
        )


@needs_cpp
def test_an_element_has_the_same_bits_in_every_lane() -> None:
    """A row of one gate and one up, repeated over several vectors and a tail, gives one number."""
    x = randn(50, 2)
    for width in (1, 3, 16, 37):
        wide = swiglu(x.repeat_interleave(width, dim=1), impl="cpp")
        assert_same_bits([wide], [swiglu(x, impl="cpp").expand(-1, width)], f"width {width}")


@pytest.mark.parametrize("impl", [pytest.param("cpp", marks=needs_cpp), "triton"])
def test_strided_input(impl: str) -> None:
    x = randn(20, 24)[::2, ::2].to(DEVICE if impl == "triton" else "cpu")
    assert_same_bits([swiglu(x, impl=impl)], [swiglu(x.contiguous(), impl=impl)], "strided")


@pytest.mark.parametrize(
    ("x", "impl", "message"),
    [
        (torch.ones(2, 3), "auto", "J must be even, got 3"),
        (torch.ones(2, 4, dtype=torch.int32), "auto", "gate_up_TJ must be float32"),
        (torch.ones(4), "auto", r"gate_up_TJ must be .* \[T, J\], got float32 \[4\]"),
        (
            torch.ones(2, 4).double(),
            "triton",
            "impl must be one of auto, ref for float64, got 'triton'",
        ),
        (
            torch.ones(2, 4).bfloat16(),
            "cpp",
            "impl must be one of auto, ref, triton for bfloat16, got 'cpp'",
        ),
    ],
)
def test_refuses(x: Tensor, impl: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        swiglu(x, impl=impl)


@needs_cpp
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.socpo.swiglu.default, (randn(5, 6),))
    torch.library.opcheck(torch.ops.socpo.swiglu_backward.default, (randn(5, 6), randn(5, 3)))
