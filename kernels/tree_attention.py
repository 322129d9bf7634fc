"""Computes attention over the packed rows of a tree on a GPU: the forward.

Read top-down: tree_attention is the launch, _tree_attention_kernel a program, _attend its loop. The
backward is in kernels/tree_backward.py. A program has a tile of queries, of two heads where these
share their keys, and the list of the blocks of keys that they see (kernels/_tree_plan.py):

    list of blocks of keys:   [ masked, masked, .. | full, full, full, .. ]
    calls of _attend:           with a mask          without one

Departures from flash attention:

- A program goes through this list instead of all keys up to the diagonal.
- The running maximum starts from the lowest finite number instead of -inf. So a row that sees no
  key of a tile needs no special case: -inf - -inf would be NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import AotConfigs
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
from socpo_fast.kernels.tree_backward import tree_attention_backward

__all__ = ["tree_attention", "tree_attention_backward"]

_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


def tree_attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    visible_until_T: Tensor,
    key_blocks_NM: Tensor,
    query_ranges_P7: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns o [T, H, E] in q's dtype and logsumexp [T, H] fp32, as in ops/tree_attention.py.

    Args: as there, with a head dim of HEAD_DIMS, and the two tables of plan_tree.
    """
    o_THE = q_THE.new_empty(q_THE.shape)
    logsumexp_TH = q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)
    if q_THE.shape[0] == 0:
        return o_THE, logsumexp_TH
    launch = launch_of(q_THE, k_TKE)
    tile = launch.tiles.forward
    qkv = [rows_of_heads(x) for x in (q_THE, k_TKE, v_TKE)]
    with torch.cuda.device_of(q_THE):
        _tree_attention_kernel[key_blocks_NM.shape[0] * launch.programs_by_queries(tile),](
            *qkv,
            aligned(visible_until_T.contiguous()),
            key_blocks_NM,
            o_THE,
            logsumexp_TH,
            *(stride_in_heads(x) for x in qkv),
            q_THE.shape[0],
            scale,
            **launch.by_queries(tile),
        )
    return o_THE, logsumexp_TH


def aot_configs() -> AotConfigs:
    """Yields the launch above for the models of _tree_tiles.py."""
    yield from aot_configs_of(
        _tree_attention_kernel,
        lambda launch: launch.by_queries(launch.tiles.forward),
    )


@triton.jit
def _tree_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    visible_until_ptr,
    key_blocks_ptr,
    o_ptr,
    logsumexp_ptr,
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
    """Computes output and logsumexp of a tile of queries."""
    first_head, list_ptr, first_query, num_masked, num_seen = tile_of_queries(
        key_blocks_ptr,
        num_rows,
        HEADS,
        PACK,
        BLOCK_M,
    )
    offs_m = tl.arange(0, BLOCK_M)
    queries = first_query + offs_m // PACK
    # Rows of the tile beyond the tree's last row see what that one sees: no l_i is 0.
    queries = tl.minimum(queries, num_rows - 1)
    q = load_rows(
        q_ptr, first_query, first_head, stride_qt, num_rows, True, PACK, BLOCK_M, HEAD_DIM
    )
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    m_i = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        0, num_masked, first_head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        True, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, q, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr,
        num_masked, num_seen, first_head // GROUP, stride_kt, stride_vt, num_rows, scale * LOG2_E,
        False, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    store_rows(
        o_ptr, acc / l_i[:, None], first_query, first_head, HEADS, num_rows, PACK, BLOCK_M, HEAD_DIM
    )
    queries = first_query + offs_m // PACK
    offs = queries.to(tl.int64) * HEADS + first_head + offs_m % PACK
    tl.store(logsumexp_ptr + offs, (m_i + tl.log2(l_i)) * _LN_2, queries < num_rows)


@triton.jit
def _attend(
    acc, l_i, m_i, q, queries, k_ptr, v_ptr, visible_until_ptr, list_ptr, begin, end,
    kv_head, stride_kt, stride_vt, num_rows, scale,
    IS_MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Continues an online softmax over the blocks of keys begin .. end - 1 of a list.

    m_i and scale are in powers of 2: scale has the factor log2 e.
    """
    # fp32 is multiplied on the tensor cores as three products of tf32. 16-bit inputs ignore this.
    PRECISION: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "ieee"
    TILES_PER_BLOCK: tl.constexpr = BLOCK_ROWS.value // BLOCK_N
    block = tl.load(list_ptr + begin)
    for tile in range(begin * TILES_PER_BLOCK, end * TILES_PER_BLOCK):
        first_key = block * BLOCK_ROWS + tile % TILES_PER_BLOCK * BLOCK_N
        # Loads the next tile's block number one tile ahead. If it were loaded at the top of the
        # next iteration, the loads of k and v would have to wait for it, and the compiler could not
        # start them before they are needed.
        block = tl.load(list_ptr + (tile + 1) // TILES_PER_BLOCK)
        k, v = load_keys_and_values(
            k_ptr, v_ptr, first_key, kv_head, stride_kt, stride_vt, num_rows,
            IS_MASKED, BLOCK_N, HEAD_DIM,
        )  # fmt: skip
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_MASKED:
            keys = first_key + tl.arange(0, BLOCK_N)
            until = tl.load(visible_until_ptr + keys, keys < num_rows, other=0)
            mask = is_seen(queries[:, None], keys[None, :], until[None, :])
            qk = tl.where(mask, qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        p = tl.exp2(qk * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    return acc, l_i, m_i
