"""Computes RMSNorm on a GPU, with the residual addition in the same pass, and its backward.

Read top-down: rms_norm and rms_norm_backward launch a kernel each. A program holds whole rows, so a
row is read from memory once. The formulas are in ops/rms_norm.py. Statistics and sums are fp32 for
every dtype.

The gradient of the weight is a sum over rows, in two levels:

    rows   0 .. 15     16 .. 31     32 .. 47    ..     ROWS_PER_SUM rows a program, BLOCK_T at once
    sums   program 0   program 1    program 2   ..     one torch sum adds these

Which rows a program adds does not depend on the number of rows.
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

# 8192 rows are 512 programs, enough to fill a card. The sums add a sixteenth to the memory traffic.
ROWS_PER_SUM = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# block: the fewest elements of a program. Narrow rows, such as heads, share a program; wider rows
# get more warps, up to 16.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1024, 1)),
    80: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    90: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    100: dict.fromkeys(_DTYPES, Tile(1024, 4)),
}


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the norm of x + residual, over the last axis, and x + residual.

    Without a residual: the norm of x, and an empty tensor.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    x_plus_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, x_plus_residual
    num_rows = x.numel() // x.shape[-1]
    width = x.shape[-1]
    tile, constants = _tile(TILES[architecture_of(x)][x.dtype], width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(num_rows, constants["BLOCK_T"]),)](
            x,
            None if residual is None else residual.contiguous(),
            weight_D.contiguous(),
            None if residual is None else x_plus_residual,
            y,
            num_rows,
            width,
            float(eps),
            **constants,
            num_warps=tile.num_warps,
        )
    return y, x_plus_residual


def rms_norm_backward(
    x: Tensor, weight_D: Tensor, eps: float, grad_y: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight, where x is what was normalised.

    grad_x, if there is one, is the gradient that x gets by the residual stream; it is added.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, torch.zeros_like(weight_D, dtype=torch.float32)
    num_rows = x.numel() // x.shape[-1]
    width = x.shape[-1]
    tile, constants = _tile(TILES[architecture_of(x)][x.dtype], width)
    num_sums = triton.cdiv(num_rows, ROWS_PER_SUM)
    sums = x.new_empty((num_sums, width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _rms_norm_backward_kernel[(num_sums,)](
            x,
            weight_D.contiguous(),
            grad_y.contiguous(),
            None if grad_x is None else grad_x.contiguous(),
            out,
            sums,
            num_rows,
            width,
            float(eps),
            ROWS=ROWS_PER_SUM,
            **constants,
            num_warps=tile.num_warps,
        )
    return out, sums.sum(0)


def _tile(tile: Tile, width: int) -> tuple[Tile, dict[str, int]]:
    """Returns the tile that holds whole rows, and its two sides."""
    block_d = triton.next_power_of_2(width)
    block_t = min(ROWS_PER_SUM, max(1, tile.block // block_d))
    num_warps = max(tile.num_warps, min(16, block_d // 512)) if tile.num_warps > 1 else 1
    return Tile(block_t * block_d, num_warps), {"BLOCK_T": block_t, "BLOCK_D": block_d}


def aot_configs() -> AotConfigs:
    """Yields both kernels for heads, SmolLM2, Llama 8B and 70B, with and without a residual.

    At twice the width of Llama 70B, the backward would spill.
    """
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            for label, width, weight, residual in (
                ("heads, D = 128", 128, dtype, None),
                ("D = 576", 576, dtype, dtype),
                ("D = 4096", 4096, dtype, dtype),
                ("D = 4096, bf16 weight", 4096, torch.bfloat16, dtype),
                ("D = 8192", 8192, dtype, dtype),
            ):
                (_, num_warps), constants = _tile(tile, width)
                pointers: dict[str, torch.dtype | None] = {
                    "x_ptr": dtype,
                    "weight_ptr": weight,
                    "y_ptr": dtype,
                }
                pointers |= {"residual_ptr": residual, "sum_ptr": residual}
                yield AotConfig(
                    _rms_norm_kernel, architecture, dtype, label, num_warps, pointers, constants
                )
                pointers = {
                    "x_ptr": dtype,
                    "weight_ptr": weight,
                    "grad_y_ptr": dtype,
                    "grad_x_ptr": residual,
                }
                pointers |= {"out_ptr": dtype, "sums_ptr": torch.float32}
                yield AotConfig(
                    _rms_norm_backward_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers,
                    {"ROWS": ROWS_PER_SUM, **constants},
                )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    num_rows,
    width,
    eps: tl.float32,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the norm of BLOCK_T rows, after adding the residual if there is one."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (offs_d < width)[None, :]
    offs = rows[:, None] * width + offs_d[None, :]
    x = tl.load(x_ptr + offs, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        # Rounded before the norm: the next layer and the backward read the rounded sum, so the norm
        # must be that of the same numbers.
        rounded = (x + tl.load(residual_ptr + offs, mask, other=0.0).to(tl.float32)).to(
            sum_ptr.dtype.element_ty
        )
        tl.store(sum_ptr + offs, rounded, mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + offs_d, offs_d < width, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(y_ptr + offs, (x * scale[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    x_ptr,
    weight_ptr,
    grad_y_ptr,
    grad_x_ptr,
    out_ptr,
    sums_ptr,
    num_rows,
    width,
    eps: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes the gradient of x, and the sum of ROWS rows for that of the weight."""
    offs_d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + offs_d, offs_d < width, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(0, ROWS, BLOCK_T):
        rows = first_row + start + tl.arange(0, BLOCK_T)
        mask = (rows < num_rows)[:, None] & (offs_d < width)[None, :]
        offs = rows[:, None] * width + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offs, mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        # y = x scale weight, where scale depends on x too: the second term of dx, along x.
        slope = tl.sum(x * grad_y * weight[None, :], 1) * scale * scale / width
        out = (grad_y * weight[None, :] - x * slope[:, None]) * scale[:, None]
        if grad_x_ptr is not None:
            out += tl.load(grad_x_ptr + offs, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask)
        sums += grad_y * (x * scale[:, None])
    tl.store(
        sums_ptr + tl.program_id(0).to(tl.int64) * width + offs_d, tl.sum(sums, 0), offs_d < width
    )
