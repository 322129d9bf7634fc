"""What the passes of tree attention share: tiles, their launches, and how rows of heads are read.

Read Launch -> tile_of_queries -> load_rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    architecture_of,
)
from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK

BLOCK_ROWS = tl.constexpr(ROWS_PER_BLOCK)
LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2, which the hardware has


class Tile(NamedTuple):
    """What a program of one pass holds at once. Queries and keys divide ROWS_PER_BLOCK."""

    queries: int  # of each of its heads
    keys: int
    num_warps: int
    num_stages: int


class TreeTiles(NamedTuple):
    """The tiles of each pass."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile


# (heads of a program, head dim) -> tiles; a head dim of 32 has those of 64. In passes that go by
# queries a program takes two heads that share their keys, where table and model have such: it reads
# these keys once. Tiles are as large as registers allow: a thread spills 16 bytes at most (`make
# aot`). Three stages are the least with which loads are early. dK and dV of 128 numbers fill half
# of the registers, so few queries go with them. fp32 is multiplied as three products of tf32.
_INTERPRETED = TreeTiles(*[Tile(64, 64, 1, 1)] * 3)
_SMALL = Tile(32, 32, 4, 1)
_SMALLEST = Tile(16, 32, 4, 1)
_ONE = Tile(64, 64, 4, 3)
_FEW_KEYS = Tile(64, 32, 4, 3)
_FEW_QUERIES = Tile(32, 64, 4, 4)
_PAIR = Tile(64, 64, 8, 3)
_PAIR_FEW_KEYS = Tile(64, 32, 8, 3)
_FP32 = {
    (1, 64): TreeTiles(_SMALL, _SMALL, _SMALL),
    (1, 128): TreeTiles(_SMALLEST, _SMALLEST, Tile(32, 16, 8, 1)),
}
_HALVES = {
    INTERPRETER: dict.fromkeys(((1, 64), (1, 128), (2, 64), (2, 128)), _INTERPRETED),
    80: {
        (1, 64): TreeTiles(_ONE, _ONE, _PAIR),
        (1, 128): TreeTiles(_FEW_KEYS, _FEW_KEYS, _PAIR),
        (2, 64): TreeTiles(_PAIR, _PAIR, _PAIR),
        (2, 128): TreeTiles(_PAIR_FEW_KEYS, _PAIR_FEW_KEYS, _PAIR),
    },
    90: {
        (1, 64): TreeTiles(_ONE, _ONE, _ONE),
        (1, 128): TreeTiles(_FEW_KEYS, _FEW_KEYS, _FEW_QUERIES),
        (2, 64): TreeTiles(_PAIR, _PAIR, _ONE),
        (2, 128): TreeTiles(_PAIR, _PAIR, _FEW_QUERIES),
    },
    100: {
        (1, 64): TreeTiles(_ONE, _ONE, _ONE),
        (1, 128): TreeTiles(_ONE, _ONE, _ONE),
        (2, 64): TreeTiles(_PAIR, _PAIR, _ONE),
        (2, 128): TreeTiles(_PAIR, _PAIR, _ONE),
    },
}
TILES = {
    architecture: {
        torch.bfloat16: tiles,
        torch.float16: tiles,
        torch.float32: tiles if architecture == INTERPRETER else _FP32,
    }
    for architecture, tiles in _HALVES.items()
}

# For `make aot`, of models: query heads, KV heads, head dim. Heads in pairs, and one by one.
MODELS = ((16, 8, 128), (8, 8, 128), (14, 2, 64), (8, 2, 64), (4, 2, 32))


_FP32_NAMES = ("logsumexp_ptr", "rows_ptr", "partial_ptr")
_INT32_NAMES = ("visible_until_ptr", "key_blocks_ptr", "query_ranges_ptr")


class Launch(NamedTuple):
    """What all passes for a model, a dtype and an architecture share."""

    heads: int
    kv_heads: int
    head_dim: int
    pack: int  # heads of a program that goes by queries
    tiles: TreeTiles

    def by_queries(self, tile: Tile) -> dict[str, Any]:
        """Options of a pass with a program for the queries of a tile."""
        return {
            "HEADS": self.heads,
            "GROUP": self.heads // self.kv_heads,
            "PACK": self.pack,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.queries * self.pack,
            "BLOCK_N": tile.keys,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def by_keys(self, tile: Tile) -> dict[str, Any]:
        """Options of a pass with a program for the keys of a tile."""
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.heads // self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": tile.queries,
            "BLOCK_N": tile.keys,
            "MASKED_STAGES": min(tile.num_stages, 3),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def programs_by_queries(self, tile: Tile) -> int:
        """Programs a block of queries."""
        return ROWS_PER_BLOCK // tile.queries * self.heads // self.pack


def launch_of(q_THE: Tensor, k_TKE: Tensor) -> Launch:
    _, heads, head_dim = q_THE.shape
    return _launch(architecture_of(q_THE), q_THE.dtype, heads, k_TKE.shape[1], head_dim)


def _launch(
    architecture: int,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Launch:
    tiles = TILES[architecture][dtype]
    has_pairs = heads // kv_heads % 2 == 0 and (2, 128) in tiles
    pack = 2 if has_pairs else 1
    return Launch(heads, kv_heads, head_dim, pack, tiles[pack, max(64, head_dim)])


def aot_configs_of(kernel: Any, options_of: Callable[[Launch], dict[str, Any]]) -> AotConfigs:
    """A kernel for MODELS in every dtype."""
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    known = dict.fromkeys(_FP32_NAMES, torch.float32) | dict.fromkeys(_INT32_NAMES, torch.int32)
    for architecture in ARCHITECTURES:
        for dtype in TILES[architecture]:
            for heads, kv_heads, head_dim in MODELS:
                options = options_of(_launch(architecture, dtype, heads, kv_heads, head_dim))
                yield AotConfig(
                    kernel,
                    architecture,
                    dtype,
                    f"{heads} heads on {kv_heads} of {head_dim}",
                    options.pop("num_warps"),
                    {name: known.get(name, dtype) for name in names},
                    options,
                    num_stages=options.pop("num_stages"),
                    is_aligned=True,
                )


def rows_of_heads(x_THE: Tensor) -> Tensor:
    """x as kernels read it: heads side by side, rows any number of heads apart. Mostly x itself."""
    stride_t, *strides = x_THE.stride()
    head_dim = x_THE.shape[2]
    is_readable = strides == [head_dim, 1] and stride_t % head_dim == 0
    return aligned(x_THE if is_readable else x_THE.contiguous())


def aligned(x: Tensor) -> Tensor:
    """Returns x if it starts at a multiple of 16 bytes, as load_rows needs, else a copy."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def stride_in_heads(x_THE: Tensor) -> int:
    """Heads from row to row. The kernels multiply: so the compiler knows that rows are aligned."""
    return x_THE.stride(0) // x_THE.shape[2]


@triton.jit
def tile_of_queries(
    key_blocks_ptr, num_rows, HEADS: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """A program's first head, list of blocks of keys, first query; how many are masked, and seen.

    Heads follow one another, then parts of a block of queries, then blocks, the longest first.
    """
    PARTS: tl.constexpr = BLOCK_ROWS * PACK // BLOCK_M
    tile = tl.program_id(0) // (HEADS // PACK)
    head = tl.program_id(0) % (HEADS // PACK) * PACK
    key_blocks_ptr += (tile // PARTS).to(tl.int64) * (tl.cdiv(num_rows, BLOCK_ROWS) + 4)
    first = tl.load(key_blocks_ptr) * BLOCK_ROWS + tile % PARTS * (BLOCK_M // PACK)
    num_masked = tl.load(key_blocks_ptr + 1)
    num_seen = tl.load(key_blocks_ptr + 2)
    return head, key_blocks_ptr + 3, first, num_masked, num_seen


@triton.jit
def offsets_of_rows(stride, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[BLOCK, HEAD_DIM]: where the elements of BLOCK / PACK rows are, of PACK heads each."""
    offs = tl.arange(0, BLOCK)
    heads = offs // PACK * stride + offs % PACK
    return heads[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def load_rows(
    x_ptr, first, head, stride, num_rows,
    IS_MASKED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """[BLOCK, HEAD_DIM]: of the rows from `first` on, PACK heads each from `head` on.

    IS_MASKED: there may be rows beyond the last, which are zeros.
    """
    x_ptr = tl.multiple_of(x_ptr + (first.to(tl.int64) * stride + head) * HEAD_DIM, 16)
    x_ptr += offsets_of_rows(stride, PACK, BLOCK, HEAD_DIM)
    if IS_MASKED:
        is_row = first + tl.arange(0, BLOCK) // PACK < num_rows
        x = tl.load(x_ptr, is_row[:, None], other=0.0)
    else:
        x = tl.load(x_ptr)
    return x


@triton.jit
def load_keys_and_values(
    k_ptr, v_ptr, first, kv_head, stride_kt, stride_vt, num_rows,
    IS_MASKED: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    k = load_rows(k_ptr, first, kv_head, stride_kt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
    v = load_rows(v_ptr, first, kv_head, stride_vt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
    return k, v


@triton.jit
def store_rows(
    x_ptr, x, first, head, stride, num_rows,
    PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    is_row = first + tl.arange(0, BLOCK) // PACK < num_rows
    x = x.to(x_ptr.dtype.element_ty)
    x_ptr = tl.multiple_of(x_ptr + (first.to(tl.int64) * stride + head) * HEAD_DIM, 16)
    tl.store(x_ptr + offsets_of_rows(stride, PACK, BLOCK, HEAD_DIM), x, is_row[:, None])


@triton.jit
def is_seen(queries, keys, until):
    """Whether queries see keys, of shapes that broadcast."""
    return (keys <= queries) & (queries < until)
