"""Computes dK and dV of tree attention on a GPU: the second pass of the backward.

Read top-down: grad_keys_and_values launches two kernels.

    _tree_grad_kv_kernel  A program has a tile of keys and a range of queries. It goes through all
                          query heads that share the keys, and sums them in registers.
    _tree_sum_kernel      Adds the partial sums of keys whose queries are cut into chunks, in order.

    the queries of one block of keys:  [ masked | full, full, .. | masked ]     (_tree_plan.py)
                                       begin    full_begin       full_end  end

Keys are the rows of a tile and queries its columns. So p and grad_qk, computed here, enter the
products for dV and dK as they are, not transposed.
"""

import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import AotConfigs
from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK, max_slots
from socpo_fast.kernels._tree_tiles import (
    BLOCK_ROWS,
    LOG2_E,
    Launch,
    aot_configs_of,
    is_seen,
    load_rows,
    store_rows,
    stride_in_heads,
)

_SUM_OPTIONS = {"num_warps": 4, "num_stages": 3}


def grad_keys_and_values(
    launch: Launch,
    tensors: list[Tensor],
    rows_2HT: Tensor,
    visible_until_T: Tensor,
    query_ranges_P7: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns dK and dV; tensors are the gradient of o, q, k and v, each through `rows_of_heads`.

    rows_2HT: logsumexp and delta, as the first pass stores them. Memory: max_slots partial sums of
    a block of keys.
    """
    _, _, k_TKE, v_TKE = tensors
    num_rows, kv_heads, head_dim = k_TKE.shape
    tile = launch.tiles.grad_kv
    grad_k_TKE = k_TKE.new_empty(k_TKE.shape)
    grad_v_TKE = v_TKE.new_empty(v_TKE.shape)
    num_slots = max_slots(num_rows)
    partial_SK2NE = rows_2HT.new_empty((num_slots, kv_heads, 2, ROWS_PER_BLOCK, head_dim))
    programs = ROWS_PER_BLOCK // tile.keys * kv_heads
    _tree_grad_kv_kernel[query_ranges_P7.shape[0] * programs,](
        *tensors,
        rows_2HT,
        visible_until_T,
        query_ranges_P7,
        grad_k_TKE,
        grad_v_TKE,
        partial_SK2NE,
        *(stride_in_heads(x) for x in tensors),
        num_rows,
        scale,
        **launch.by_keys(tile),
    )
    # No column of a small tree is long enough to be cut. num_slots depends on the number of rows
    # only, so this does not wait for the device.
    if num_slots > 0:
        _tree_sum_kernel[query_ranges_P7.shape[0], kv_heads, 2](
            partial_SK2NE,
            query_ranges_P7,
            grad_k_TKE,
            grad_v_TKE,
            num_rows,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            **_SUM_OPTIONS,
        )
    return grad_k_TKE, grad_v_TKE


def aot_configs() -> AotConfigs:
    """Yields the launches above for the models of _tree_tiles.py."""
    yield from aot_configs_of(
        _tree_grad_kv_kernel,
        lambda launch: launch.by_keys(launch.tiles.grad_kv),
    )
    yield from aot_configs_of(
        _tree_sum_kernel,
        lambda launch: {"KV_HEADS": launch.kv_heads, "HEAD_DIM": launch.head_dim, **_SUM_OPTIONS},
    )


@triton.jit
def _tree_grad_kv_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    visible_until_ptr,
    query_ranges_ptr,
    grad_k_ptr,
    grad_v_ptr,
    partial_ptr,
    stride_dt: tl.int32,
    stride_qt: tl.int32,
    stride_kt: tl.int32,
    stride_vt: tl.int32,
    num_rows: tl.int32,
    scale: tl.float32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):
    """Computes dK and dV of a tile of keys over one range of queries."""
    TILES_PER_BLOCK: tl.constexpr = BLOCK_ROWS.value // BLOCK_N
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS % TILES_PER_BLOCK
    query_ranges_ptr += (tl.program_id(0) // KV_HEADS // TILES_PER_BLOCK).to(tl.int64) * 7
    begin = tl.load(query_ranges_ptr + 1)
    end = tl.load(query_ranges_ptr + 2)
    if begin < end:
        first_key = tl.load(query_ranges_ptr) * BLOCK_ROWS + tile * BLOCK_N
        full_begin = tl.load(query_ranges_ptr + 3)
        full_end = tl.load(query_ranges_ptr + 4)
        slot = tl.load(query_ranges_ptr + 5)
        keys = first_key + tl.arange(0, BLOCK_N)
        until = tl.load(visible_until_ptr + keys, keys < num_rows, other=0)
        k = load_rows(k_ptr, first_key, kv_head, stride_kt, num_rows, True, 1, BLOCK_N, HEAD_DIM)
        v = load_rows(v_ptr, first_key, kv_head, stride_vt, num_rows, True, 1, BLOCK_N, HEAD_DIM)
        grad_k = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        grad_v = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        # With a mask: the blocks of queries before the full ones, and those after them.
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr,
            begin, full_begin - begin, full_end - full_begin, end - full_end, kv_head,
            stride_dt, stride_qt, num_rows, scale * LOG2_E,
            True, KV_HEADS, GROUP, HEAD_DIM, BLOCK_M, MASKED_STAGES,
        )  # fmt: skip
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr,
            full_begin, full_end - full_begin, 0, 0, kv_head,
            stride_dt, stride_qt, num_rows, scale * LOG2_E,
            False, KV_HEADS, GROUP, HEAD_DIM, BLOCK_M, MASKED_STAGES,
        )  # fmt: skip
        grad_k *= scale
        if slot < 0:
            store_rows(
                grad_k_ptr, grad_k, first_key, kv_head, KV_HEADS, num_rows, 1, BLOCK_N, HEAD_DIM
            )  # fmt: skip
            store_rows(
                grad_v_ptr, grad_v, first_key, kv_head, KV_HEADS, num_rows, 1, BLOCK_N, HEAD_DIM
            )  # fmt: skip
        else:
            # A slot has for each head the rows of dK, then those of dV.
            row = ((slot * KV_HEADS + kv_head) * 2) * BLOCK_ROWS + tile * BLOCK_N
            store_rows(partial_ptr, grad_k, row, 0, 1, row + BLOCK_N, 1, BLOCK_N, HEAD_DIM)
            row += BLOCK_ROWS
            store_rows(partial_ptr, grad_v, row, 0, 1, row + BLOCK_N, 1, BLOCK_N, HEAD_DIM)


@triton.jit
def _add_queries(
    grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr,
    begin, num_before, num_skipped, num_behind, kv_head, stride_dt, stride_qt, num_rows, scale,
    IS_MASKED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV the terms of num_before blocks of queries, and of num_behind after a gap.

    The gap has num_skipped blocks: the full ones, when the masked ones on both sides are added.
    """
    PRECISION: tl.constexpr = "tf32x3" if k.dtype == tl.float32 else "ieee"
    TILES_PER_BLOCK: tl.constexpr = BLOCK_ROWS.value // BLOCK_M
    stride_h = (tl.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS).to(tl.int64)
    delta_ptr = rows_ptr + KV_HEADS * GROUP * stride_h
    # A mask takes the registers that a fourth stage would need.
    NUM_STAGES: tl.constexpr = MASKED_STAGES if IS_MASKED else None
    for i in tl.range((num_before + num_behind) * TILES_PER_BLOCK * GROUP, num_stages=NUM_STAGES):
        q_head = kv_head * GROUP + i % GROUP
        tile = i // GROUP
        if IS_MASKED:
            tile += tl.where(tile < num_before * TILES_PER_BLOCK, 0, num_skipped * TILES_PER_BLOCK)
        first_query = begin * BLOCK_ROWS + tile * BLOCK_M
        queries = first_query + tl.arange(0, BLOCK_M)
        offs = q_head * stride_h + queries
        q = load_rows(
            q_ptr, first_query, q_head, stride_qt, num_rows, IS_MASKED, 1, BLOCK_M, HEAD_DIM
        )
        grad = load_rows(
            grad_o_ptr, first_query, q_head, stride_dt, num_rows, IS_MASKED, 1, BLOCK_M, HEAD_DIM
        )  # fmt: skip
        logsumexp = tl.load(rows_ptr + offs)
        delta = tl.load(delta_ptr + offs)
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(qk * scale - logsumexp[None, :])
        if IS_MASKED:
            p = tl.where(is_seen(queries[None, :], keys[:, None], until[:, None]), p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        grad_qk = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_qk.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def _tree_sum_kernel(
    partial_ptr,
    query_ranges_ptr,
    grad_k_ptr,
    grad_v_ptr,
    num_rows: tl.int32,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Adds the partial sums of one block of keys in order, for dK or dV of one KV head."""
    query_ranges_ptr += tl.program_id(0) * 7
    key_block = tl.load(query_ranges_ptr)
    begin = tl.load(query_ranges_ptr + 1)
    slot = tl.load(query_ranges_ptr + 5)
    kv_head = tl.program_id(1)
    is_v = tl.program_id(2)
    # Each chunk of the column has a program here. The one with the first chunk, which begins at
    # the diagonal, adds all of them; the others have nothing to do.
    if (slot >= 0) & (begin == key_block):
        acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
        for chunk_idx in range(tl.load(query_ranges_ptr + 6)):
            row = (((slot + chunk_idx) * KV_HEADS + kv_head) * 2 + is_v) * BLOCK_ROWS
            acc += load_rows(partial_ptr, row, 0, 1, 0, False, 1, BLOCK_ROWS, HEAD_DIM)
        grad_ptr = grad_k_ptr if is_v == 0 else grad_v_ptr
        first_key = key_block * BLOCK_ROWS
        store_rows(
            grad_ptr, acc, first_key, kv_head, KV_HEADS, num_rows, 1, BLOCK_ROWS, HEAD_DIM
        )  # fmt: skip
