"""Computes the backward of rotary embedding and of the norms of q's and k's heads on a GPU.

Read top-down: rotary_qkv_backward launches _rotary_backward_kernel. The gradients of the norms'
weights are sums over tokens, in two levels, in a fixed order:

    tokens   0 .. 3      4 .. 7      8 .. 11    ..     TOKENS_PER_SUM tokens a program, all heads
    sums     program 0   program 1   program 2  ..     one torch sum adds these

    one program:   heads of q -> norm sums of q | heads of k -> norm sums of k | heads of v: copied

The norms are computed again from raw qkv; without norms, qkv is not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import ARCHITECTURES, AotConfig, AotConfigs, architecture_of
from socpo_fast.kernels.rotary import (
    TILES,
    contiguous,
    halves,
    inverse_rms,
    store_halves,
    tile_of,
    whole_tokens,
)

TOKENS_PER_SUM = 4


def rotary_qkv_backward(
    grad_q_THE: Tensor,
    grad_k_TKE: Tensor,
    grad_v_TKE: Tensor | None,
    qkv_TXE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of raw qkv and of the norms' weights, [2, E] or [0, E] without norms.

    The heads of v get grad_v_TKE, or 0 if it is None.
    """
    qkv_TXE = whole_tokens(qkv_TXE)
    num_tokens, num_all, head_dim = qkv_TXE.shape
    out_TXE = qkv_TXE.new_empty((num_tokens, num_all, head_dim))
    num_sums = triton.cdiv(num_tokens, TOKENS_PER_SUM)
    shape = (num_sums, 0 if q_weight_E is None else 2, head_dim)
    sums = qkv_TXE.new_empty(shape, dtype=torch.float32)
    if qkv_TXE.numel() > 0:
        tile, constants = tile_of(TILES[architecture_of(qkv_TXE)][qkv_TXE.dtype], head_dim)
        with torch.cuda.device_of(qkv_TXE):
            _rotary_backward_kernel[(num_sums,)](
                qkv_TXE,
                *map(
                    contiguous,
                    (cos_TE, sin_TE, q_weight_E, k_weight_E, grad_q_THE, grad_k_TKE, grad_v_TKE),
                ),
                out_TXE,
                None if q_weight_E is None else sums,
                num_tokens,
                grad_q_THE.shape[1],
                grad_k_TKE.shape[1],
                head_dim // 2,
                qkv_TXE.stride(0),
                eps or 0.0,
                TOKENS=TOKENS_PER_SUM,
                **constants,
                num_warps=tile.num_warps,
            )
    return out_TXE, sums.sum(0)


def aot_configs() -> AotConfigs:
    """Yields heads of 64, 96 and 128, with and without norms, with and without a gradient of v."""
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            for head_dim in (64, 96, 128):
                (_, num_warps), constants = tile_of(tile, head_dim)
                for weight, norms in ((None, "no norms"), (dtype, "norms")):
                    for grad_v, label in ((dtype, norms), (None, f"{norms}, no dV")):
                        pointers: dict[str, torch.dtype | None] = dict.fromkeys(
                            ("x_ptr", "grad_q_ptr", "grad_k_ptr", "out_ptr"), dtype
                        )
                        pointers |= dict.fromkeys(("cos_ptr", "sin_ptr"), torch.float32)
                        pointers |= {
                            "q_weight_ptr": weight,
                            "k_weight_ptr": weight,
                            "grad_v_ptr": grad_v,
                        }
                        pointers |= {"sums_ptr": None if weight is None else torch.float32}
                        yield AotConfig(
                            _rotary_backward_kernel,
                            architecture,
                            dtype,
                            f"E = {head_dim}, {label}",
                            num_warps,
                            pointers,
                            {"TOKENS": TOKENS_PER_SUM, **constants},
                        )


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_kv_heads"])
def _rotary_backward_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    out_ptr,
    sums_ptr,
    num_tokens,
    num_heads,
    num_kv_heads,
    half,
    stride_xt,
    eps: tl.float32,
    TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Computes the gradient of TOKENS tokens: heads of q, then of k, then of v."""
    # Pointers move to the program's first token in 64 bits; offsets from there fit into 32 bits.
    first_token = tl.program_id(0).to(tl.int64) * TOKENS
    count = tl.minimum(TOKENS, num_tokens - first_token).to(tl.int32)
    stride_ot = (num_heads + 2 * num_kv_heads) * (2 * half)
    x_ptr += first_token * stride_xt
    out_ptr += first_token * stride_ot
    cos_ptr += first_token * 2 * half
    sin_ptr += first_token * 2 * half
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * 4 * half
    _backward_of_heads(
        x_ptr, cos_ptr, sin_ptr, q_weight_ptr, grad_q_ptr + first_token * num_heads * 2 * half,
        out_ptr, sums_ptr,
        count, num_heads, half, stride_xt, stride_ot, eps, BLOCK_H, BLOCK_E,
    )  # fmt: skip
    x_ptr += num_heads * 2 * half
    out_ptr += num_heads * 2 * half
    if sums_ptr is not None:
        sums_ptr += 2 * half
    _backward_of_heads(
        x_ptr, cos_ptr, sin_ptr, k_weight_ptr, grad_k_ptr + first_token * num_kv_heads * 2 * half,
        out_ptr, sums_ptr,
        count, num_kv_heads, half, stride_xt, stride_ot, eps, BLOCK_H, BLOCK_E,
    )  # fmt: skip
    if grad_v_ptr is not None:
        grad_v_ptr += first_token * num_kv_heads * 2 * half
    offs_e = tl.arange(0, BLOCK_E)
    for start in range(0, count * num_kv_heads, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        mask = (rows < count * num_kv_heads)[:, None] & (offs_e < half)[None, :]
        low = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
        high = low
        if grad_v_ptr is not None:
            low, high = halves(
                grad_v_ptr + rows[:, None] * (2 * half) + offs_e[None, :], half, mask
            )
        offs = rows // num_kv_heads * stride_ot + (num_kv_heads + rows % num_kv_heads) * (2 * half)
        store_halves(out_ptr + offs[:, None] + offs_e[None, :], half, low, high, mask)


@triton.jit
def _backward_of_heads(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, grad_ptr, out_ptr, sums_ptr,
    count, num_heads, half, stride_xt, stride_ot, eps, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of num_heads heads of `count` tokens, and its sum for a norm's weight."""
    offs_e = tl.arange(0, BLOCK_E)
    sum_low = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    sum_high = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    if weight_ptr is not None:
        weight_low, weight_high = halves(weight_ptr + offs_e, half, offs_e < half)
    for start in range(0, count * num_heads, BLOCK_H):
        rows = start + tl.arange(0, BLOCK_H)
        tokens = rows // num_heads
        mask = (rows < count * num_heads)[:, None] & (offs_e < half)[None, :]
        offs_head = (rows % num_heads * (2 * half))[:, None] + offs_e[None, :]
        offs_table = (tokens * 2 * half)[:, None] + offs_e[None, :]
        cos = tl.load(cos_ptr + offs_table, mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + offs_table, mask, other=0.0).to(tl.float32)
        low, high = halves(grad_ptr + (rows * 2 * half)[:, None] + offs_e[None, :], half, mask)
        # The inverse rotation: by the same angles, the other way.
        grad_low = low * cos + high * sin
        grad_high = high * cos - low * sin
        if weight_ptr is not None:
            x_low, x_high = halves(x_ptr + (tokens * stride_xt)[:, None] + offs_head, half, mask)
            scale = inverse_rms(x_low, x_high, half, eps)
            sum_low += grad_low * (x_low * scale)
            sum_high += grad_high * (x_high * scale)
            grad_low = grad_low * weight_low[None, :]
            grad_high = grad_high * weight_high[None, :]
            # The scale of the norm depends on x too: the second term of dx, along x.
            slope = (
                tl.sum(x_low * grad_low + x_high * grad_high, 1)[:, None]
                * scale
                * scale
                / (2 * half)
            )
            grad_low = (grad_low - x_low * slope) * scale
            grad_high = (grad_high - x_high * slope) * scale
        store_halves(
            out_ptr + (tokens * stride_ot)[:, None] + offs_head, half, grad_low, grad_high, mask
        )
    if weight_ptr is not None:
        store_halves(
            sums_ptr + offs_e, half, tl.sum(sum_low, 0), tl.sum(sum_high, 0), offs_e < half
        )
