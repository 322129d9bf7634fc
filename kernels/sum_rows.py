"""Adds up rows that have the same destination, on a GPU; the LM head's dX is such a sum.

Read top-down: sum_rows launches two kernels.

    rows_N               3  5  5  3  7      destination of each row of x
    _mark_rows_kernel    destination 3: first 0, last 3      5: first 1, last 2      7: 4, 4
    _sum_rows_kernel     out[3] = x[0] + x[3]     out[5] = x[1] + x[2]     out[7] = x[4]

A program of the second kernel has one destination. It searches the rows between the first and the
last one of this destination, and adds those that match in index order.

Departures from the textbook. There are no float atomics: the first and last row are found by atomic
maxima of integers, which are the same in any order. Nothing is sorted. In a packed microbatch,
nearly every destination has one row, and the last token of a prompt has one for each rollout of its
group. The result is right for any destinations, and slow if many of them repeat far apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    Tile,
    architecture_of,
)

# Columns of a row that a program adds up.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: {torch.float32: Tile(1024, 1), torch.float64: Tile(1024, 1)},
    80: {torch.float32: Tile(1024, 4), torch.float64: Tile(512, 4)},
    90: {torch.float32: Tile(1024, 4), torch.float64: Tile(512, 4)},
    100: {torch.float32: Tile(1024, 4), torch.float64: Tile(512, 4)},
}
_BLOCK_N = 1024  # destinations that a program compares at once


def sum_rows(x_ND: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Returns out [num_rows, D]: out[r] is the sum of x[n] with rows_N[n] == r, in index order.

    It is 0 where there is none.
    """
    num_values, width = x_ND.shape
    out = x_ND.new_empty((num_rows, width))
    if num_values == 0 or out.numel() == 0:
        return out.zero_()
    block, num_warps = TILES[architecture_of(x_ND)][x_ND.dtype]
    rows_N = rows_N.contiguous()
    bounds_2T = rows_N.new_zeros((2, num_rows), dtype=torch.int32)
    with torch.cuda.device_of(x_ND):
        _mark_rows_kernel[(triton.cdiv(num_values, _BLOCK_N),)](
            rows_N, bounds_2T, num_values, num_rows, BLOCK_N=_BLOCK_N, num_warps=num_warps
        )
        _sum_rows_kernel[(num_rows, triton.cdiv(width, block))](
            x_ND,
            rows_N,
            bounds_2T,
            out,
            num_values,
            num_rows,
            width,
            BLOCK_N=_BLOCK_N,
            BLOCK_D=block,
            num_warps=num_warps,
        )
    return out


def aot_configs() -> AotConfigs:
    """Yields the launches above, for widths that vector loads fit and others."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            row_pointers = {"rows_ptr": torch.int64, "bounds_ptr": torch.int32}
            for label, odd_sizes in (("even D", False), ("odd D", True)):
                constants = {"BLOCK_N": _BLOCK_N}
                yield AotConfig(
                    _mark_rows_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    row_pointers,
                    constants,
                    odd_sizes,
                )
                pointers = row_pointers | {"x_ptr": dtype, "out_ptr": dtype}
                constants = {"BLOCK_N": _BLOCK_N, "BLOCK_D": block}
                yield AotConfig(
                    _sum_rows_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers,
                    constants,
                    odd_sizes,
                )


# The number of rows and the alignment of rows_ptr differ from microbatch to microbatch. Triton does
# not specialise on them, so one compiled kernel serves all.
@triton.jit(
    do_not_specialize=["num_values", "num_rows"], do_not_specialize_on_alignment=["rows_ptr"]
)
def _mark_rows_kernel(rows_ptr, bounds_ptr, num_values, num_rows, BLOCK_N: tl.constexpr):
    """Writes bounds [2, num_rows], which are 0 at first: num_values - first row, and last row + 1.

    With both written this way, 0 stands for no row and both are maxima.
    """
    idx = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = idx < num_values
    first_ptr = bounds_ptr + tl.load(rows_ptr + idx, mask, other=0)
    tl.atomic_max(first_ptr, num_values - idx, mask, sem="relaxed")
    tl.atomic_max(first_ptr + num_rows, idx + 1, mask, sem="relaxed")


@triton.jit(
    do_not_specialize=["num_values", "num_rows"], do_not_specialize_on_alignment=["rows_ptr"]
)
def _sum_rows_kernel(
    x_ptr,
    rows_ptr,
    bounds_ptr,
    out_ptr,
    num_values,
    num_rows,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the rows of one destination in index order, BLOCK_D columns of them."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    idx = num_values - tl.load(bounds_ptr + row)
    end = tl.load(bounds_ptr + num_rows + row)
    total = tl.zeros((BLOCK_D,), x_ptr.dtype.element_ty)
    while idx < end:
        destinations = tl.load(rows_ptr + idx + offs_n, idx + offs_n < end, other=-1)
        # Rows to skip until the next match; BLOCK_N if there is none here. An end_column of 0 then
        # masks the load of x.
        num_skipped = tl.min(tl.where(destinations == row, offs_n, BLOCK_N), 0)
        idx += num_skipped
        end_column = tl.where(num_skipped < BLOCK_N, width, 0)
        total += tl.load(x_ptr + idx.to(tl.int64) * width + offs_d, offs_d < end_column, other=0.0)
        idx += (num_skipped < BLOCK_N).to(tl.int32)
    tl.store(out_ptr + row * width + offs_d, total, offs_d < width)
