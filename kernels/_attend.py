"""What prefill and decode of paged attention share: tiles, a model's constants, and the online softmax."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from socpo_fast.kernels._launch import ARCHITECTURES, INTERPRETER, Tile

# Elements of a tile of keys, which with the head dim say how many keys; warps for head dims up to 128, else twice that.
TILES: dict[int, dict[torch.dtype, Tile]] = {
    INTERPRETER: dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), Tile(1024, 1))
} | {
    architecture: {torch.float32: Tile(4096, 8), torch.float16: Tile(8192, 4), torch.bfloat16: Tile(8192, 4)}
    for architecture in ARCHITECTURES
}

# For `make aot`, of models: query heads, KV heads, head dim, page size. A group of 3; groups of 1 and a head dim that is
# masked; a group of 4; the widest.
MODELS = ((9, 3, 64, 32), (32, 32, 96, 16), (32, 8, 128, 16), (8, 1, 256, 256))


class Launch(NamedTuple):
    """What all launches for a model, a dtype and an architecture share."""

    constants: dict[str, int]
    num_warps: int
    group: int  # query heads of a KV head


def launch_for(
    architecture: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> Launch:
    """The launch of one model's attention; head dims between powers of two are masked."""
    tile, block_e = TILES[architecture][dtype], max(16, triton.next_power_of_2(head_dim))
    constants = {
        "GROUP": heads // kv_heads,
        "NUM_KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_N": min(max(16, tile.block // block_e), 128),
        "BLOCK_E": block_e,
    }
    return Launch(constants, tile.num_warps * (2 if block_e > 128 else 1), heads // kv_heads)


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
    """Of each row of q: largest score, sum of exp, and sum of exp times v over keys begin .. end - 1 up to its position.

    pages_ptr is the sequence's row of the table. Every row must see a key of the first tile.
    """
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        decay = tl.exp(highest - new_highest)  # of -inf in the first tile: 0
        probs = tl.exp(scores - new_highest[:, None])
        total = total * decay + tl.sum(probs, 1)
        v = tl.load(v_ptr + places, wanted, other=0.0).to(q.dtype)
        out = tl.dot(probs.to(q.dtype), v, out * decay[:, None], input_precision="ieee")
        highest = new_highest
    return highest, total, out
