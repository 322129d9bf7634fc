"""Paged attention of one new token a sequence: keys in fixed splits, a prefix shared by siblings
read once.

Read top-down: paged_decode launches _decode_kernel, which leaves a partial result (largest score,
sum, output) for each split of keys, and _merge_splits_kernel, which adds them up. Nothing is
decided on the host, so that a decode step can be captured in a CUDA graph and replayed at other
lengths.

Departures from the textbook. All query heads of a KV head are rows of one tile, so that each key is
read once for them.
Cascade: ops/prefix_groups.py names groups of sequences that begin with the same pages. Of a split
that lies within these, the program of every BLOCK_B-th member takes the rows of BLOCK_B members,
and the others' programs leave. Groups are data: a sequence's rows go through the same instructions
alone, in a group, and in another one, so cascade changes no bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._attend import MODELS, TILES, Launch, attend, launch_for
from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    architecture_of,
)


class DecodeTile(NamedTuple):
    """How a program goes through its keys."""

    rows: int  # query heads of a KV head times siblings, at most, unless one token's are more
    split: int  # keys of a program
    keys: int  # that it holds at once, at most
    num_stages: int


# In 16 bits five stages give two buffers each to keys and values, 32 of which leave room for four
# programs on an H100's SM (Triton 3.7; three with 3.6).
_HALVES = dict.fromkeys((torch.float16, torch.bfloat16), DecodeTile(32, 256, 32, 5))
_FP32 = {torch.float32: DecodeTile(32, 256, 64, 3)}
DECODE_TILES: dict[int, dict[torch.dtype, DecodeTile]] = {
    INTERPRETER: dict.fromkeys((*_FP32, *_HALVES), DecodeTile(32, 32, 32, 1)),
    **dict.fromkeys(ARCHITECTURES, _FP32 | _HALVES),
}
_MEMBERS = 16  # of a group, at most, as ops/prefix_groups.py makes them
_MERGED_AT_ONCE = 16  # splits
_MERGE_WARPS = 4


def paged_decode(
    launch: Launch,
    tensors: tuple[Tensor, ...],
    groups_BG: Tensor,
    o_THE: Tensor,
    scale: float,
    max_seqlen_k: int,
) -> None:
    """Into o_THE; `tensors` are the first six arguments of paged_attention_triton, contiguous, as
    groups_BG is.
    """
    q_THE, _, _, block_table_BM, seq_lens_B, cu_seqlens_q = tensors
    (num_seqs, table_width), heads, kv_heads = (
        block_table_BM.shape,
        q_THE.shape[1],
        launch.constants["NUM_KV_HEADS"],
    )
    tile = DECODE_TILES[architecture_of(q_THE)][q_THE.dtype]
    constants = _constants(launch, tile)
    num_splits = triton.cdiv(max_seqlen_k, tile.split)
    partial_BHNE = q_THE.new_empty(
        (num_seqs, heads, num_splits, q_THE.shape[2]), dtype=torch.float32
    )
    sums_2BHN = q_THE.new_empty((2, num_seqs, heads, num_splits), dtype=torch.float32)
    _decode_kernel[num_seqs, kv_heads, num_splits](
        *tensors,
        groups_BG,
        partial_BHNE,
        sums_2BHN,
        num_seqs,
        table_width,
        num_splits,
        scale,
        **constants,
        num_warps=launch.num_warps,
        num_stages=tile.num_stages,
    )
    _merge_splits_kernel[num_seqs, heads](
        seq_lens_B,
        cu_seqlens_q,
        partial_BHNE,
        sums_2BHN,
        o_THE,
        num_splits,
        **_merge_constants(constants),
        num_warps=_MERGE_WARPS,
    )


def _constants(launch: Launch, tile: DecodeTile) -> dict[str, int]:
    """Of _decode_kernel. The rows of a tile depend on the model only, neither on the batch nor on
    groups.
    """
    block_seqs = _MEMBERS
    while block_seqs > 1 and block_seqs * launch.constants["GROUP"] > min(tile.rows, launch.rows):
        block_seqs //= 2
    return launch.constants | {
        "BLOCK_N": min(launch.constants["BLOCK_N"], tile.keys, tile.split),
        "SPLIT": tile.split,
        "MEMBERS": _MEMBERS,
        "BLOCK_B": block_seqs,
        "BLOCK_M": max(16, triton.next_power_of_2(block_seqs * launch.constants["GROUP"])),
    }


def _merge_constants(constants: dict[str, int]) -> dict[str, int]:
    return {name: constants[name] for name in ("HEAD_DIM", "SPLIT", "BLOCK_E")} | {
        "BLOCK_N": _MERGED_AT_ONCE
    }


def aot_configs() -> AotConfigs:
    """Decode and merging for MODELS, and for one in fp32 over pages in bf16."""
    lengths = dict.fromkeys(("seq_lens_ptr", "cu_seqlens_q_ptr"), torch.int32)
    partial = dict.fromkeys(("partial_ptr", "sums_ptr"), torch.float32)
    for architecture in ARCHITECTURES:
        for dtype in TILES[architecture]:
            for heads, kv_heads, head_dim, page_size in MODELS:
                launch = launch_for(architecture, dtype, heads, kv_heads, head_dim, page_size)
                tile = DECODE_TILES[architecture][dtype]
                constants = _constants(launch, tile)
                pages = torch.bfloat16 if dtype == torch.float32 and head_dim == 128 else dtype
                of = (
                    architecture,
                    dtype,
                    f"{heads} heads on {kv_heads} of {head_dim}, page {page_size}",
                )
                pointers = {"q_ptr": dtype, "k_ptr": pages, "v_ptr": pages} | lengths | partial
                pointers |= dict.fromkeys(("block_table_ptr", "groups_ptr"), torch.int32)
                yield AotConfig(
                    _decode_kernel,
                    *of,
                    launch.num_warps,
                    pointers,
                    constants,
                    num_stages=tile.num_stages,
                )
                pointers = {"o_ptr": dtype} | lengths | partial
                yield AotConfig(
                    _merge_splits_kernel, *of, _MERGE_WARPS, pointers, _merge_constants(constants)
                )


@triton.jit(
    do_not_specialize=["num_seqs", "table_width", "num_splits"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "cu_seqlens_q_ptr",
        "groups_ptr",
    ],
)
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    groups_ptr,
    partial_ptr,
    sums_ptr,
    num_seqs,
    table_width,
    num_splits,
    scale: tl.float32,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(seq_lens_ptr + seq))
    group_ptr = groups_ptr + seq * (3 + MEMBERS)
    leader = tl.load(group_ptr)
    place = tl.load(group_ptr + 1)
    num_shared = tl.load(group_ptr + 2)
    is_shared = begin + SPLIT <= num_shared
    leaves = is_shared & (place % BLOCK_B != 0)
    if (begin < end) & (leaves == 0):
        pages_ptr = block_table_ptr + seq.to(tl.int64) * table_width
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_E)
        members_ptr = groups_ptr + leader * (3 + MEMBERS) + 3 + (place - place % BLOCK_B)
        seqs = tl.load(members_ptr + rows // GROUP, rows < BLOCK_B * GROUP, other=-1)
        exists = seqs >= 0
        tokens = tl.load(cu_seqlens_q_ptr + seqs, exists, other=0)
        is_row = exists & (tokens < tl.load(cu_seqlens_q_ptr + seqs + 1, exists, other=0))
        is_row = is_row & ((seqs == seq) | is_shared)
        heads = kv_head * GROUP + rows % GROUP
        inside = (columns < HEAD_DIM)[None, :]
        places = tokens.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
        q = tl.load(
            q_ptr + places[:, None] * HEAD_DIM + columns[None, :],
            is_row[:, None] & inside,
            other=0.0,
        )
        highest, total, out = attend(
            q, k_ptr, v_ptr, pages_ptr, begin, end, rows * 0 + (end - 1), kv_head, scale,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        places = (seqs.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * num_splits + split
        tl.store(sums_ptr + places, highest, is_row)
        tl.store(
            sums_ptr + tl.cast(num_seqs, tl.int64) * (NUM_KV_HEADS * GROUP) * num_splits + places,
            total,
            is_row,
        )
        tl.store(
            partial_ptr + places[:, None] * HEAD_DIM + columns[None, :],
            out,
            is_row[:, None] & inside,
        )


@triton.jit(
    do_not_specialize=["num_splits"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "cu_seqlens_q_ptr"],
)
def _merge_splits_kernel(
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    partial_ptr,
    sums_ptr,
    o_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    token = tl.load(cu_seqlens_q_ptr + seq)
    if token < tl.load(cu_seqlens_q_ptr + seq + 1):
        used = tl.cdiv(tl.load(seq_lens_ptr + seq), SPLIT)
        row = seq * num_heads + head
        highest_ptr = sums_ptr + row * num_splits
        total_ptr = highest_ptr + tl.num_programs(0).to(tl.int64) * num_heads * num_splits
        partial_ptr += row * num_splits * HEAD_DIM
        lanes = tl.arange(0, BLOCK_N)
        columns = tl.arange(0, BLOCK_E)
        inside = columns < HEAD_DIM
        highest = tl.full((), float("-inf"), tl.float32)
        for start in range(0, used, BLOCK_N):
            scores = tl.load(highest_ptr + start + lanes, start + lanes < used, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(scores, 0))
        total = tl.zeros((), tl.float32)
        out = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, used, BLOCK_N):
            splits = start + lanes
            is_used = splits < used
            factors = tl.exp(tl.load(highest_ptr + splits, is_used, other=float("-inf")) - highest)
            total += tl.sum(factors * tl.load(total_ptr + splits, is_used, other=0.0), 0)
            places = splits[:, None] * HEAD_DIM + columns[None, :]
            partial = tl.load(partial_ptr + places, is_used[:, None] & inside[None, :], other=0.0)
            out += tl.sum(factors[:, None] * partial, 0)
        out = tl.where(used == 0, 0.0, out / total)
        o_row_ptr = o_ptr + (token.to(tl.int64) * num_heads + head) * HEAD_DIM
        tl.store(o_row_ptr + columns, out.to(o_ptr.dtype.element_ty), inside)
