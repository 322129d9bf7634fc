"""Rotary embedding on a GPU: rotary, and rotary_write, which also writes keys and values to their pages.

A program takes a few heads of one token, all of them turned by the same angles. The first half of a table is read, the
second repeats it. fp32 inside for every dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import ARCHITECTURES, INTERPRETER, AotConfig, AotConfigs, Tile, architecture_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# block: pairs a program turns, in as many heads as that makes
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys(_DTYPES, Tile(1024, 1)),
    80: dict.fromkeys(_DTYPES, Tile(512, 4)),
    90: dict.fromkeys(_DTYPES, Tile(512, 4)),
    100: dict.fromkeys(_DTYPES, Tile(512, 4)),
}


def rotary(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, inverse: bool) -> Tensor:
    """Every head turned by its token's angle, or back by it."""
    x_THE = _whole_tokens(x_THE)
    num_tokens, num_heads, head_dim = x_THE.shape
    out_THE = x_THE.new_empty(x_THE.shape)
    if out_THE.numel() == 0:
        return out_THE
    tile, constants = _tile(TILES[architecture_of(x_THE)][x_THE.dtype], head_dim)
    with torch.cuda.device_of(x_THE):
        _rotary_kernel[(num_tokens, triton.cdiv(num_heads, constants["BLOCK_H"]))](
            x_THE,
            cos_TE.contiguous(),
            sin_TE.contiguous(),
            out_THE,
            num_heads,
            head_dim // 2,
            x_THE.stride(0),
            SIGN=-1 if inverse else 1,
            **constants,
            num_warps=tile.num_warps,
        )
    return out_THE


def rotary_write(
    qkv_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, k_cache_PSKE: Tensor, v_cache_PSKE: Tensor, slots_T: Tensor
) -> Tensor:
    """Queries, turned; turned keys and values go to slots_T of the caches, a negative slot nowhere."""
    qkv_THE = _whole_tokens(qkv_THE)
    num_tokens, num_all, head_dim = qkv_THE.shape
    num_kv_heads = k_cache_PSKE.shape[2]
    q_THE = qkv_THE.new_empty((num_tokens, num_all - 2 * num_kv_heads, head_dim))
    if qkv_THE.numel() == 0:
        return q_THE
    tile, constants = _tile(TILES[architecture_of(qkv_THE)][qkv_THE.dtype], head_dim)
    with torch.cuda.device_of(qkv_THE):
        _rotary_write_kernel[(num_tokens, triton.cdiv(num_all, constants["BLOCK_H"]))](
            qkv_THE,
            cos_TE.contiguous(),
            sin_TE.contiguous(),
            q_THE,
            k_cache_PSKE,
            v_cache_PSKE,
            slots_T.contiguous(),
            num_all - 2 * num_kv_heads,
            num_kv_heads,
            head_dim // 2,
            qkv_THE.stride(0),
            **constants,
            num_warps=tile.num_warps,
        )
    return q_THE


def _whole_tokens(x_THE: Tensor) -> Tensor:
    """x itself where each token's heads lie side by side, as those of a slice of the heads do; else a copy."""
    return x_THE if x_THE.stride()[1:] == (x_THE.shape[2], 1) else x_THE.contiguous()


def _tile(tile: Tile, head_dim: int) -> tuple[Tile, dict[str, int]]:
    block_e = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, tile.block // block_e)
    return Tile(block_h * block_e, tile.num_warps), {"BLOCK_H": block_h, "BLOCK_E": block_e}


def aot_configs() -> AotConfigs:
    """Heads of 64, 96 and 128, forward and back; pages of the dtype and of bf16."""
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            tables = {"cos_ptr": torch.float32, "sin_ptr": torch.float32}
            for head_dim in (64, 96, 128):
                (_, num_warps), constants = _tile(tile, head_dim)
                for label, sign in (("forward", 1), ("back", -1)):
                    given: dict[str, torch.dtype | None] = {"x_ptr": dtype, "out_ptr": dtype, **tables}
                    yield AotConfig(
                        _rotary_kernel,
                        architecture,
                        dtype,
                        f"E = {head_dim}, {label}",
                        num_warps,
                        given,
                        {"SIGN": sign, **constants},
                    )
                for cache in dict.fromkeys((dtype, torch.bfloat16)):
                    given = {"qkv_ptr": dtype, "q_ptr": dtype, **tables, "slots_ptr": torch.int64}
                    given |= {"k_cache_ptr": cache, "v_cache_ptr": cache}
                    label = f"E = {head_dim}, {str(cache).removeprefix('torch.')} pages"
                    yield AotConfig(_rotary_write_kernel, architecture, dtype, label, num_warps, given, constants)


@triton.jit(do_not_specialize=["num_heads"])
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_heads,
    half,
    stride_xt,
    SIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads, pairs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)
    inside = (heads < num_heads)[:, None] & (pairs < half)[None, :]
    places = heads[:, None] * (2 * half) + pairs[None, :]
    low, high = _turned(x_ptr + token * stride_xt + places, inside, cos_ptr, sin_ptr, token, pairs, half, SIGN)
    out_ptr += token * num_heads * 2 * half
    tl.store(out_ptr + places, low.to(out_ptr.dtype.element_ty), inside)
    tl.store(out_ptr + places + half, high.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def _rotary_write_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    num_heads,
    num_kv_heads,
    half,
    stride_xt,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads, pairs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_E)
    head = heads[:, None]
    first_k, first_v, end = num_heads, num_heads + num_kv_heads, num_heads + 2 * num_kv_heads
    inside = (head < end) & (pairs < half)[None, :]
    x_ptrs = qkv_ptr + token * stride_xt + head * (2 * half) + pairs[None, :]
    low, high = _turned(x_ptrs, inside, cos_ptr, sin_ptr, token, pairs, half, 1)

    is_q = inside & (head < first_k)
    q_ptrs = q_ptr + (token * num_heads + head) * (2 * half) + pairs[None, :]
    tl.store(q_ptrs, low.to(q_ptr.dtype.element_ty), is_q)
    tl.store(q_ptrs + half, high.to(q_ptr.dtype.element_ty), is_q)

    slot = tl.load(slots_ptr + token)
    inside = inside & (slot >= 0)
    is_k = inside & (head >= first_k) & (head < first_v)
    k_ptrs = k_cache_ptr + (slot * num_kv_heads + head - first_k) * (2 * half) + pairs[None, :]
    tl.store(k_ptrs, low.to(k_cache_ptr.dtype.element_ty), is_k)
    tl.store(k_ptrs + half, high.to(k_cache_ptr.dtype.element_ty), is_k)

    is_v = inside & (head >= first_v)
    v_ptrs = v_cache_ptr + (slot * num_kv_heads + head - first_v) * (2 * half) + pairs[None, :]
    tl.store(v_ptrs, tl.load(x_ptrs, is_v, other=0.0).to(v_cache_ptr.dtype.element_ty), is_v)
    tl.store(v_ptrs + half, tl.load(x_ptrs + half, is_v, other=0.0).to(v_cache_ptr.dtype.element_ty), is_v)


@triton.jit
def _turned(x_ptrs, inside, cos_ptr, sin_ptr, token, pairs, half, SIGN: tl.constexpr):
    """Both halves of the heads at x_ptrs, turned by the token's angles, fp32."""
    low = tl.load(x_ptrs, inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptrs + half, inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * 2 * half + pairs, pairs < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * 2 * half + pairs, pairs < half, other=0.0).to(tl.float32)[None, :] * SIGN
    return low * cos - high * sin, high * cos + low * sin
