"""Rotary embedding on a GPU, with the norms of q's and k's heads and the writes to pages in the
same pass.

Read top-down: rotary_qkv and rotary_write launch _rotary_kernel, whose programs take a few heads of
one token each, all of them rotated by the same angles. The backward is in rotary_backward.py; the
formulas stand in ops/rotary.py. The first half of a table is read, the second repeats it. fp32
inside for every dtype: what is normed is not rounded before it is rotated.
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
# block: pairs that a program rotates at once, in as many heads as that makes
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1024, 1)),
    80: dict.fromkeys(_DTYPES, Tile(512, 4)),
    90: dict.fromkeys(_DTYPES, Tile(512, 4)),
    100: dict.fromkeys(_DTYPES, Tile(512, 4)),
}


def rotary_qkv(
    qkv_TXE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    eps: float | None,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """q and k, normed where there are weights, and rotated."""
    num_tokens, num_all, head_dim = qkv_TXE.shape
    q_THE = qkv_TXE.new_empty((num_tokens, num_all - 2 * num_kv_heads, head_dim))
    k_TKE = qkv_TXE.new_empty((num_tokens, num_kv_heads, head_dim))
    _launch(qkv_TXE, (cos_TE, sin_TE, q_weight_E, k_weight_E, eps), (q_THE, k_TKE, None, None))
    return q_THE, k_TKE


def rotary_write(
    qkv_TXE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    eps: float | None,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """q as of rotary_qkv; k and v go to slots_T of the caches, a negative slot nowhere."""
    num_tokens, num_all, head_dim = qkv_TXE.shape
    q_THE = qkv_TXE.new_empty((num_tokens, num_all - 2 * k_cache_PSKE.shape[2], head_dim))
    rope = cos_TE, sin_TE, q_weight_E, k_weight_E, eps
    _launch(qkv_TXE, rope, (q_THE, k_cache_PSKE, v_cache_PSKE, slots_T.contiguous()))
    return q_THE


def _launch(x_TXE: Tensor, rope: tuple, outputs: tuple) -> None:
    """rope: cos, sin, the norms' weights and eps; outputs: q, k or its cache, the cache of v,
    slots.
    """
    if x_TXE.numel() == 0:
        return
    x_TXE = whole_tokens(x_TXE)
    *tensors, eps = rope
    q_THE, k, v, _ = outputs
    num_heads = q_THE.shape[1]
    num_kv_heads = k.shape[-2]
    num_outputs = num_heads + num_kv_heads * (1 if v is None else 2)
    tile, constants = tile_of(TILES[architecture_of(x_TXE)][x_TXE.dtype], x_TXE.shape[2])
    with torch.cuda.device_of(x_TXE):
        _rotary_kernel[(x_TXE.shape[0], triton.cdiv(num_outputs, constants["BLOCK_H"]))](
            x_TXE,
            *map(contiguous, tensors),
            *outputs,
            num_heads,
            num_kv_heads,
            x_TXE.shape[2] // 2,
            x_TXE.stride(0),
            eps or 0.0,
            **constants,
            num_warps=tile.num_warps,
        )


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def whole_tokens(x_THE: Tensor) -> Tensor:
    """x itself where each token's heads lie side by side, as those of a slice of the heads do; else
    a copy.
    """
    return x_THE if x_THE.stride()[1:] == (x_THE.shape[2], 1) else x_THE.contiguous()


def tile_of(tile: Tile, head_dim: int) -> tuple[Tile, dict[str, int]]:
    block_e = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, tile.block // block_e)
    return Tile(block_h * block_e, tile.num_warps), {"BLOCK_H": block_h, "BLOCK_E": block_e}


def aot_configs() -> AotConfigs:
    """Heads of 64, 96 and 128, with and without norms; alone, and into pages of the dtype and of
    bf16.
    """
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            outputs: list[tuple[str, torch.dtype, torch.dtype | None, torch.dtype | None]] = [
                ("", dtype, None, None)
            ]
            outputs += [
                (f", {str(cache).removeprefix('torch.')} pages", cache, cache, torch.int64)
                for cache in dict.fromkeys((dtype, torch.bfloat16))
            ]
            for head_dim in (64, 96, 128):
                (_, num_warps), constants = tile_of(tile, head_dim)
                for weight, norms in ((None, "no norms"), (dtype, "norms")):
                    for pages, k, v, slots in outputs:
                        given: dict[str, torch.dtype | None] = {
                            "x_ptr": dtype,
                            "cos_ptr": torch.float32,
                            "sin_ptr": torch.float32,
                            "q_ptr": dtype,
                        }
                        given |= {"q_weight_ptr": weight, "k_weight_ptr": weight}
                        given |= {"k_ptr": k, "v_ptr": v, "slots_ptr": slots}
                        label = f"E = {head_dim}, {norms}{pages}"
                        yield AotConfig(
                            _rotary_kernel, architecture, dtype, label, num_warps, given, constants
                        )


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    num_heads,
    num_kv_heads,
    half,
    stride_xt,
    eps: tl.float32,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pairs = tl.arange(0, BLOCK_E)
    head = heads[:, None]
    is_pair = (pairs < half)[None, :]
    first_v = num_heads + num_kv_heads
    inside = (head < first_v) & is_pair
    x_ptrs = x_ptr + token * stride_xt + head * (2 * half) + pairs[None, :]
    low, high = halves(x_ptrs, half, inside)
    is_q = inside & (head < num_heads)
    if q_weight_ptr is not None:
        q_low, q_high = halves(q_weight_ptr + pairs, half, pairs < half)
        k_low, k_high = halves(k_weight_ptr + pairs, half, pairs < half)
        scale = inverse_rms(low, high, half, eps)
        low = low * scale * tl.where(is_q, q_low[None, :], k_low[None, :])
        high = high * scale * tl.where(is_q, q_high[None, :], k_high[None, :])
    cos = tl.load(cos_ptr + token * 2 * half + pairs, pairs < half, other=0.0).to(tl.float32)[
        None, :
    ]
    sin = tl.load(sin_ptr + token * 2 * half + pairs, pairs < half, other=0.0).to(tl.float32)[
        None, :
    ]
    rotated_low = low * cos - high * sin
    rotated_high = high * cos + low * sin
    q_ptrs = q_ptr + (token * num_heads + head) * (2 * half) + pairs[None, :]
    store_halves(q_ptrs, half, rotated_low, rotated_high, is_q)
    row = token
    is_k = inside & (head >= num_heads)
    if slots_ptr is not None:
        row = tl.load(slots_ptr + token)
        is_k = is_k & (row >= 0)
    place = (row * num_kv_heads + head - num_heads) * (2 * half) + pairs[None, :]
    store_halves(k_ptr + place, half, rotated_low, rotated_high, is_k)
    if v_ptr is not None:
        is_v = (head >= first_v) & (head < first_v + num_kv_heads) & is_pair & (row >= 0)
        low, high = halves(x_ptrs, half, is_v)
        store_halves(v_ptr + place - num_kv_heads * (2 * half), half, low, high, is_v)


@triton.jit
def inverse_rms(low, high, half, eps):
    """1 / root mean square of each row, [BLOCK_H, 1]."""
    return 1.0 / tl.sqrt(tl.sum(low * low + high * high, 1)[:, None] / (2 * half) + eps)


@triton.jit
def halves(ptrs, half, inside):
    """Both halves of heads whose first ones are at ptrs, fp32."""
    low = tl.load(ptrs, inside, other=0.0).to(tl.float32)
    return low, tl.load(ptrs + half, inside, other=0.0).to(tl.float32)


@triton.jit
def store_halves(ptrs, half, low, high, inside):
    tl.store(ptrs, low.to(ptrs.dtype.element_ty), inside)
    tl.store(ptrs + half, high.to(ptrs.dtype.element_ty), inside)
