"""What forward and backward of tree attention share: tiles, a model's constants, and rows of heads."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import INTERPRETER, architecture_of
from socpo_fast.kernels._tree_plan import HEAD_DIMS, ROWS_PER_BLOCK

BLOCK_ROWS = tl.constexpr(ROWS_PER_BLOCK)
LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2, which the hardware has


class TreeTile(NamedTuple):
    """What a program of one pass holds at once. Queries and keys divide ROWS_PER_BLOCK."""

    queries: int
    keys: int
    num_warps: int  # a head
    num_stages: int


class TreeTiles(NamedTuple):
    """Of one architecture, dtype and head dim."""

    forward: TreeTile
    grad_q: TreeTile
    grad_kv: TreeTile


_HALVES = (torch.bfloat16, torch.float16)
_INTERPRETED = TreeTiles(*[TreeTile(64, 64, 1, 1)] * 3)
_FP32 = dict.fromkeys(HEAD_DIMS, TreeTiles(*[TreeTile(32, 32, 4, 1)] * 3))
_AMPERE = dict.fromkeys(HEAD_DIMS, TreeTiles(*[TreeTile(64, 64, 4, 2)] * 3))
_HOPPER = dict.fromkeys(HEAD_DIMS, TreeTiles(*[TreeTile(64, 64, 4, 3)] * 3))
TILES: dict[int, dict[torch.dtype, dict[int, TreeTiles]]] = {
    INTERPRETER: dict.fromkeys((torch.float32, *_HALVES), dict.fromkeys(HEAD_DIMS, _INTERPRETED)),
    80: {torch.float32: _FP32} | dict.fromkeys(_HALVES, _AMPERE),
    90: {torch.float32: _FP32} | dict.fromkeys(_HALVES, _HOPPER),
    100: {torch.float32: _FP32} | dict.fromkeys(_HALVES, _HOPPER),
}

# For `make aot`, of models: query heads, KV heads, head dim. Heads in pairs, and one by one.
MODELS = ((16, 8, 128), (8, 8, 128), (14, 2, 64), (8, 2, 64), (3, 1, 32), (4, 2, 32))


def tiles_of(x_THE: Tensor) -> TreeTiles:
    return TILES[architecture_of(x_THE)][x_THE.dtype][x_THE.shape[2]]


def options_by_queries(tile: TreeTile, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Of a pass with a program for the queries of a tile; two heads share what it reads of the keys."""
    pack = 2 - heads // kv_heads % 2
    return {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "PACK": pack,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.queries * pack,
        "BLOCK_N": tile.keys,
        "num_warps": tile.num_warps * pack,
        "num_stages": tile.num_stages,
    }


def options_by_keys(tile: TreeTile, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Of the pass with a program for the keys of a tile."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def rows_of_heads(x_THE: Tensor) -> Tensor:
    """x as the kernels read it: heads side by side, rows any number of heads apart; mostly x itself."""
    stride_t, *strides = x_THE.stride()
    head_dim = x_THE.shape[2]
    is_readable = strides == [head_dim, 1] and stride_t % head_dim == 0
    return x_THE if is_readable else x_THE.contiguous()


def stride_in_heads(x_THE: Tensor) -> int:
    """Heads from row to row. The kernels multiply: so the compiler knows that rows are aligned."""
    return x_THE.stride(0) // x_THE.shape[2]


@triton.jit
def load_rows(
    x_ptr, first, head, stride, num_rows,
    IS_MASKED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """[BLOCK, HEAD_DIM]: of the rows from `first` on, PACK heads each from `head` on.

    IS_MASKED: there may be rows beyond the last, which are zeros.
    """
    offs = tl.arange(0, BLOCK)
    places = (offs // PACK * stride + offs % PACK)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    x_ptr += (first.to(tl.int64) * stride + head) * HEAD_DIM
    if IS_MASKED:
        x = tl.load(x_ptr + places, (first + offs // PACK < num_rows)[:, None], other=0.0)
    else:
        x = tl.load(x_ptr + places)
    return x


@triton.jit
def store_rows(
    x_ptr, x, first, head, stride, num_rows, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    places = (offs // PACK * stride + offs % PACK)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    x_ptr += (first.to(tl.int64) * stride + head) * HEAD_DIM
    mask = (first + offs // PACK < num_rows)[:, None]
    tl.store(x_ptr + places, x.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def tile_of_queries(
    key_blocks_ptr, num_rows, HEADS: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """A program's first head, its list of blocks of keys, its first query, and how many blocks are masked and seen.

    Heads follow one another, then parts of a block of queries, then blocks, of which the longest come first.
    """
    PARTS: tl.constexpr = BLOCK_ROWS * PACK // BLOCK_M
    tile = tl.program_id(0) // (HEADS // PACK)
    head = tl.program_id(0) % (HEADS // PACK) * PACK
    key_blocks_ptr += (tile // PARTS).to(tl.int64) * (tl.cdiv(num_rows, BLOCK_ROWS) + 3)
    first = tl.load(key_blocks_ptr) * BLOCK_ROWS + tile % PARTS * (BLOCK_M // PACK)
    return head, key_blocks_ptr + 3, first, tl.load(key_blocks_ptr + 1), tl.load(key_blocks_ptr + 2)
