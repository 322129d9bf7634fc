"""Tests sum_rows, which adds rows up by index without a sort.

It is made for a card; on a CPU it runs in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels.sum_rows import sum_rows
from tests.helpers.error_rule import assert_bitwise_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def in_order(x_ND: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Adds the rows one by one, in index order."""
    out = x_ND.new_zeros((num_rows, x_ND.shape[1]))
    for n, row in enumerate(rows_N.tolist()):
        out[row] += x_ND[n]
    return out


# The kernel reads 1024 rows at a time and adds 1024 columns at a time. Sizes: one row, less than
# both, more rows, one more column.
@pytest.mark.parametrize("sizes", [(1, 1, 1), (40, 9, 8), (1030, 30, 7), (12, 9, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_in_index_order(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Sums are bitwise those in index order, whatever the order of the rows.

    Repeated rows are next to each other, far apart, and at both ends.
    """
    num_values, num_rows, width = sizes
    rng = torch.Generator().manual_seed(num_values)
    x = torch.randn(num_values, width, generator=rng, dtype=dtype).to(DEVICE)
    rows = torch.randint(num_rows, (num_values,), generator=rng)
    rows[-1] = rows[0]  # one row repeats at both ends
    for rows_N in (rows.to(DEVICE), rows.sort().values.to(DEVICE)):
        assert_bitwise_equal(
            sum_rows(x, rows_N, num_rows), in_order(x, rows_N, num_rows), name="sums"
        )


def test_a_group_whose_attempts_share_a_prompt() -> None:
    """The rows that packing makes sum in index order too.

    They ascend, except that each attempt begins at the last row of the prompt.
    """
    rows = torch.cat(
        [torch.tensor([9, *range(start, start + 600)]) for start in (10, 610, 1210, 1810)]
    )
    x = torch.randn(rows.numel(), 5)
    out = sum_rows(x.to(DEVICE), rows.to(DEVICE), 2410)
    assert_bitwise_equal(out, in_order(x, rows, 2410).to(DEVICE), name="sums")
    assert not out[:9].any()


@pytest.mark.parametrize("sizes", [(0, 3, 4), (0, 0, 4), (3, 3, 0)])
def test_nothing_to_add(sizes: tuple[int, int, int]) -> None:
    num_values, num_rows, width = sizes
    out = sum_rows(
        torch.ones(num_values, width), torch.zeros(num_values, dtype=torch.int64), num_rows
    )
    assert out.shape == (num_rows, width)
    assert not out.any()
