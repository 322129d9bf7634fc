"""Tests the linear layer of the engine: as exact as torch's, and batch-invariant."""

import pytest
import torch

from socpo_fast.ops import available_impls, linear
from socpo_fast.ops.linear import linear_ref
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule

IMPLS = [
    "ref",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            "cpp" not in available_impls().values(), reason="extension not built"
        ),
    ),
]

# (rows, outputs, width): one of each; fewer and more than a vector, a tile, a work item and a part
# of a sum in the C++, and one more than each; primes; no rows; SmolLM2's down projection; just
# enough rows for a panel.
SHAPES = [
    (1, 1, 1),
    (2, 7, 15),
    (3, 16, 17),
    (4, 6, 16),
    (5, 25, 33),
    (13, 97, 768),
    (7, 49, 769),
    (0, 8, 8),
]
SHAPES += [(97, 53, 1537), (200, 12, 64), (33, 576, 1536), (25, 49, 799)]


def problem(
    rows: int, outs: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Returns x, weight and bias; weight and bias in `dtype`."""
    generator = torch.Generator().manual_seed(rows + outs + width)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((rows, width), (outs, width), (outs,))
    )
    return x, (weight / width**0.5).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_cpp_is_as_right_as_torch(
    impl: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """With and without a bias, the error rule holds beside torch's own linear."""
    x, weight, bias = problem(*shape, dtype)
    for b in (None, bias):
        plain = torch.nn.functional.linear(x, weight.float(), b if b is None else b.float())
        truth = torch.nn.functional.linear(
            x.double(), weight.double(), b if b is None else b.double()
        )
        assert_error_rule(linear(x, weight, b, impl=impl), plain, truth, name=f"linear {shape}")


# Widths: one part of a sum with a tail, several parts, a tail only, whole vectors.
@pytest.mark.parametrize("width", [800, 1537, 31, 126, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_batch_and_thread_invariant(impl: str, dtype: torch.dtype, width: int) -> None:
    """A row is the same alone, in every tile, behind other rows, and with 1, 2 and 3 threads.

    1,200 rows are a long prompt, which is cut into blocks.
    """
    x, weight, bias = problem(1200, 101, width, dtype)
    all_rows = linear(x, weight, bias, impl=impl)
    for begin, end in (
        (0, 1),
        (5, 6),
        (3, 5),
        (2, 5),
        (9, 13),
        (1, 17),
        (7, 32),
        (40, 107),
        (1199, 1200),
        (600, 1200),
    ):
        some_rows = linear(x[begin:end], weight, bias, impl=impl)
        assert_bitwise_equal(some_rows, all_rows[begin:end], name=f"rows {begin} to {end}")
    old_num_threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert_bitwise_equal(
                linear(x, weight, bias, impl=impl), all_rows, name=f"{num_threads} threads"
            )
    finally:
        torch.set_num_threads(old_num_threads)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_both_forms_give_a_zero_the_same_sign(impl: str) -> None:
    """A product that underflows is -0, and the zeros past the end of a row make the sum 0.

    Both forms of the product, for few rows and for many, must do so.
    """
    for width in (9, 16, 17, 785):
        x = torch.full((25, width), 1e-30)
        weight = torch.full((5, width), -1e-30)
        many = linear(x, weight, impl=impl)
        few = linear(x[:1], weight, impl=impl)
        assert_bitwise_equal(many[:1], few, name=f"width {width}")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_nan(impl: str) -> None:
    """Strided inputs equal their copies, and NaN stays in its row."""
    x, weight, _ = problem(6, 5, 40)
    assert_bitwise_equal(
        linear(x[::2], weight, impl=impl), linear(x[::2].clone(), weight, impl=impl), name="strided"
    )
    columns = x.t().contiguous().t()
    assert_bitwise_equal(
        linear(columns, weight, impl=impl), linear(x, weight, impl=impl), name="by columns"
    )
    x[3, 39] = torch.nan
    out = linear(x, weight, impl=impl)
    assert out[3].isnan().all() and not out[[0, 1, 2, 4, 5]].isnan().any()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"x_TD": torch.zeros(3, 5)}, "weight_ND must be"),
        ({"weight_ND": torch.zeros(4, 8).t().contiguous().t()}, "contiguous"),
        ({"weight_ND": torch.zeros(4, 8, dtype=torch.float16)}, "float32/bfloat16"),
        ({"bias_N": torch.zeros(5)}, "bias_N must be"),
        ({"impl": "triton"}, "impl must be"),
    ],
)
def test_bad_input_is_named(change: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        linear(**({"x_TD": torch.zeros(3, 8), "weight_ND": torch.zeros(4, 8)} | change))


@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
def test_opcheck() -> None:
    x, weight, bias = problem(5, 6, 20)
    torch.library.opcheck(torch.ops.socpo.linear, (x, weight, bias))
    torch.library.opcheck(torch.ops.socpo.linear, (x, weight.bfloat16(), None))
    assert_bitwise_equal(linear_ref(x[:1], weight), linear_ref(x, weight)[:1], name="padded")
