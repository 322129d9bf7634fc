"""Holds what the passes of tree attention share: tiles, launches, and loads of rows of heads.

Read Launch -> tile_of_queries -> load_rows. A pass is one kernel: the forward, dQ, or dK and dV.

    a tile of load_rows, PACK = 2:      row t,     head h
    the two query heads of one KV       row t,     head h + 1
    head, so that a key is read         row t + 1, head h
    once for both                       row t + 1, head h + 1    ..
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
# exp(x) is computed as 2^(x log2 e), since the hardware has an instruction for powers of 2 only.
LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """The sizes of what a program holds at once. Queries and keys divide ROWS_PER_BLOCK."""

    queries: int  # of each of its heads
    keys: int
    num_warps: int
    num_stages: int


class TreeTiles(NamedTuple):
    """The tiles of each pass."""

    forward: Tile
    grad_q: Tile
    grad_kv: Tile


# (query heads of a program, head dim) -> the tile of each pass. A head dim of 32 uses those of 64.
#
# - Two heads: in the forward and dQ, a program takes two query heads of one KV head, if the model
#   has such a pair and the table an entry for it. Each key is then read once for both.
# - Tiles are as large as registers allow: a thread spills 16 bytes at most (`make aot`).
# - Three stages are the fewest with which loads are issued ahead of their use.
# - At a head dim of 128, dK and dV fill half of the registers, so their tiles have few queries.
# - fp32 is multiplied as three products of tf32.
_INTERPRETED = TreeTiles(*[Tile(64, 64, 1, 1)] * 3)
_SMALL = Tile(32, 32, 4, 1)
_SMALLEST = Tile(16, 32, 4, 1)
_FULL = Tile(64, 64, 4, 3)
_FEW_KEYS = Tile(64, 32, 4, 3)
_FEW_QUERIES = Tile(32, 64, 4, 4)
_FULL_8_WARPS = Tile(64, 64, 8, 3)
_FEW_KEYS_8_WARPS = Tile(64, 32, 8, 3)
_FP32 = {
    (1, 64): TreeTiles(_SMALL, _SMALL, _SMALL),
    (1, 128): TreeTiles(_SMALLEST, _SMALLEST, Tile(32, 16, 8, 1)),
}
_HALVES = {
    INTERPRETER: dict.fromkeys(((1, 64), (1, 128), (2, 64), (2, 128)), _INTERPRETED),
    80: {
        (1, 64): TreeTiles(_FULL, _FULL, _FULL_8_WARPS),
        (1, 128): TreeTiles(_FEW_KEYS, _FEW_KEYS, _FULL_8_WARPS),
        (2, 64): TreeTiles(_FULL_8_WARPS, _FULL_8_WARPS, _FULL_8_WARPS),
        (2, 128): TreeTiles(_FEW_KEYS_8_WARPS, _FEW_KEYS_8_WARPS, _FULL_8_WARPS),
    },
    90: {
        (1, 64): TreeTiles(_FULL, _FULL, _FULL),
        (1, 128): TreeTiles(_FEW_KEYS, _FEW_KEYS, _FEW_QUERIES),
        (2, 64): TreeTiles(_FULL_8_WARPS, _FULL_8_WARPS, _FULL),
        (2, 128): TreeTiles(_FULL_8_WARPS, _FULL_8_WARPS, _FEW_QUERIES),
    },
    100: {
        (1, 64): TreeTiles(_FULL, _FULL, _FULL),
        (1, 128): TreeTiles(_FULL, _FULL, _FULL),
        (2, 64): TreeTiles(_FULL_8_WARPS, _FULL_8_WARPS, _FULL),
        (2, 128): TreeTiles(_FULL_8_WARPS, _FULL_8_WARPS, _FULL),
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

# The models that `make aot` compiles for: query heads, KV heads, head dim. Some have pairs of heads
# for a program, some do not.
MODELS = ((16, 8, 128), (8, 8, 128), (14, 2, 64), (8, 2, 64), (4, 2, 32))


_FP32_NAMES = ("logsumexp_ptr", "rows_ptr", "partial_ptr")
_INT32_NAMES = ("visible_until_ptr", "key_blocks_ptr", "query_ranges_ptr")


class Launch(NamedTuple):
    """What all passes for one model, dtype and architecture share."""

    heads: int
    kv_heads: int
    head_dim: int
    pack: int  # query heads of a program in the forward and dQ
    tiles: TreeTiles

    def by_queries(self, tile: Tile) -> dict[str, Any]:
        """Returns the options of the forward or dQ, whose programs have a tile of queries each."""
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
        """Returns the options of dK and dV, whose programs have a tile of keys each."""
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
        """Returns how many programs of the forward or dQ a block of queries has."""
        return ROWS_PER_BLOCK // tile.queries * self.heads // self.pack


def launch_of(q_THE: Tensor, k_TKE: Tensor) -> Launch:
    """Returns the launch for the device, dtype and heads of these tensors."""
    _, heads, head_dim = q_THE.shape
    return _launch(architecture_of(q_THE), q_THE.dtype, heads, k_TKE.shape[1], head_dim)


def _launch(
    architecture: int,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> Launch:
    """Returns the launch of an architecture, dtype and model; 2 heads a program where it can."""
    tiles = TILES[architecture][dtype]
    has_pairs = heads // kv_heads % 2 == 0 and (2, 128) in tiles
    pack = 2 if has_pairs else 1
    return Launch(heads, kv_heads, head_dim, pack, tiles[pack, max(64, head_dim)])


def aot_configs_of(kernel: Any, options_of: Callable[[Launch], dict[str, Any]]) -> AotConfigs:
    """Yields the launches of a kernel for MODELS in every dtype."""
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    known_dtypes = dict.fromkeys(_FP32_NAMES, torch.float32) | dict.fromkeys(
        _INT32_NAMES, torch.int32
    )
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
                    {name: known_dtypes.get(name, dtype) for name in names},
                    options,
                    num_stages=options.pop("num_stages"),
                    is_aligned=True,
                )


def rows_of_heads(x_THE: Tensor) -> Tensor:
    """Returns x if its heads lie side by side and rows a number of heads apart, else a copy.

    This is the layout that the kernels read. A slice of packed qkv has it: it is not copied.
    """
    stride_t, *strides = x_THE.stride()
    head_dim = x_THE.shape[2]
    is_readable = strides == [head_dim, 1] and stride_t % head_dim == 0
    return aligned(x_THE if is_readable else x_THE.contiguous())


def aligned(x: Tensor) -> Tensor:
    """Returns x if it starts at a multiple of 16 bytes, as load_rows needs, else a copy."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def stride_in_heads(x_THE: Tensor) -> int:
    """Returns the distance from row to row in heads.

    Kernels multiply it by the head dim, a constant: so the compiler knows that rows are aligned.
    """
    return x_THE.stride(0) // x_THE.shape[2]


@triton.jit
def tile_of_queries(
    key_blocks_ptr, num_rows, HEADS: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Returns what a program computes: head, list, first query, number of masked and seen blocks.

    The list holds the numbers of the blocks of keys. Programs are ordered by block of queries, the
    one with the longest list first, then by tile in the block, then by head.
    """
    TILES_PER_BLOCK: tl.constexpr = BLOCK_ROWS * PACK // BLOCK_M
    tile = tl.program_id(0) // (HEADS // PACK)
    first_head = tl.program_id(0) % (HEADS // PACK) * PACK
    key_blocks_ptr += (tile // TILES_PER_BLOCK).to(tl.int64) * (tl.cdiv(num_rows, BLOCK_ROWS) + 4)
    first_query = tl.load(key_blocks_ptr) * BLOCK_ROWS + tile % TILES_PER_BLOCK * (BLOCK_M // PACK)
    num_masked = tl.load(key_blocks_ptr + 1)
    num_seen = tl.load(key_blocks_ptr + 2)
    return first_head, key_blocks_ptr + 3, first_query, num_masked, num_seen


@triton.jit
def offsets_of_rows(stride, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns offsets [BLOCK, HEAD_DIM] of BLOCK / PACK rows, PACK heads of each."""
    offs = tl.arange(0, BLOCK)
    offs_heads = offs // PACK * stride + offs % PACK
    return offs_heads[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]


@triton.jit
def load_rows(
    x_ptr, first, head, stride, num_rows,
    IS_MASKED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK, HEAD_DIM]: the rows from `first` on, of each PACK heads from `head` on.

    IS_MASKED: some of the rows may lie beyond the last one; these are zeros.
    """
    # Tells the compiler that loads of 16 bytes are allowed; rows_of_heads makes it true.
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
    """Loads k and v, [BLOCK_N, HEAD_DIM] each, of the rows from `first` on."""
    k = load_rows(k_ptr, first, kv_head, stride_kt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
    v = load_rows(v_ptr, first, kv_head, stride_vt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
    return k, v


@triton.jit
def store_rows(
    x_ptr, x, first, head, stride, num_rows,
    PACK: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Stores x [BLOCK, HEAD_DIM] in the layout of load_rows, without what is beyond num_rows."""
    is_row = first + tl.arange(0, BLOCK) // PACK < num_rows
    x = x.to(x_ptr.dtype.element_ty)
    x_ptr = tl.multiple_of(x_ptr + (first.to(tl.int64) * stride + head) * HEAD_DIM, 16)
    tl.store(x_ptr + offsets_of_rows(stride, PACK, BLOCK, HEAD_DIM), x, is_row[:, None])


@triton.jit
def is_seen(queries, keys, until):
    """Whether queries see keys; the shapes broadcast. until is that of the keys."""
    return (keys <= queries) & (queries < until)
