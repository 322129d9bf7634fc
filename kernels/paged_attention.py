"""Computes attention of new tokens over keys and values in pages, on a GPU.

Read top-down: paged_attention_triton is the launch, _prefill_kernel a program. If each sequence has
at most one new token, kernels/paged_decode.py computes it. The online softmax of both is in
kernels/_attend.py.

    rows of a program, GROUP = 2:      token t,     query head 0 of the KV head
    query tokens times the query       token t,     query head 1
    heads of one KV head, so that      token t + 1, query head 0
    a key is read once for all         token t + 1, query head 1    .. BLOCK_M rows

Grids depend on the batch size and on the longest lengths as the caller states them, never on the
contents of tensors: the host does not wait for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._attend import MODELS, TILES, Launch, attend, launch_for
from socpo_fast.kernels._launch import ARCHITECTURES, AotConfig, AotConfigs, architecture_of
from socpo_fast.kernels.paged_decode import paged_decode


def paged_attention_triton(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
    groups_BG: Tensor | None = None,
) -> Tensor:
    """Returns o [T, H, E] in q's dtype, as `paged_attention` of ops/ defines it.

    Args:
        q_THE:                      fp32, bf16 or fp16.
        k_cache_PSKE, v_cache_PSKE: contiguous, of the same or another of these dtypes, converted
                                    after they are read.
        max_seqlen_q, max_seqlen_k: upper bounds of the query tokens and of the tokens of a
                                    sequence. A max_seqlen_q of 1 selects decode.
        groups_BG:                  int32, of ops/prefix_groups.py; needed for decode only.

    A sequence may have no query token. One without any token, which is an unused row in a captured
    CUDA graph, gets zeros from decode.
    """
    q_THE = q_THE.contiguous()
    o_THE = torch.empty_like(q_THE)
    if q_THE.numel() == 0:
        return o_THE
    heads = q_THE.shape[1]
    (page_size, kv_heads, head_dim) = k_cache_PSKE.shape[1:]
    launch = launch_for(architecture_of(q_THE), q_THE.dtype, heads, kv_heads, head_dim, page_size)
    tensors = (
        q_THE,
        k_cache_PSKE,
        v_cache_PSKE,
        *(x.contiguous() for x in (block_table_BM, seq_lens_B, cu_seqlens_q)),
    )
    with torch.cuda.device_of(q_THE):
        if max_seqlen_q == 1:
            assert groups_BG is not None, "decode needs groups"
            paged_decode(launch, tensors, groups_BG.contiguous(), o_THE, scale, max_seqlen_k)
            return o_THE
        block_m = _block_rows(launch)
        grid = (
            block_table_BM.shape[0],
            kv_heads,
            triton.cdiv(max_seqlen_q, block_m // launch.constants["GROUP"]),
        )
        _prefill_kernel[grid](
            *tensors,
            o_THE,
            block_table_BM.shape[1],
            scale,
            **launch.constants,
            BLOCK_M=block_m,
            num_warps=launch.num_warps,
        )
    return o_THE


def _block_rows(launch: Launch) -> int:
    """Returns BLOCK_M: query tokens times heads of a KV head in a tile, at least one token."""
    return max(launch.rows, triton.next_power_of_2(launch.constants["GROUP"]))


def aot_configs() -> AotConfigs:
    """Yields prefill for MODELS, one of them also in fp32 over pages in bf16."""
    tables = dict.fromkeys(("block_table_ptr", "seq_lens_ptr", "cu_seqlens_q_ptr"), torch.int32)
    for architecture in ARCHITECTURES:
        for dtype in TILES[architecture]:
            for heads, kv_heads, head_dim, page_size in MODELS:
                launch = launch_for(architecture, dtype, heads, kv_heads, head_dim, page_size)
                pages = torch.bfloat16 if dtype == torch.float32 and head_dim == 128 else dtype
                yield AotConfig(
                    _prefill_kernel,
                    architecture,
                    dtype,
                    f"{heads} heads on {kv_heads} of {head_dim}, page {page_size}",
                    launch.num_warps,
                    tables | {"q_ptr": dtype, "k_ptr": pages, "v_ptr": pages, "o_ptr": dtype},
                    launch.constants | {"BLOCK_M": _block_rows(launch)},
                )


@triton.jit(
    do_not_specialize=["table_width"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "cu_seqlens_q_ptr"],
)
def _prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    o_ptr,
    table_width,
    scale: tl.float32,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Computes the output of a tile of query tokens, for the query heads of one KV head."""
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    # Causal: the last tile sees the most keys and takes longest, so it starts first.
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    q_end = tl.load(cu_seqlens_q_ptr + seq + 1)
    first_token = tl.load(cu_seqlens_q_ptr + seq) + tile * tokens_per_tile
    # The grid is for the longest sequence: a shorter one has programs without a query.
    if first_token < q_end:
        # From the index of a query token among all to its position in the sequence. New tokens are
        # the last ones of a sequence.
        shift = tl.load(seq_lens_ptr + seq) - q_end
        rows = tl.arange(0, BLOCK_M)
        offs_e = tl.arange(0, BLOCK_E)
        tokens = first_token + rows // GROUP
        is_row = (rows < tokens_per_tile * GROUP) & (tokens < q_end)
        # In 64 bits: many tokens times wide heads are more than 2^31 numbers.
        offs_heads = tokens.to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
        offs = offs_heads[:, None] * HEAD_DIM + offs_e[None, :]
        mask = is_row[:, None] & (offs_e < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + offs, mask, other=0.0)
        end = shift + tl.minimum(first_token + tokens_per_tile, q_end)
        pages_ptr = block_table_ptr + seq.to(tl.int64) * table_width
        _, l_i, acc = attend(
            q, k_ptr, v_ptr, pages_ptr, 0, end, shift + tokens, kv_head, scale,
            NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        tl.store(o_ptr + offs, (acc / l_i[:, None]).to(o_ptr.dtype.element_ty), mask)
