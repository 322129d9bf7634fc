"""The backward of tree attention on a GPU: two passes and a sum, without atomics.

Read top-down: tree_attention_backward launches

    _tree_grad_q_kernel    a program has a tile of queries, as in the forward, and goes by its list of
                           blocks of keys. It also leaves each row's two numbers to the second pass
    _tree_grad_kv_kernel   a program has a tile of keys and a range of queries, whose heads follow
                           one another: all that share the keys are summed in registers
    _tree_sum_kernel       adds the partial sums of keys that have several programs, in order

With p = exp(score - logsumexp), a score's gradient is p (grad . v - delta), delta = grad . o. Seven
products instead of five: both passes compute p and grad . v. The second has keys as the rows of its
tiles, so that its sums need no transposed operand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import ARCHITECTURES, AotConfig, AotConfigs, architecture_of
from socpo_fast.kernels._tree_plan import MIN_CHUNK, NUM_SLOTS, ROWS_PER_BLOCK
from socpo_fast.kernels._tree_tiles import (
    BLOCK_ROWS,
    LOG2_E,
    MODELS,
    TILES,
    launch_for,
    load_rows,
    rows_of_heads,
    store_rows,
    stride_in_heads,
    tile_of_queries,
)


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
    """The gradients of q, k and v; o and logsumexp as the forward gave them, the work of plan_tree.

    Memory: two numbers a row and head, and at most NUM_SLOTS partial sums of a block of keys.
    """
    (num_rows, heads, head_dim), kv_heads = q_THE.shape, k_TKE.shape[1]
    grads = [x.new_empty(x.shape) for x in (q_THE, k_TKE, v_TKE)]
    if num_rows == 0:
        return grads[0], grads[1], grads[2]
    launch = launch_for(architecture_of(q_THE), q_THE.dtype, heads, kv_heads, head_dim)
    tensors = [rows_of_heads(x) for x in (grad_o_THE, q_THE, k_TKE, v_TKE)]
    strides = [stride_in_heads(x) for x in tensors]
    visible_until_T = visible_until_T.contiguous()
    num_blocks = key_blocks_NM.shape[0]
    rows_2HT = logsumexp_TH.new_empty((2, heads, num_blocks * ROWS_PER_BLOCK))
    num_slots = NUM_SLOTS if num_blocks > MIN_CHUNK else 0
    partial_SK2NE = logsumexp_TH.new_empty((num_slots, kv_heads, 2, ROWS_PER_BLOCK, head_dim))
    with torch.cuda.device_of(q_THE):
        tile = launch.tiles.grad_q
        _tree_grad_q_kernel[num_blocks * launch.programs_by_queries(tile),](
            *tensors,
            o_THE,
            logsumexp_TH,
            visible_until_T,
            key_blocks_NM,
            grads[0],
            rows_2HT,
            *strides,
            num_rows,
            scale,
            **launch.by_queries(tile),
        )
        tile = launch.tiles.grad_kv
        programs = ROWS_PER_BLOCK // tile.keys * kv_heads
        _tree_grad_kv_kernel[query_ranges_P7.shape[0] * programs,](
            *tensors,
            rows_2HT,
            visible_until_T,
            query_ranges_P7,
            grads[1],
            grads[2],
            partial_SK2NE,
            *strides,
            num_rows,
            scale,
            **launch.by_keys(tile),
        )
        if num_slots > 0:
            grid = (query_ranges_P7.shape[0], kv_heads, 2)
            constants = {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
            _tree_sum_kernel[grid](partial_SK2NE, query_ranges_P7, grads[1], grads[2], num_rows, **constants)
    return grads[0], grads[1], grads[2]


def aot_configs() -> AotConfigs:
    """MODELS in every dtype; the sum for each head dim."""
    tables = dict.fromkeys(("visible_until_ptr", "key_blocks_ptr", "query_ranges_ptr"), torch.int32)
    wide = dict.fromkeys(("logsumexp_ptr", "rows_ptr", "partial_ptr"), torch.float32)
    for architecture in ARCHITECTURES:
        for dtype in TILES[architecture]:
            for heads, kv_heads, head_dim in MODELS:
                launch = launch_for(architecture, dtype, heads, kv_heads, head_dim)
                for kernel, options in (
                    (_tree_grad_q_kernel, launch.by_queries(launch.tiles.grad_q)),
                    (_tree_grad_kv_kernel, launch.by_keys(launch.tiles.grad_kv)),
                    (_tree_sum_kernel, {"KV_HEADS": kv_heads, "HEAD_DIM": head_dim}),
                ):
                    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
                    pointers = dict.fromkeys(names, dtype) | tables | wide
                    yield AotConfig(
                        kernel,
                        architecture,
                        dtype,
                        f"{heads} heads on {kv_heads} of {head_dim}",
                        options.pop("num_warps", 4),
                        {name: pointers[name] for name in names},
                        options,
                        num_stages=options.pop("num_stages", 3),
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
        key_blocks_ptr, num_rows, HEADS, PACK, BLOCK_M
    )
    offs_m = tl.arange(0, BLOCK_M)
    queries = first + offs_m // PACK
    heads = head + offs_m % PACK
    q = load_rows(q_ptr, first, head, stride_qt, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    grad = load_rows(grad_o_ptr, first, head, stride_dt, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    o = load_rows(o_ptr, first, head, HEADS, num_rows, True, PACK, BLOCK_M, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
    places = queries.to(tl.int64) * HEADS + heads
    logsumexp = tl.load(logsumexp_ptr + places, queries < num_rows, other=0.0) * LOG2_E
    # Whole blocks of rows, zeros beyond the last: the second pass reads them without a mask.
    stride_h = (tl.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS).to(tl.int64)
    places = heads * stride_h + queries
    tl.store(rows_ptr + places, logsumexp)
    tl.store(rows_ptr + HEADS * stride_h + places, delta)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, k_ptr, v_ptr, visible_until_ptr, list_ptr, 0, num_masked, queries,
        head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E, True, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    acc = _add_keys(
        acc, q, grad, logsumexp, delta, k_ptr, v_ptr, visible_until_ptr, list_ptr, num_masked, num_seen, queries,
        head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E, False, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    store_rows(grad_q_ptr, acc * scale, first, head, HEADS, num_rows, PACK, BLOCK_M, HEAD_DIM)


@triton.jit
def _add_keys(
    acc, q, grad, logsumexp, delta, k_ptr, v_ptr, visible_until_ptr, list_ptr, begin, end, queries,
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
        k = load_rows(k_ptr, first_key, kv_head, stride_kt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
        v = load_rows(v_ptr, first_key, kv_head, stride_vt, num_rows, IS_MASKED, 1, BLOCK_N, HEAD_DIM)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(qk * scale - logsumexp[:, None])
        if IS_MASKED:
            keys = first_key + tl.arange(0, BLOCK_N)
            until = tl.load(visible_until_ptr + keys, keys < num_rows, other=0)
            is_seen = (keys[None, :] <= queries[:, None]) & (queries[:, None] < until[None, :])
            p = tl.where(is_seen, p, 0.0)
        grad_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_qk = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_qk.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


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
):
    PARTS: tl.constexpr = BLOCK_ROWS.value // BLOCK_N
    kv_head = tl.program_id(0) % KV_HEADS
    part = tl.program_id(0) // KV_HEADS % PARTS
    query_ranges_ptr += (tl.program_id(0) // KV_HEADS // PARTS).to(tl.int64) * 7
    begin, end = tl.load(query_ranges_ptr + 1), tl.load(query_ranges_ptr + 2)
    if begin < end:
        first_key = tl.load(query_ranges_ptr) * BLOCK_ROWS + part * BLOCK_N
        full_begin, full_end = tl.load(query_ranges_ptr + 3), tl.load(query_ranges_ptr + 4)
        slot = tl.load(query_ranges_ptr + 5)
        keys = first_key + tl.arange(0, BLOCK_N)
        until = tl.load(visible_until_ptr + keys, keys < num_rows, other=0)
        k = load_rows(k_ptr, first_key, kv_head, stride_kt, num_rows, True, 1, BLOCK_N, HEAD_DIM)
        v = load_rows(v_ptr, first_key, kv_head, stride_vt, num_rows, True, 1, BLOCK_N, HEAD_DIM)
        grad_k = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        grad_v = tl.zeros((BLOCK_N, HEAD_DIM), tl.float32)
        # With a mask: the blocks of queries before the full ones, and those behind.
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr,
            begin, full_begin - begin, full_end - full_begin, end - full_end, kv_head,
            stride_dt, stride_qt, num_rows, scale * LOG2_E,
            True, KV_HEADS, GROUP, HEAD_DIM, BLOCK_M,
        )  # fmt: skip
        grad_k, grad_v = _add_queries(
            grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr,
            full_begin, full_end - full_begin, 0, 0, kv_head,
            stride_dt, stride_qt, num_rows, scale * LOG2_E,
            False, KV_HEADS, GROUP, HEAD_DIM, BLOCK_M,
        )  # fmt: skip
        grad_k *= scale
        if slot < 0:
            store_rows(grad_k_ptr, grad_k, first_key, kv_head, KV_HEADS, num_rows, 1, BLOCK_N, HEAD_DIM)
            store_rows(grad_v_ptr, grad_v, first_key, kv_head, KV_HEADS, num_rows, 1, BLOCK_N, HEAD_DIM)
        else:
            # Of a slot and a head: the rows of dK, then those of dV.
            row = ((slot * KV_HEADS + kv_head) * 2) * BLOCK_ROWS + part * BLOCK_N
            store_rows(partial_ptr, grad_k, row, 0, 1, row + BLOCK_N, 1, BLOCK_N, HEAD_DIM)
            row += BLOCK_ROWS
            store_rows(partial_ptr, grad_v, row, 0, 1, row + BLOCK_N, 1, BLOCK_N, HEAD_DIM)


@triton.jit
def _add_queries(
    grad_k, grad_v, k, v, keys, until, grad_o_ptr, q_ptr, rows_ptr, begin, num_before, num_skipped, num_behind, kv_head,
    stride_dt, stride_qt, num_rows, scale,
    IS_MASKED: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Adds to dK and dV what the queries of num_before blocks, and of num_behind after a gap, give."""
    PRECISION: tl.constexpr = "tf32x3" if k.dtype == tl.float32 else "ieee"
    PARTS: tl.constexpr = BLOCK_ROWS.value // BLOCK_M
    stride_h = (tl.cdiv(num_rows, BLOCK_ROWS) * BLOCK_ROWS).to(tl.int64)
    delta_ptr = rows_ptr + KV_HEADS * GROUP * stride_h
    for tile in range(0, (num_before + num_behind) * PARTS * GROUP):
        head = kv_head * GROUP + tile % GROUP
        part = tile // GROUP
        if IS_MASKED:
            part += tl.where(part < num_before * PARTS, 0, num_skipped * PARTS)
        first = begin * BLOCK_ROWS + part * BLOCK_M
        queries = first + tl.arange(0, BLOCK_M)
        places = head * stride_h + queries
        q = load_rows(q_ptr, first, head, stride_qt, num_rows, IS_MASKED, 1, BLOCK_M, HEAD_DIM)
        grad = load_rows(grad_o_ptr, first, head, stride_dt, num_rows, IS_MASKED, 1, BLOCK_M, HEAD_DIM)
        logsumexp = tl.load(rows_ptr + places)
        delta = tl.load(delta_ptr + places)
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(qk * scale - logsumexp[None, :])
        if IS_MASKED:
            is_seen = (keys[:, None] <= queries[None, :]) & (queries[None, :] < until[:, None])
            p = tl.where(is_seen, p, 0.0)
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
    query_ranges_ptr += tl.program_id(0) * 7
    block, begin, slot = tl.load(query_ranges_ptr), tl.load(query_ranges_ptr + 1), tl.load(query_ranges_ptr + 5)
    kv_head, is_v = tl.program_id(1), tl.program_id(2)
    # The part that begins with the keys themselves stands for all parts.
    if (slot >= 0) & (begin == block):
        acc = tl.zeros((BLOCK_ROWS, HEAD_DIM), tl.float32)
        for part in range(0, tl.load(query_ranges_ptr + 6)):
            row = (((slot + part) * KV_HEADS + kv_head) * 2 + is_v) * BLOCK_ROWS
            acc += load_rows(partial_ptr, row, 0, 1, 0, False, 1, BLOCK_ROWS, HEAD_DIM)
        grad_ptr = grad_k_ptr if is_v == 0 else grad_v_ptr
        store_rows(grad_ptr, acc, block * BLOCK_ROWS, kv_head, KV_HEADS, num_rows, 1, BLOCK_ROWS, HEAD_DIM)
