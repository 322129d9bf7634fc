"""Takes a step of AdamW on a GPU, in place.

Read top-down: adamw launches _adamw_kernel; the formula is in ops/adamw.py. The result is bitwise
equal to adamw_ref's: the same operations in the same order, each rounded once. Hence div_rn and
sqrt_rn, which round to nearest, and a launch that forbids Triton to fuse a product with a sum.

A bf16 parameter is the high half of an fp32 master weight. Both halves are handled as integers:

    fp32 master     [ sign, exponent, 7 bits | 16 bits ]
    stored as         param, rounded           low_bits = master - param, as int16
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
# Eight elements a thread: it moves 16 bytes of each half at once, and 32 of each fp32 array.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1 << 14, 1)),
    80: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    90: dict.fromkeys(_DTYPES, Tile(1024, 4)),
    100: dict.fromkeys(_DTYPES, Tile(1024, 4)),
}
_OPTIONS = {"enable_fp_fusion": False}


def adamw(
    param: Tensor,
    low_bits: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scale: Tensor | None,
    *factors: float,
) -> None:
    """Takes a step in place; factors are the fields of ops.adamw.StepFactors, in its order."""
    if param.numel() == 0:
        return
    tile = TILES[architecture_of(param)][param.dtype]
    with torch.cuda.device_of(param):
        _adamw_kernel[(triton.cdiv(param.numel(), tile.block),)](
            param if low_bits is None else param.view(torch.int16),
            low_bits,
            exp_avg,
            exp_avg_sq,
            grad,
            scale,
            param.numel(),
            *factors,
            BLOCK_N=tile.block,
            num_warps=tile.num_warps,
            **_OPTIONS,
        )


def aot_configs() -> AotConfigs:
    """Yields launches for parameters in one piece and in halves, with and without a clip factor."""
    for architecture in ARCHITECTURES:
        for dtype, (block, num_warps) in TILES[architecture].items():
            is_split = dtype == torch.bfloat16
            wide = ("exp_avg_ptr", "exp_avg_sq_ptr", "grad_ptr")
            pointers: dict[str, torch.dtype | None] = dict.fromkeys(wide, torch.float32)
            pointers["param_ptr"] = torch.int16 if is_split else dtype
            pointers["low_bits_ptr"] = torch.int16 if is_split else None
            for label, scale in (("clip factor", torch.float32), ("no clip factor", None)):
                yield AotConfig(
                    _adamw_kernel,
                    architecture,
                    dtype,
                    label,
                    num_warps,
                    pointers | {"scale_ptr": scale},
                    {"BLOCK_N": block},
                    options=_OPTIONS,
                )


@triton.jit
def _adamw_kernel(
    param_ptr,
    low_bits_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    scale_ptr,
    num_elements,
    decay: tl.float32,
    beta1: tl.float32,
    new_in_avg: tl.float32,
    beta2: tl.float32,
    new_in_avg_sq: tl.float32,
    root_correction: tl.float32,
    eps: tl.float32,
    step_size: tl.float32,
    BLOCK_N: tl.constexpr,
):
    """Takes the step of BLOCK_N elements."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < num_elements
    if low_bits_ptr is None:
        old_param = tl.load(param_ptr + offs_n, mask, other=0.0).to(tl.float32)
    else:
        high = tl.load(param_ptr + offs_n, mask, other=0).to(tl.int32) << 16
        low = tl.load(low_bits_ptr + offs_n, mask, other=0).to(tl.int32)
        old_param = (high + low).to(tl.float32, bitcast=True)
    exp_avg = tl.load(exp_avg_ptr + offs_n, mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs_n, mask, other=0.0)
    grad = tl.load(grad_ptr + offs_n, mask, other=0.0)
    if scale_ptr is not None:
        # One scale an element: the interpreter cannot combine a scalar condition with a block's.
        scale = tl.broadcast_to(tl.load(scale_ptr), (BLOCK_N,))
        grad *= scale

    new_avg = exp_avg * beta1 + grad * new_in_avg
    new_avg_sq = exp_avg_sq * beta2 + grad * grad * new_in_avg_sq
    denominator = tl.div_rn(tl.sqrt_rn(new_avg_sq), root_correction) + eps
    new_param = old_param - (tl.div_rn(new_avg, denominator) * step_size + old_param * decay)

    # Only a finite step is taken. Compared as integers, since the bits of a NaN are larger than
    # those of infinity (0x7F800000). Numbers within 0x8000 of infinity would have an infinite high
    # half, because it is rounded.
    magnitude = new_param.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if low_bits_ptr is None:
        narrow = tl.abs(new_param.to(param_ptr.dtype.element_ty).to(tl.float32))
        is_taken = (magnitude < 0x7F800000) & (narrow < float("inf"))
    else:
        is_taken = magnitude < 0x7F800000 - 0x8000
    is_taken = is_taken & (new_avg_sq < float("inf"))
    if scale_ptr is not None:  # both are false for NaN
        is_taken = is_taken & (scale > 0.0) & (scale < float("inf"))
    # Elements whose step is not taken are written back unchanged. A mask of their own would prevent
    # stores of 16 bytes, which need a mask that is false only beyond the end of the array.
    new_param = tl.where(is_taken, new_param, old_param)
    tl.store(exp_avg_ptr + offs_n, tl.where(is_taken, new_avg, exp_avg), mask)
    tl.store(exp_avg_sq_ptr + offs_n, tl.where(is_taken, new_avg_sq, exp_avg_sq), mask)
    if low_bits_ptr is None:
        tl.store(param_ptr + offs_n, new_param.to(param_ptr.dtype.element_ty), mask)
    else:
        bits = new_param.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(param_ptr + offs_n, high.to(tl.int16), mask)
        tl.store(low_bits_ptr + offs_n, (bits - (high << 16)).to(tl.int16), mask)
