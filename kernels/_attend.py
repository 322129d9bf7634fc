"""What prefill and decode of paged attention share: tiles, a model's constants, and the online
softmax.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from socpo_fast.kernels._launch import INTERPRETER


class AttentionTile(NamedTuple):
    """What a program holds at once."""

    rows: int  # of queries, at head dims up to 128; half of it beyond
    key_elements: int  # with the head dim they say how many keys
    num_warps: int


# A thread spills 8 bytes at most, mixed dtypes included (`make aot`). fp32 is multiplied outside of
# the tensor cores, in registers.
_FP32 = {torch.float32: AttentionTile(32, 3072, 8)}
_HALVES = (torch.float16, torch.bfloat16)
TILES: dict[int, dict[torch.dtype, AttentionTile]] = {
    INTERPRETER: dict.fromkeys((*_FP32, *_HALVES), AttentionTile(32, 1024, 1)),
    80: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 4096, 4)),
    90: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 8192, 4)),
    100: _FP32 | dict.fromkeys(_HALVES, AttentionTile(64, 8192, 4)),
}

# For `make aot`, of models: query heads, KV heads, head dim, page size. A group of 3; groups of 1,
# and a head dim that is masked; a group of 4; the widest.
MODELS = ((9, 3, 64, 32), (32, 32, 96, 16), (32, 8, 128, 16), (8, 1, 256, 256))


class Launch(NamedTuple):
    """What all launches for a model, a dtype and an architecture share."""

    constants: dict[str, int]
    rows: int  # of a tile, at most, unless one token's heads are more
    num_warps: int


def launch_for(
    architecture: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> Launch:
    """The launch of one model's attention; head dims between powers of two are masked."""
    tile = TILES[architecture][dtype]
    keys = 1 << (tile.key_elements // head_dim).bit_length() - 1  # a power of two
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
    """Of each row of q: largest score, sum of exp, sum of exp times v, over keys begin .. end - 1
    up to its position.

    pages_ptr is the sequence's row of the table. Every row must see a key of the first tile.
    """
    # Only fp32 minds. A key or value in 16 bits is exact in tf32, and an operand that was converted
    # would not fit the registers outside of the tensor cores.
    PRECISION: tl.constexpr = "tf32x3" if k_ptr.dtype.element_ty != q.dtype else "ieee"
    columns = tl.arange(0, BLOCK_E)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < end
        pages = tl.load(pages_ptr + keys // PAGE_SIZE, inside, other=0).to(tl.int64)
        slots = (pages * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head
        places = slots[:, None] * HEAD_DIM + columns[None, :]
        wanted = inside[:, None] & (columns < HEAD_DIM)[None, :]  # what is not wanted may hold NaN
        k = tl.load(k_ptr + places, wanted, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        decay = tl.exp(highest - new_highest)  # of -inf in the first tile: 0
        probs = tl.exp(scores - new_highest[:, None])
        total = total * decay + tl.sum(probs, 1)
        v = tl.load(v_ptr + places, wanted, other=0.0).to(q.dtype)
        out = tl.dot(probs.to(q.dtype), v, out * decay[:, None], input_precision=PRECISION)
        highest = new_highest
    return highest, total, out
