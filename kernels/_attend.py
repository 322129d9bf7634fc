"""Holds what prefill and decode of paged attention share: tiles, constants, the online softmax.

Read top-down: TILES gives the tile of each architecture and dtype, launch_for derives the constants
of one model from it, and attend is the loop over keys that both kernels run.

                     keys begin .. end - 1, BLOCK_N at a time ->
    BLOCK_M rows     +--------+--------+--------+---
    (query tokens    | tile 0 | tile 1 | tile 2 | ..      each tile updates, row by row, m_i
    x heads of one   |        |        |        |         (maximum), l_i (sum of exp), acc (output)
    KV head)         +--------+--------+--------+---
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from socpo_fast.kernels._launch import INTERPRETER


class AttentionTile(NamedTuple):
    """The sizes of what a program holds at once."""

    rows: int  # query rows at head dims up to 128, half as many beyond
    key_elements: int  # keys times head dim: wider heads have fewer keys in a tile
    num_warps: int


# The largest tiles with which a thread spills 8 bytes at most, mixed dtypes included (`make aot`).
# fp32 has smaller ones: its products are computed outside of the tensor cores, with both operands
# in registers.
_FP32 = {torch.float32: AttentionTile(32, 3072, 8)}
_HALVES = (torch.float16, torch.bfloat16)
TILES: dict[int, dict[torch.dtype, AttentionTile]] = {
    INTERPRETER: dict.fromkeys((*_FP32, *_HALVES), AttentionTile(32, 1024, 1)),
    80: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 4096, 4)),
    90: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 8192, 4)),
    100: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 8192, 4)),
}

# The models that `make aot` compiles for: query heads, KV heads, head dim, page size. In order: 3
# query heads on a KV head; 1, with a head dim that needs a mask; 4; the widest head.
MODELS = ((9, 3, 64, 32), (32, 32, 96, 16), (32, 8, 128, 16), (8, 1, 256, 256))


class Launch(NamedTuple):
    """What all launches for one model, dtype and architecture share."""

    constants: dict[str, int]
    rows: int  # of a tile at most, unless the heads of one token are more
    num_warps: int


def launch_for(
    architecture: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> Launch:
    """Returns the launch of one model's attention; a head dim is padded to a power of two."""
    tile = TILES[architecture][dtype]
    # Rounded down to a power of two, as tl.arange needs. 16 is the least that tl.dot takes.
    keys = 1 << (tile.key_elements // head_dim).bit_length() - 1
    constants = {
        "GROUP": heads // kv_heads,
        "NUM_KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_N": min(max(16, keys), 64),
        "BLOCK_E": max(16, triton.next_power_of_2(head_dim)),
    }
    return Launch(constants, tile.rows if head_dim <= 128 else tile.rows // 2, tile.num_warps)


@triton.jit
def attend(
    q,
    k_ptr,
    v_ptr,
    pages_ptr,
    begin,
    end,
    positions,
    kv_head,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Returns each row's largest score, sum of exp(score - largest), and that sum weighted by v.

    A row of q sees the keys begin .. end - 1 up to its own position. pages_ptr is the sequence's
    row of the block table. Every row must see a key of the first tile: its maximum would otherwise
    stay -inf, and -inf - -inf is NaN.
    """
    # This matters for fp32 queries only. Where the cache is in 16 bits, three products of tf32 lose
    # nothing of a key or value, since tf32 holds it exactly. "ieee" would multiply outside of the
    # tensor cores, where a converted operand does not fit into the registers.
    PRECISION: tl.constexpr = "tf32x3" if k_ptr.dtype.element_ty != q.dtype else "ieee"
    offs_e = tl.arange(0, BLOCK_E)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = keys < end
        # In 64 bits: a large cache holds more than 2^31 numbers.
        pages = tl.load(pages_ptr + keys // PAGE_SIZE, is_key, other=0).to(tl.int64)
        slots = (pages * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head
        offs = slots[:, None] * HEAD_DIM + offs_e[None, :]
        # Slots that hold no token may hold NaN, and a probability of 0 times NaN is NaN.
        mask = is_key[:, None] & (offs_e < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offs, mask, other=0.0).to(q.dtype)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        qk = tl.where(keys[None, :] <= positions[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        alpha = tl.exp(m_i - m_new)  # 0 in the first tile, where m_i is -inf
        p = tl.exp(qk - m_new[:, None])
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + offs, mask, other=0.0).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return m_i, l_i, acc
