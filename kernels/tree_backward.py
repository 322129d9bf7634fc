"""The backward of tree attention on a GPU: two passes and a sum, without atomics.

Read top-down: tree_attention_backward launches _tree_grad_q_kernel, here, whose programs have a
tile of queries and go by its list of blocks of keys, as in the forward; then the pass of
kernels/tree_grad_kv.py, whose programs have a tile of keys.

With p = exp(score - logsumexp), a score's gradient is p (grad . v - delta), delta = grad . o. That
is seven products instead of the five of one pass: both compute p and grad . v. In return every sum
has one program and one order.
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
    """The gradients of q, k and v, as ops/tree_attention.py defines them.

    Args: as there; o and logsumexp as the forward gave them, and the plan of the tree.
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
    # Of each row and head what both passes need: logsumexp, in powers of 2, and delta. Rows lie in
    # the order in which the second pass reads them, whole blocks of them.
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
    head, list_ptr, first, num_masked, num_seen = tile_of_queries(
        key_blocks_ptr,
        num_rows,
        HEADS,
        PACK,
        BLOCK_M,
    )
    offs_m = tl.arange(0, BLOCK_M)
    queries = first + offs_m // PACK
    heads = head + offs_m % PACK
    q = load_rows(q_ptr, first, head, stride_qt, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    grad = load_rows(grad_o_ptr, first, head, stride_dt, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    o = load_rows(o_ptr, first, head, HEADS, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    offs = queries.to(tl.int64) * HEADS + heads
    logsumexp = tl.load(logsumexp_ptr + offs, queries < num_rows, other=0.0) * LOG2_E
    # Whole blocks of rows, zeros beyond the last: the second pass reads them without a mask.
    stride_h = (tl.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS).to(tl.int64)
    offs = heads * stride_h + queries
    tl.store(rows_ptr + offs, logsumexp)
    tl.store(rows_ptr + HEADS * stride_h + offs, delta)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        0, num_masked, head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        True, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        num_masked, num_seen, head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        False, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    store_rows(grad_q_ptr, acc * scale, first, head, HEADS, num_rows, PACK, BLOCK_M, HEAD_DIM)


@triton.jit
def _add_keys(
    acc, q, grad, logsumexp, delta, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr, begin, end,
    kv_head, stride_kt, stride_vt, num_rows, scale,
    IS_MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to dQ what the blocks of keys begin .. end - 1 of a list give."""
    PRECISION: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "ieee"
    PARTS: tl.constexpr = BLOCK_ROWS.value // BLOCK_N
    block = tl.load(list_ptr + begin)
    for part in range(begin * PARTS, end * PARTS):
        first_key = block * BLOCK_ROWS + part % PARTS * BLOCK_N
        block = tl.load(list_ptr + (part + 1) // PARTS)  # ahead, as in the forward
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
