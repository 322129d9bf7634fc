"""The helpers of all numeric tests must fail when they should, and say where."""

import pytest
import torch

from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)

TRUTH = torch.tensor([[1.0, 2.0], [3.0, torch.nan]], dtype=torch.float64)


def test_error_rule_allows_twice_the_plain_error() -> None:
    assert_error_rule(TRUTH.float(), TRUTH.float(), TRUTH, name="exact")
    plain = TRUTH + 0.5
    assert_error_rule(TRUTH - 1.0, plain, TRUTH, name="twice")
    with pytest.raises(AssertionError, match="3 of 4 elements break the error rule"):
        assert_error_rule(TRUTH - 1.01, plain, TRUTH, name="more than twice")


@pytest.mark.parametrize(
    ("index", "value"), [((1, 0), 4.0), ((0, 1), torch.nan), ((0, 0), torch.inf), ((1, 1), 0.0)]
)
def test_error_rule_names_the_worst_element(index: tuple[int, int], value: float) -> None:
    wrong = TRUTH.clone()
    wrong[index] = value
    with pytest.raises(
        AssertionError,
        match=rf"x: 1 of 4 .* worst at \[{index[0]}, {index[1]}\]: actual {value:g}, plain",
    ):
        assert_error_rule(wrong, TRUTH, TRUTH, name="x")


def test_bitwise_equal_names_the_first_difference() -> None:
    assert_bitwise_equal(TRUTH, TRUTH.clone(), name="x")
    with pytest.raises(
        AssertionError, match=r"x: 1 of 4 elements differ; first at \[1, 0\]: 3.0 and 4.0"
    ):
        assert_bitwise_equal(TRUTH, TRUTH + torch.tensor([[0.0, 0.0], [1.0, 0.0]]), name="x")
    with pytest.raises(AssertionError, match=r"first at \[0\]: 0.0 and -0.0"):
        assert_bitwise_equal(torch.zeros(1), -torch.zeros(1), name="zero")


def test_variants_may_differ_by_rounding_on_cuda_only() -> None:
    """Another order of summation changes a few last bits; here they are drawn at random."""
    values = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 1e8
    values[0, 0] = torch.nan
    last_bits = torch.randint(-3, 4, values.shape, generator=torch.Generator().manual_seed(1))
    other = values * (1 + last_bits * 2.0**-23)
    scale = values.nan_to_num().abs()
    assert_equal_across_variants(values, other, device="cuda", name="x", scale=scale)
    with pytest.raises(AssertionError, match="x: .* of 150 elements differ"):
        assert_equal_across_variants(values, other, device="cpu", name="x")


@pytest.mark.parametrize("wrong", [1.0 + 2e-5, torch.nan, torch.inf])
def test_variants_may_differ_by_rounding_only(wrong: float) -> None:
    right = torch.ones(1)
    ids = torch.tensor([3])
    with pytest.raises(AssertionError, match="x of two compiled variants: 1 of 1 elements break"):
        assert_equal_across_variants(torch.tensor([wrong]), right, device="cuda", name="x")
    with pytest.raises(AssertionError, match="ids: 1 of 1 elements differ"):
        assert_equal_across_variants(ids, ids + 1, device="cuda", name="ids")
