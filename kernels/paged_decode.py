"""Computes paged attention of one new token a sequence on a GPU; a shared prefix is read once.

Read top-down: paged_decode launches _decode_kernel, which stores a partial result (largest score,
sum of exp, output) for each split of SPLIT keys, and _merge_splits_kernel, which adds the splits of
a sequence up. A program of the first kernel has one sequence, one KV head and one split:

    keys of a sequence      split 0     split 1     split 2     split 3
    seq 0, the leader       P 0 1 2     P 0 1 2     P 0         P 0
    seq 1                   -           -           P 1         P 1
    seq 2                   -           -           P 2
    shared tokens         |<--------------------->|
                            P 0 1 2: the program computes the rows of members 0, 1 and 2
                            -: the program ends at once

The host decides nothing, so a decode step can be captured in a CUDA graph and replayed at other
lengths: the grid has a program for each split of the longest sequence.

Departures from the textbook. All query heads of a KV head are rows of one tile, so that each key is
read once for all of them.

Cascade: ops/prefix_groups.py names groups of sequences that begin with the same pages. In a split
that lies within the shared tokens, the program of every BLOCK_B-th member computes the rows of
BLOCK_B members. Groups are data, not code: the rows of a sequence go through the same instructions
by themselves and in any group, so the result is bitwise equal with and without cascade.
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
    """The sizes of a program: its rows, its keys, and how many keys it holds at once."""

    rows: int  # query heads of a KV head times members; at most, unless one token has more heads
    split: int  # keys of a program
    keys: int  # held at once, at most
    num_stages: int


# 16 bits: with five stages, Triton allocates two buffers each for keys and values. At 32 keys, four
# programs then fit on an H100's SM (Triton 3.7; three with 3.6).
_HALVES = dict.fromkeys((torch.float16, torch.bfloat16), DecodeTile(32, 256, 32, 5))
_FP32 = {torch.float32: DecodeTile(32, 256, 64, 3)}
DECODE_TILES: dict[int, dict[torch.dtype, DecodeTile]] = {
    INTERPRETER: dict.fromkeys((*_FP32, *_HALVES), DecodeTile(32, 32, 32, 1)),
    **dict.fromkeys(ARCHITECTURES, _FP32 | _HALVES),
}
_MEMBERS = 16  # of a group, at most: MAX_MEMBERS of ops/prefix_groups.py
_MERGED_AT_ONCE = 16  # splits that a program of the merge holds at once
_MERGE_WARPS = 4


def paged_decode(
    launch: Launch,
    tensors: tuple[Tensor, ...],
    groups_BG: Tensor,
    o_THE: Tensor,
    scale: float,
    max_seqlen_k: int,
) -> None:
    """Computes attention into o_THE.

    Args: tensors: the first six arguments of paged_attention_triton, contiguous; groups_BG:
    contiguous.
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
    """Returns the constants of _decode_kernel; they depend on the model only."""
    # As many members as fit into the rows of a tile. This must not depend on the batch or its
    # groups: another size of tile could add numbers up in another order.
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
    """Returns the constants of _merge_splits_kernel, from those of _decode_kernel."""
    return {name: constants[name] for name in ("HEAD_DIM", "SPLIT", "BLOCK_E")} | {
        "BLOCK_N": _MERGED_AT_ONCE
    }


def aot_configs() -> AotConfigs:
    """Yields both kernels for MODELS, one of them also in fp32 over pages in bf16."""
    seq_pointers = dict.fromkeys(("seq_lens_ptr", "cu_seqlens_q_ptr"), torch.int32)
    partial_pointers = dict.fromkeys(("partial_ptr", "sums_ptr"), torch.float32)
    for architecture in ARCHITECTURES:
        for dtype in TILES[architecture]:
            for heads, kv_heads, head_dim, page_size in MODELS:
                launch = launch_for(architecture, dtype, heads, kv_heads, head_dim, page_size)
                tile = DECODE_TILES[architecture][dtype]
                constants = _constants(launch, tile)
                cache_dtype = (
                    torch.bfloat16 if dtype == torch.float32 and head_dim == 128 else dtype
                )
                launch_key = (
                    architecture,
                    dtype,
                    f"{heads} heads on {kv_heads} of {head_dim}, page {page_size}",
                )
                pointers = (
                    {"q_ptr": dtype, "k_ptr": cache_dtype, "v_ptr": cache_dtype}
                    | seq_pointers
                    | partial_pointers
                )
                pointers |= dict.fromkeys(("block_table_ptr", "groups_ptr"), torch.int32)
                yield AotConfig(
                    _decode_kernel,
                    *launch_key,
                    launch.num_warps,
                    pointers,
                    constants,
                    num_stages=tile.num_stages,
                )
                pointers = {"o_ptr": dtype} | seq_pointers | partial_pointers
                yield AotConfig(
                    _merge_splits_kernel,
                    *launch_key,
                    _MERGE_WARPS,
                    pointers,
                    _merge_constants(constants),
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
    """Computes partial results of one split of keys, for one sequence or the members it leads."""
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, tl.load(seq_lens_ptr + seq))
    # A row of groups: leader, index among the members, number of shared tokens, then the members.
    # The members are read from the leader's row.
    group_ptr = groups_ptr + seq * (3 + MEMBERS)
    leader = tl.load(group_ptr)
    member_idx = tl.load(group_ptr + 1)
    num_shared = tl.load(group_ptr + 2)
    # Of a shared split, the first of BLOCK_B members computes the rows of all of them.
    is_shared = begin + SPLIT <= num_shared
    is_covered = is_shared & (member_idx % BLOCK_B != 0)
    if (begin < end) & (is_covered == 0):
        pages_ptr = block_table_ptr + seq.to(tl.int64) * table_width
        rows = tl.arange(0, BLOCK_M)
        offs_e = tl.arange(0, BLOCK_E)
        members_ptr = groups_ptr + leader * (3 + MEMBERS) + 3 + (member_idx - member_idx % BLOCK_B)
        # A row of the tile is a query head of a member. Masked are members that do not exist,
        # sequences without a new token and, if the split is not shared, all other members.
        seqs = tl.load(members_ptr + rows // GROUP, rows < BLOCK_B * GROUP, other=-1)
        is_member = seqs >= 0
        tokens = tl.load(cu_seqlens_q_ptr + seqs, is_member, other=0)
        is_row = is_member & (tokens < tl.load(cu_seqlens_q_ptr + seqs + 1, is_member, other=0))
        is_row = is_row & ((seqs == seq) | is_shared)
        heads = kv_head * GROUP + rows % GROUP
        is_column = (offs_e < HEAD_DIM)[None, :]
        offs = tokens.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
        q = tl.load(
            q_ptr + offs[:, None] * HEAD_DIM + offs_e[None, :],
            is_row[:, None] & is_column,
            other=0.0,
        )
        # No key of the split comes after the new token, so every row sees all of them.
        m_i, l_i, acc = attend(
            q, k_ptr, v_ptr, pages_ptr, begin, end, rows * 0 + (end - 1), kv_head, scale,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        offs = (seqs.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads) * num_splits + split
        tl.store(sums_ptr + offs, m_i, is_row)
        tl.store(
            sums_ptr + tl.cast(num_seqs, tl.int64) * (NUM_KV_HEADS * GROUP) * num_splits + offs,
            l_i,
            is_row,
        )
        tl.store(
            partial_ptr + offs[:, None] * HEAD_DIM + offs_e[None, :],
            acc,
            is_row[:, None] & is_column,
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
    """Adds the splits of one sequence and query head up, in order."""
    seq = tl.program_id(0).to(tl.int64)
    q_head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    token = tl.load(cu_seqlens_q_ptr + seq)
    if token < tl.load(cu_seqlens_q_ptr + seq + 1):
        num_used = tl.cdiv(tl.load(seq_lens_ptr + seq), SPLIT)
        row = seq * num_heads + q_head
        m_ptr = sums_ptr + row * num_splits
        l_ptr = m_ptr + tl.num_programs(0).to(tl.int64) * num_heads * num_splits
        partial_ptr += row * num_splits * HEAD_DIM
        offs_n = tl.arange(0, BLOCK_N)
        offs_e = tl.arange(0, BLOCK_E)
        is_column = offs_e < HEAD_DIM
        m_i = tl.full((), float("-inf"), tl.float32)
        # The maximum over all splits comes first, then every split is rescaled once.
        for start in range(0, num_used, BLOCK_N):
            m_splits = tl.load(
                m_ptr + start + offs_n, start + offs_n < num_used, other=float("-inf")
            )
            m_i = tl.maximum(m_i, tl.max(m_splits, 0))
        l_i = tl.zeros((), tl.float32)
        acc = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, num_used, BLOCK_N):
            splits = start + offs_n
            is_used = splits < num_used
            alpha = tl.exp(tl.load(m_ptr + splits, is_used, other=float("-inf")) - m_i)
            l_i += tl.sum(alpha * tl.load(l_ptr + splits, is_used, other=0.0), 0)
            offs = splits[:, None] * HEAD_DIM + offs_e[None, :]
            partial = tl.load(partial_ptr + offs, is_used[:, None] & is_column[None, :], other=0.0)
            acc += tl.sum(alpha[:, None] * partial, 0)
        # A sequence without tokens has no split and would be 0 / 0: an unused row in a CUDA graph.
        acc = tl.where(num_used == 0, 0.0, acc / l_i)
        o_row_ptr = o_ptr + (token.to(tl.int64) * num_heads + q_head) * HEAD_DIM
        tl.store(o_row_ptr + offs_e, acc.to(o_ptr.dtype.element_ty), is_column)
