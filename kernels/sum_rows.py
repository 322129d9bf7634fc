"""Adds rows up by where they belong, on a GPU: what the LM head's dX is made of.

Read top-down: sum_rows launches _mark_rows_kernel, which finds the first and the last row of each
destination, and _sum_rows_kernel, where one program a destination adds its rows in index order.

Departures from the textbook. No float atomics: a maximum of integers is the same in any order. No
sort: rows of a destination are looked for between its first and its last one, which in a packed
microbatch is one row nearly always, and the group's rows once a prompt. That is right for any rows,
and slow where many destinations repeat far apart.
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
_BLOCK_N = 1024  # rows that are looked at together


def sum_rows(x_ND: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """out [num_rows, D]: out[r] is the sum of x[n] where rows_N[n] is r, in index order; 0 where
    there is none.
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
    """The launches above for `make aot`, for widths that vectors fit and others."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            rows = {"rows_ptr": torch.int64, "bounds_ptr": torch.int32}
            for label, odd in (("even D", False), ("odd D", True)):
                blocks = {"BLOCK_N": _BLOCK_N}
                yield AotConfig(
                    _mark_rows_kernel, architecture, dtype, label, num_warps, rows, blocks, odd
                )
                pointers = rows | {"x_ptr": dtype, "out_ptr": dtype}
                blocks = {"BLOCK_N": _BLOCK_N, "BLOCK_D": block}
                yield AotConfig(
                    _sum_rows_kernel, architecture, dtype, label, num_warps, pointers, blocks, odd
                )


# How many rows there are differs from microbatch to microbatch, and so does where they begin: one
# kernel for all.
@triton.jit(
    do_not_specialize=["num_values", "num_rows"], do_not_specialize_on_alignment=["rows_ptr"]
)
def _mark_rows_kernel(rows_ptr, bounds_ptr, num_values, num_rows, BLOCK_N: tl.constexpr):
    """bounds [2, num_rows], zeros before: num_values - first, and last + 1."""
    idx = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = idx < num_values
    first_ptr = bounds_ptr + tl.load(rows_ptr + idx, inside, other=0)
    tl.atomic_max(first_ptr, num_values - idx, inside, sem="relaxed")
    tl.atomic_max(first_ptr + num_rows, idx + 1, inside, sem="relaxed")


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
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    idx = num_values - tl.load(bounds_ptr + row)
    end = tl.load(bounds_ptr + num_rows + row)
    total = tl.zeros((BLOCK_D,), x_ptr.dtype.element_ty)
    while idx < end:
        others = tl.load(rows_ptr + idx + lanes, idx + lanes < end, other=-1)
        steps = tl.min(
            tl.where(others == row, lanes, BLOCK_N), 0
        )  # to the next one; BLOCK_N: not among these
        idx += steps
        end_column = tl.where(steps < BLOCK_N, width, 0)
        total += tl.load(
            x_ptr + idx.to(tl.int64) * width + columns, columns < end_column, other=0.0
        )
        idx += (steps < BLOCK_N).to(tl.int32)
    tl.store(out_ptr + row * width + columns, total, columns < width)
