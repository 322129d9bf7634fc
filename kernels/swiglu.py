"""The gated activation of an MLP on a GPU, forward and backward: swiglu, swiglu_backward.

A program takes a tile of one row of both halves; the formulas stand in ops/swiglu.py. fp32 inside
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

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1024, 1)),
    80: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    90: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    100: dict.fromkeys(_DTYPES, Tile(1024, 4)),
}


def swiglu(gate_up_TJ: Tensor) -> Tensor:
    """silu(first half) * second half, [T, J / 2]."""
    gate_up_TJ = gate_up_TJ.contiguous()
    out_TI = gate_up_TJ.new_empty((gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2))
    _launch(_swiglu_kernel, out_TI, gate_up_TJ, out_TI)
    return out_TI


def swiglu_backward(gate_up_TJ: Tensor, grad_TI: Tensor) -> Tensor:
    """The gradient of gate_up, [T, J]."""
    gate_up_TJ = gate_up_TJ.contiguous()
    out_TJ = torch.empty_like(gate_up_TJ)
    _launch(_swiglu_backward_kernel, grad_TI, gate_up_TJ, grad_TI.contiguous(), out_TJ)
    return out_TJ


def _launch(kernel, like_TI: Tensor, *tensors: Tensor) -> None:
    num_rows, width = like_TI.shape
    if num_rows == 0 or width == 0:
        return
    tile = TILES[architecture_of(like_TI)][like_TI.dtype]
    with torch.cuda.device_of(like_TI):
        grid = (num_rows, triton.cdiv(width, tile.block))
        kernel[grid](*tensors, width, BLOCK_I=tile.block, num_warps=tile.num_warps)


def aot_configs() -> AotConfigs:
    """Both kernels, an even and an odd width."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            for kernel, names in (
                (_swiglu_kernel, ("gate_up_ptr", "out_ptr")),
                (_swiglu_backward_kernel, ("gate_up_ptr", "grad_ptr", "out_ptr")),
            ):
                for label, odd in (("even I", False), ("odd I", True)):
                    given: dict[str, torch.dtype | None] = dict.fromkeys(names, dtype)
                    yield AotConfig(
                        kernel,
                        architecture,
                        dtype,
                        label,
                        num_warps,
                        given,
                        {"BLOCK_I": block},
                        odd,
                    )


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + columns, inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * width + columns,
        (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty),
        inside,
    )


@triton.jit
def _swiglu_backward_kernel(gate_up_ptr, grad_ptr, out_ptr, width, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + columns, inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + columns, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * (sigmoid * (gate * (1.0 - sigmoid) + 1.0))
    tl.store(out_ptr + row * 2 * width + columns, grad_gate.to(out_ptr.dtype.element_ty), inside)
    grad_up = grad * (gate * sigmoid)
    tl.store(
        out_ptr + (row * 2 + 1) * width + columns, grad_up.to(out_ptr.dtype.element_ty), inside
    )
