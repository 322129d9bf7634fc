"""Applies rotary embedding on a GPU, with the norms of q's and k's heads and the writes to pages.

Read top-down: rotary_qkv and rotary_write launch _rotary_kernel. The backward is in
rotary_backward.py; the formulas are in ops/rotary.py. A program has BLOCK_H heads of one token:

    heads of a token in qkv     q0 q1 q2 ..   k0 k1 ..   v0 v1 ..
      rotary_qkv                rotated       rotated    left out
      rotary_write              rotated       rotated,   copied to its pages
                                              to pages
    one head                    [ low: numbers 0 .. E/2 - 1 | high: E/2 .. E - 1 ]
                                pair i is (low[i], high[i]), rotated by angle i of the token

The tables cos and sin hold each angle twice, so only their first half is read. Everything is fp32
inside, for every dtype: a normed head is not rounded before it is rotated.
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
# block: how many pairs a program rotates at once; this gives the number of its heads
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
    """Returns q and k, rotated; if there are weights, their heads are normed first."""
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
    """Returns q as rotary_qkv does; writes k and v to slots_T of the caches.

    A token with a negative slot is not written.
    """
    num_tokens, num_all, head_dim = qkv_TXE.shape
    q_THE = qkv_TXE.new_empty((num_tokens, num_all - 2 * k_cache_PSKE.shape[2], head_dim))
    rope = cos_TE, sin_TE, q_weight_E, k_weight_E, eps
    _launch(qkv_TXE, rope, (q_THE, k_cache_PSKE, v_cache_PSKE, slots_T.contiguous()))
    return q_THE


def _launch(x_TXE: Tensor, rope: tuple, outputs: tuple) -> None:
    """Launches _rotary_kernel.

    rope: cos, sin, the weights of the norms, eps. outputs: q, k or its cache, cache of v, slots.
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
    """Returns x or a contiguous copy; None stays None."""
    return None if x is None else x.contiguous()


def whole_tokens(x_THE: Tensor) -> Tensor:
    """Returns x if each token's heads lie side by side, as in a slice of heads; else a copy."""
    return x_THE if x_THE.stride()[1:] == (x_THE.shape[2], 1) else x_THE.contiguous()


def tile_of(tile: Tile, head_dim: int) -> tuple[Tile, dict[str, int]]:
    """Returns the tile that holds whole heads, and its two sides."""
    block_e = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, tile.block // block_e)
    return Tile(block_h * block_e, tile.num_warps), {"BLOCK_H": block_h, "BLOCK_E": block_e}


def aot_configs() -> AotConfigs:
    """Yields heads of 64, 96, 128, with and without norms, to tensors or to pages of two dtypes."""
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
                    for pages, k_dtype, v_dtype, slots_dtype in outputs:
                        pointers: dict[str, torch.dtype | None] = {
                            "x_ptr": dtype,
                            "cos_ptr": torch.float32,
                            "sin_ptr": torch.float32,
                            "q_ptr": dtype,
                        }
                        pointers |= {"q_weight_ptr": weight, "k_weight_ptr": weight}
                        pointers |= {"k_ptr": k_dtype, "v_ptr": v_dtype, "slots_ptr": slots_dtype}
                        label = f"E = {head_dim}, {norms}{pages}"
                        yield AotConfig(
                            _rotary_kernel,
                            architecture,
                            dtype,
                            label,
                            num_warps,
                            pointers,
                            constants,
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
    """Norms and rotates BLOCK_H heads of one token; a head's index says if it is q, k or v."""
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_e = tl.arange(0, BLOCK_E)
    head_idx = offs_h[:, None]
    is_pair = (offs_e < half)[None, :]
    first_v = num_heads + num_kv_heads
    is_q_or_k = (head_idx < first_v) & is_pair
    x_ptrs = x_ptr + token * stride_xt + head_idx * (2 * half) + offs_e[None, :]
    low, high = halves(x_ptrs, half, is_q_or_k)
    is_q = is_q_or_k & (head_idx < num_heads)
    if q_weight_ptr is not None:
        q_low, q_high = halves(q_weight_ptr + offs_e, half, offs_e < half)
        k_low, k_high = halves(k_weight_ptr + offs_e, half, offs_e < half)
        scale = inverse_rms(low, high, half, eps)
        low = low * scale * tl.where(is_q, q_low[None, :], k_low[None, :])
        high = high * scale * tl.where(is_q, q_high[None, :], k_high[None, :])
    cos = tl.load(cos_ptr + token * 2 * half + offs_e, offs_e < half, other=0.0).to(tl.float32)[
        None, :
    ]
    sin = tl.load(sin_ptr + token * 2 * half + offs_e, offs_e < half, other=0.0).to(tl.float32)[
        None, :
    ]
    rotated_low = low * cos - high * sin
    rotated_high = high * cos + low * sin
    q_ptrs = q_ptr + (token * num_heads + head_idx) * (2 * half) + offs_e[None, :]
    store_halves(q_ptrs, half, rotated_low, rotated_high, is_q)
    # k goes to the row of its token, or to its slot in the pages. Negative slots are not written.
    slot = token
    is_k = is_q_or_k & (head_idx >= num_heads)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + token)
        is_k = is_k & (slot >= 0)
    offs = (slot * num_kv_heads + head_idx - num_heads) * (2 * half) + offs_e[None, :]
    store_halves(k_ptr + offs, half, rotated_low, rotated_high, is_k)
    if v_ptr is not None:
        is_v = (head_idx >= first_v) & (head_idx < first_v + num_kv_heads) & is_pair & (slot >= 0)
        # Loaded again, since the first load left out the heads of v. They are copied as they are.
        low, high = halves(x_ptrs, half, is_v)
        store_halves(v_ptr + offs - num_kv_heads * (2 * half), half, low, high, is_v)


@triton.jit
def inverse_rms(low, high, half, eps):
    """Returns 1 / root mean square of each row, [BLOCK_H, 1]."""
    return 1.0 / tl.sqrt(tl.sum(low * low + high * high, 1)[:, None] / (2 * half) + eps)


@triton.jit
def halves(ptrs, half, inside):
    """Loads both halves of heads as fp32; ptrs point to the first half."""
    low = tl.load(ptrs, inside, other=0.0).to(tl.float32)
    return low, tl.load(ptrs + half, inside, other=0.0).to(tl.float32)


@triton.jit
def store_halves(ptrs, half, low, high, inside):
    """Stores both halves of heads in the dtype of ptrs, which point to the first half."""
    tl.store(ptrs, low.to(ptrs.dtype.element_ty), inside)
    tl.store(ptrs + half, high.to(ptrs.dtype.element_ty), inside)
