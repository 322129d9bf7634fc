"""Computes the backward of tree attention on a GPU: two passes and a sum, without atomics.

Read top-down: tree_attention_backward launches both passes, _tree_grad_q_kernel is the first one.

    pass 1, here               a tile of queries visits the keys of its list   -> dQ, delta
    pass 2, tree_grad_kv.py    a tile of keys visits its range of queries      -> dK, dV, or sums
    sum, tree_grad_kv.py       of keys whose queries are cut into chunks       -> dK, dV

    p = exp(score - logsumexp)      delta = grad . o       grad_score = p (grad . v - delta)

Here grad is the gradient of o, and a dot is a product of two heads. Departs from the textbook: both
passes compute p and grad . v, so there are seven matrix products instead of the five of a single
pass. In return no sum needs atomics: each is computed by one program in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import AotConfigs
from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK
from socpo_fast.kernels._tree_tiles import (
    BLOCK_ROWS,
    LOG2_E,
    aligned,
    aot_configs_of,
    is_seen,
    launch_of,
    load_keys_and_values,
    load_rows,
    rows_of_heads,
    store_rows,
    stride_in_heads,
    tile_of_queries,
)
from socpo_fast.kernels.tree_grad_kv import grad_keys_and_values


def tree_attention_backward(
    grad_o_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    visible_until_T: Tensor,
    key_blocks_NM: Tensor,
    query_ranges_P7: Tensor,
    o_THE: Tensor,
    logsumexp_TH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, as ops/tree_attention.py defines them.

    Args: as there; o and logsumexp as the forward returned them, and the two tables of plan_tree.
    """
    num_rows, heads, _ = q_THE.shape
    num_blocks = key_blocks_NM.shape[0]
    grad_q_THE = q_THE.new_empty(q_THE.shape)
    if num_rows == 0:
        return grad_q_THE, k_TKE.new_empty(k_TKE.shape), v_TKE.new_empty(v_TKE.shape)
    launch = launch_of(q_THE, k_TKE)
    tile = launch.tiles.grad_q
    tensors = [rows_of_heads(x) for x in (grad_o_THE, q_THE, k_TKE, v_TKE)]
    visible_until_T = aligned(visible_until_T.contiguous())
    # What both passes need of each row and head: logsumexp, in powers of 2, and delta. The layout
    # is the one that the second pass reads: head by head, in whole blocks of rows.
    rows_2HT = logsumexp_TH.new_empty((2, heads, num_blocks * ROWS_PER_BLOCK))
    with torch.cuda.device_of(q_THE):
        _tree_grad_q_kernel[num_blocks * launch.programs_by_queries(tile),](
            *tensors,
            o_THE,
            logsumexp_TH,
            visible_until_T,
            key_blocks_NM,
            grad_q_THE,
            rows_2HT,
            *(stride_in_heads(x) for x in tensors),
            num_rows,
            scale,
            **launch.by_queries(tile),
        )
        grad_k_TKE, grad_v_TKE = grad_keys_and_values(
            launch,
            tensors,
            rows_2HT,
            visible_until_T,
            query_ranges_P7,
            scale,
        )
    return grad_q_THE, grad_k_TKE, grad_v_TKE


def aot_configs() -> AotConfigs:
    """Yields the launch of the first pass for the models of _tree_tiles.py."""
    yield from aot_configs_of(
        _tree_grad_q_kernel,
        lambda launch: launch.by_queries(launch.tiles.grad_q),
    )


@triton.jit
def _tree_grad_q_kernel(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    logsumexp_ptr,
    visible_until_ptr,
    key_blocks_ptr,
    grad_q_ptr,
    rows_ptr,
    stride_dt: tl.int32,
    stride_qt: tl.int32,
    stride_kt: tl.int32,
    stride_vt: tl.int32,
    num_rows: tl.int32,
    scale: tl.float32,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Computes dQ of a tile of queries; stores logsumexp and delta for the second pass."""
    first_head, list_ptr, first_query, num_masked, num_seen = tile_of_queries(
        key_blocks_ptr,
        num_rows,
        HEADS,
        PACK,
        BLOCK_M,
    )
    offs_m = tl.arange(0, BLOCK_M)
    queries = first_query + offs_m // PACK
    heads = first_head + offs_m % PACK
    q = load_rows(
        q_ptr, first_query, first_head, stride_qt, num_rows, True, PACK, BLOCK_M, HEAD_DIM
    )
    grad = load_rows(
        grad_o_ptr, first_query, first_head, stride_dt, num_rows, True, PACK, BLOCK_M, HEAD_DIM
    )
    o = load_rows(o_ptr, first_query, first_head, HEADS, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    offs = queries.to(tl.int64) * HEADS + heads
    logsumexp = tl.load(logsumexp_ptr + offs, queries < num_rows, other=0.0) * LOG2_E
    # Also stores the zeros of rows beyond the last one, up to a whole block: the second pass then
    # reads without a mask.
    stride_h = (tl.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS).to(tl.int64)
    offs = heads * stride_h + queries
    tl.store(rows_ptr + offs, logsumexp)
    tl.store(rows_ptr + HEADS * stride_h + offs, delta)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        0, num_masked, first_head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        True, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        num_masked, num_seen, first_head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        False, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    store_rows(
        grad_q_ptr, acc * scale, first_query, first_head, HEADS, num_rows, PACK, BLOCK_M, HEAD_DIM
    )


@triton.jit
def _add_keys(
    acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr, begin, end,
    kv_head, stride_kt, stride_vt, num_rows, scale,
    IS_MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dQ the terms of the blocks of keys begin .. end - 1 of a list."""
    PRECISION: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "ieee"
    TILES_PER_BLOCK: tl.constexpr = BLOCK_ROWS.value // BLOCK_N
    block = tl.load(list_ptr + begin)
    for tile in range(begin * TILES_PER_BLOCK, end * TILES_PER_BLOCK):
        first_key = block * BLOCK_ROWS + tile % TILES_PER_BLOCK * BLOCK_N
        # One tile ahead, as in the forward.
        block = tl.load(list_ptr + (tile + 1) // TILES_PER_BLOCK)
        k, v = load_keys_and_values(
            k_ptr, v_ptr, first_key, kv_head, stride_kt, stride_vt, num_rows,
            IS_MASKED, BLOCK_N, HEAD_DIM,
        )  # fmt: skip
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(qk * scale - logsumexp[:, None])
        if IS_MASKED:
            keys = first_key + tl.arange(0, BLOCK_N)
            until = tl.load(visible_until_ptr + keys, keys < num_rows, other=0)
            p = tl.where(is_seen(queries[:, None], keys[None, :], until[None, :]), p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_qk = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_qk.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc
