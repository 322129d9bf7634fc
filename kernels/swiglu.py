"""Computes the gated activation of an MLP on a GPU: swiglu and swiglu_backward.

    a row of gate_up, J = 2 I numbers    [ gate: 0 .. I - 1 | up: I .. 2 I - 1 ]
    a row of the output, I numbers       silu(gate) * up

A program has BLOCK_I columns of one row, of both halves. The formulas are in ops/swiglu.py.
Everything is fp32 inside, for every dtype.
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
    """Returns silu(first half) * second half, [T, J / 2]."""
    gate_up_TJ = gate_up_TJ.contiguous()
    out_TI = gate_up_TJ.new_empty((gate_up_TJ.shape[0], gate_up_TJ.shape[1] // 2))
    _launch(_swiglu_kernel, out_TI, gate_up_TJ, out_TI)
    return out_TI


def swiglu_backward(gate_up_TJ: Tensor, grad_TI: Tensor) -> Tensor:
    """Returns the gradient of gate_up, [T, J]."""
    gate_up_TJ = gate_up_TJ.contiguous()
    out_TJ = torch.empty_like(gate_up_TJ)
    _launch(_swiglu_backward_kernel, grad_TI, gate_up_TJ, grad_TI.contiguous(), out_TJ)
    return out_TJ


def _launch(kernel, like_TI: Tensor, *tensors: Tensor) -> None:
    """Launches a kernel for an output of the shape, dtype and device of like_TI."""
    num_rows, width = like_TI.shape
    if num_rows == 0 or width == 0:
        return
    tile = TILES[architecture_of(like_TI)][like_TI.dtype]
    with torch.cuda.device_of(like_TI):
        grid = (num_rows, triton.cdiv(width, tile.block))
        kernel[grid](*tensors, width, BLOCK_I=tile.block, num_warps=tile.num_warps)


def aot_configs() -> AotConfigs:
    """Yields both kernels, each for an even and an odd width."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            for kernel, names in (
                (_swiglu_kernel, ("gate_up_ptr", "out_ptr")),
                (_swiglu_backward_kernel, ("gate_up_ptr", "grad_ptr", "out_ptr")),
            ):
                for label, odd_sizes in (("even I", False), ("odd I", True)):
                    pointers: dict[str, torch.dtype | None] = dict.fromkeys(names, dtype)
                    yield AotConfig(
                        kernel,
                        architecture,
                        dtype,
                        label,
                        num_warps,
                        pointers,
                        {"BLOCK_I": block},
                        odd_sizes,
                    )


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK_I: tl.constexpr):
    """Computes silu(gate) * up for BLOCK_I columns of one row."""
    # In 64 bits: many rows times a wide MLP are more than 2^31 numbers.
    row = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs_i < width
    gate = tl.load(gate_up_ptr + row * 2 * width + offs_i, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + offs_i, mask, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * width + offs_i,
        (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty),
        mask,
    )


@triton.jit
def _swiglu_backward_kernel(gate_up_ptr, grad_ptr, out_ptr, width, BLOCK_I: tl.constexpr):
    """Computes the gradients of gate and up for BLOCK_I columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs_i < width
    gate = tl.load(gate_up_ptr + row * 2 * width + offs_i, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + offs_i, mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + offs_i, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # d silu(g) / dg = s + g s (1 - s), with s = sigmoid(g).
    grad_gate = grad * up * (sigmoid * (gate * (1.0 - sigmoid) + 1.0))
    tl.store(out_ptr + row * 2 * width + offs_i, grad_gate.to(out_ptr.dtype.element_ty), mask)
    grad_up = grad * (gate * sigmoid)
    tl.store(out_ptr + (row * 2 + 1) * width + offs_i, grad_up.to(out_ptr.dtype.element_ty), mask)
