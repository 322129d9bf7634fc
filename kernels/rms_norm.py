"""RMSNorm on a GPU, the residual connection's addition in the same pass, and its backward.

Read top-down: rms_norm and rms_norm_backward launch a kernel each; a program holds whole rows at
once, so a row is read from memory once. The formulas stand in ops/rms_norm.py.

The gradient of the weight is a sum over rows: each program adds up ROWS_PER_SUM of them, in order,
whatever their number, and one torch sum puts the programs together. Statistics and sums are fp32
for every dtype.
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

ROWS_PER_SUM = (
    16  # 8192 rows are 512 programs, enough to fill a card; sums add a sixteenth to what is moved
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# elements at least, in as many rows as it takes: heads are narrow; wider rows take more warps, up
# to 16
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1024, 1)),
    80: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    90: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    100: dict.fromkeys(_DTYPES, Tile(1024, 4)),
}


def rms_norm(
    x: Tensor, weight_D: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual); without a residual (norm of x, an empty tensor). Rows
    are x's last axis.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, total
    num_rows = x.numel() // x.shape[-1]
    width = x.shape[-1]
    tile, constants = _tile(TILES[architecture_of(x)][x.dtype], width)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(num_rows, constants["BLOCK_T"]),)](
            x,
            None if residual is None else residual.contiguous(),
            weight_D.contiguous(),
            None if residual is None else total,
            y,
            num_rows,
            width,
            float(eps),
            **constants,
            num_warps=tile.num_warps,
        )
    return y, total


def rms_norm_backward(
    x: Tensor, weight_D: Tensor, eps: float, grad_y: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(gradient of x, of the weight); x is what was normalised, grad_x what came to it by other
    ways, and is added.
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
    """The tile that holds whole rows, and its two sides."""
    block_d = triton.next_power_of_2(width)
    block_t = min(ROWS_PER_SUM, max(1, tile.block // block_d))
    num_warps = max(tile.num_warps, min(16, block_d // 512)) if tile.num_warps > 1 else 1
    return Tile(block_t * block_d, num_warps), {"BLOCK_T": block_t, "BLOCK_D": block_d}


def aot_configs() -> AotConfigs:
    """Heads, SmolLM2, Llama 8B and 70B (at twice its width the backward spills); with and without a
    residual.
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
                given: dict[str, torch.dtype | None] = {
                    "x_ptr": dtype,
                    "weight_ptr": weight,
                    "y_ptr": dtype,
                }
                given |= {"residual_ptr": residual, "sum_ptr": residual}
                yield AotConfig(
                    _rms_norm_kernel, architecture, dtype, label, num_warps, given, constants
                )
                given = {
                    "x_ptr": dtype,
                    "weight_ptr": weight,
                    "grad_y_ptr": dtype,
                    "grad_x_ptr": residual,
                }
                given |= {"out_ptr": dtype, "sums_ptr": torch.float32}
                yield AotConfig(
                    _rms_norm_backward_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    given,
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
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + places, inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        # rounded first: what is normalised is what the next layer and the backward read
        rounded = (x + tl.load(residual_ptr + places, inside, other=0.0).to(tl.float32)).to(
            sum_ptr.dtype.element_ty
        )
        tl.store(sum_ptr + places, rounded, inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    tl.store(
        y_ptr + places, (x * scale[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), inside
    )


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
    columns = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + columns, columns < width, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in range(0, ROWS, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
        places = rows[:, None] * width + columns[None, :]
        x = tl.load(x_ptr + places, inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + places, inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        slope = tl.sum(x * grad_y * weight[None, :], 1) * scale * scale / width
        out = (grad_y * weight[None, :] - x * slope[:, None]) * scale[:, None]
        if grad_x_ptr is not None:
            out += tl.load(grad_x_ptr + places, inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), inside)
        sums += grad_y * (x * scale[:, None])
    tl.store(
        sums_ptr + tl.program_id(0).to(tl.int64) * width + columns, tl.sum(sums, 0), columns < width
    )
