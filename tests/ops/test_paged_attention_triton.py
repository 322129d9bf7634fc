"""Compares Triton's paged attention with fp64, and tests that cascade changes no bit.

On a CPU the kernels run in the interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels import paged_decode
from socpo_fast.kernels.paged_attention import paged_attention_triton
from socpo_fast.ops.paged_attention import paged_attention_ref
from socpo_fast.ops.prefix_groups import prefix_groups, ungrouped
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)
from tests.ops.test_paged_attention import Case, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLIT = 32 if DEVICE == "cpu" else 256


def run(case: Case, *, cascade: bool = True, **options: Any) -> Tensor:
    """Runs the kernels.

    max_seqlen_k is by default that of the block table, as in a captured graph.
    """
    groups = ungrouped(len(case.seq_lens_B))
    if cascade:
        groups = prefix_groups(
            case.block_table_BM.numpy(), case.seq_lens_B.numpy(), case.k_cache_PSKE.shape[1]
        )
    options |= {"groups_BG": torch.from_numpy(groups).to(DEVICE)}
    options = {"max_seqlen_k": case.block_table_BM.shape[1] * case.k_cache_PSKE.shape[1]} | options
    options = {
        "max_seqlen_q": int(case.cu_seqlens_q.diff().max()),
        "scale": case.q_THE.shape[-1] ** -0.5,
    } | options
    return paged_attention_triton(*(x.to(DEVICE) for x in case), **options).cpu()


def convert(case: Case, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> Case:
    """Returns the case with queries in `dtype` and caches in cache_dtype, by default the same."""
    caches = (x.to(cache_dtype or dtype) for x in case[1:3])
    return Case(case.q_THE.to(dtype), *caches, *case[3:])


def assert_right(case: Case, **options: Any) -> None:
    """Asserts the error rule."""
    dtype = case.q_THE.dtype
    scale = case.q_THE.shape[-1] ** -0.5
    plain = paged_attention_ref(*convert(case, dtype), scale=scale)
    truth = paged_attention_ref(*convert(case, torch.float64), scale=scale)
    assert_error_rule(run(case, **options), plain, truth, name="o_THE", dtype=dtype)


def sequence(case: Case, b: int) -> Case:
    """Returns a case of sequence b only."""
    begin, end = case.cu_seqlens_q[b : b + 2].tolist()
    table = case.block_table_BM[b : b + 1]
    seq_len = case.seq_lens_B[b : b + 1]
    cu_seqlens = torch.tensor([0, end - begin]).int()
    return Case(case.q_THE[begin:end], *case[1:3], table, seq_len, cu_seqlens)


# Groups of 3, 1, 4, 7, 1 and 2 heads. Head dims: powers of two, others, which are masked, and the
# largest.
HEADS = [(9, 3, 64), (2, 2, 80), (8, 2, 96), (7, 1, 128), (4, 4, 16), (2, 1, 256)]


# Pages: the smallest, more than a split, not a power of two. Lengths: one token, a tile of keys, a
# tile + 1, a chunk of a longer sequence, no queries, several tiles of rows.
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("page_size", [16, 64, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefill_is_as_right_as_plain_torch(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    assert_right(convert(make_case([1, 16, 17, 70, 40, 33], [1, 16, 1, 37, 0, 33], **sizes), dtype))


# Lengths: one token, a split - 1, a split, a split + 1, three splits, no queries, several splits.
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("page_size", [16, 64, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_is_as_right_as_plain_torch(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    seq_lens = [1, SPLIT - 1, SPLIT, SPLIT + 1, 3 * SPLIT, 5, 4 * SPLIT + 7]
    assert_right(
        convert(make_case(seq_lens, [1, 1, 1, 1, 1, 0, 1], **sizes), dtype), max_seqlen_q=1
    )


@pytest.mark.parametrize("q_lens", [[20, 1, 33], [1, 1, 1]])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
def test_pages_in_16_bits_are_read_as_fp32(q_lens: list[int], cache_dtype: torch.dtype) -> None:
    """16-bit pages beside fp32 queries compute like the same pages in fp32."""
    case = make_case([20, 90, 33], q_lens, heads=9, kv_heads=3, head_dim=64, page_size=16)
    case = convert(case, torch.float32, cache_dtype)
    assert_right(case)
    # On a card they run as three products of tf32: as right as fp32, but with other bits.
    wide = run(convert(case, torch.float32))
    assert_equal_across_variants(run(case), wide, device=DEVICE, name="o_THE")


@pytest.mark.parametrize("q_lens", [[70, 40], [1, 1]])
def test_large_scores_stay_finite(q_lens: list[int]) -> None:
    case = make_case([70, 40], q_lens, heads=3, kv_heads=1, head_dim=32, page_size=16)
    assert_right(case._replace(q_THE=case.q_THE * 1e4))


def test_prefill_batch_invariant() -> None:
    """A sequence prefilled alone equals it in a batch, with the same max_seqlen_q."""
    q_lens = [1, 17, 1, 33, 1, 20, 2, 1, 5, 1]
    case = make_case(
        [1, 90, 33, 64, 47, 20, 2, 100, 40, 32],
        q_lens,
        heads=9,
        kv_heads=3,
        head_dim=64,
        page_size=16,
    )
    batch = run(case)
    for b, (begin, end) in enumerate(
        zip(case.cu_seqlens_q[:-1].tolist(), case.cu_seqlens_q[1:].tolist(), strict=True)
    ):
        actual = run(sequence(case, b), max_seqlen_q=33)
        assert_bitwise_equal(actual, batch[begin:end], name=f"sequence {b}")


def test_decode_batch_invariant() -> None:
    """A decoded token does not depend on the other sequences.

    Sequences are compared at the same row of a tile: under the interpreter numpy's bits depend on
    the row. So only the first row of a tile is compared with the sequence alone.
    """
    case = make_case(
        [90, 33, 64, 47, 20, 2, 100, 40, 32, 70],
        [1] * 10,
        heads=9,
        kv_heads=3,
        head_dim=64,
        page_size=16,
    )
    together = run(case)
    for b in range(10):
        is_other = torch.arange(10) != b
        short = case._replace(seq_lens_B=case.seq_lens_B.masked_fill(is_other, 1))
        assert_bitwise_equal(run(short)[b], together[b], name=f"sequence {b} among short ones")
        if DEVICE == "cuda" or b in (0, 8):
            assert_bitwise_equal(
                run(sequence(case, b), max_seqlen_q=1)[0], together[b], name=f"sequence {b} alone"
            )


def test_loose_bound_and_empty_rows_change_no_bit() -> None:
    """A max_seqlen_k above all lengths changes nothing, and rows without a sequence give zeros.

    Both occur in a captured graph, whose batch has room for more and longer sequences.
    """
    case = make_case([90, 33, 64], [1, 1, 1], heads=4, kv_heads=2, head_dim=64, page_size=16)
    tight = run(case, max_seqlen_k=90)
    assert_bitwise_equal(run(case, max_seqlen_k=5000), tight, name="bound of 5000")
    case = case._replace(
        q_THE=torch.cat([case.q_THE, torch.full((1, 4, 64), torch.nan)]),
        block_table_BM=torch.cat([case.block_table_BM, torch.zeros_like(case.block_table_BM[:1])]),
        seq_lens_B=torch.tensor([90, 33, 64, 0]).int(),
        cu_seqlens_q=torch.arange(5).int(),
    )
    assert_bitwise_equal(
        run(case), torch.cat([tight, torch.zeros(1, 4, 64)]), name="with an empty place"
    )


def siblings(
    shared: list[int], seq_lens: list[int], heads: int = 8, kv_heads: int = 2, page_size: int = 16
) -> Case:
    """Returns a decode of sequences that share pages with the first one.

    The first shared[b] tokens of sequence b, in whole pages, are in the first sequence's pages.
    """
    case = make_case(
        seq_lens,
        [1] * len(seq_lens),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        page_size=page_size,
    )
    table_BM = case.block_table_BM.clone()
    for b, num_tokens in enumerate(shared):
        table_BM[b, : num_tokens // page_size] = table_BM[0, : num_tokens // page_size]
    return case._replace(block_table_BM=table_BM)


def apart(case: Case) -> Case:
    """Returns the same keys and values in pages that no two sequences share."""
    table_BM = case.block_table_BM
    caches = (cache[table_BM.flatten().long()] for cache in case[1:3])
    own_BM = torch.arange(table_BM.numel()).int().view_as(table_BM)
    return Case(case.q_THE, *caches, own_BM, *case[4:])


# Under the interpreter a block has 8 sequences for groups of up to 4 heads. Each case: shared
# tokens, lengths, and how many pairs (sequence, split) a program works on.
@pytest.mark.parametrize(
    ("shared", "seq_lens", "programs"),
    [
        # a full block and one that is not: two shared splits each, and 8 + 3 tails
        ([80] * 11, [90, 80, 81, 95, 96, 85, 88, 82, 90, 84, 91], 2 * 2 + 11),
        # one sequence shares only the first split
        ([64] * 5 + [32] + [64] * 2, [70] * 8, 1 + 8 + 8),
        # one sequence ends inside the second split, so each of the others reads that alone
        ([64] * 8, [70] * 3 + [40] + [70] * 4, 1 + 8 + 7),
        # nothing shared
        ([0] * 8, [70] * 8, 3 * 8),
        # a single sequence shares with itself
        ([64], [70], 3),
    ],
)
@pytest.mark.parametrize("page_size", [16, 32])
def test_cascade_reads_once_and_changes_no_bit(
    shared: list[int],
    seq_lens: list[int],
    programs: int,
    page_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One program reads a shared split, and results equal those of pages that are not shared."""
    case = siblings(shared, seq_lens, page_size=page_size)
    without = run(case, cascade=False)
    unshared = run(apart(case))
    if DEVICE == "cpu":
        calls = []
        attend = paged_decode.attend
        monkeypatch.setattr(
            paged_decode, "attend", lambda *args: [calls.append(1), attend(*args)][1]
        )
    shared_o = run(case)
    assert_right(case)
    if DEVICE == "cpu":
        # Each program that has work calls `attend` once.
        assert len(calls) == 2 * 2 * programs  # two runs, two KV heads
    assert_bitwise_equal(shared_o, unshared, name="o_THE beside pages that are not shared")
    assert_equal_across_variants(shared_o, without, device=DEVICE, name="o_THE without cascade")


def test_cascade_without_a_query_of_the_first() -> None:
    """The first sequence of a block leads the others even if it has no query itself."""
    case = siblings([64] * 8, [70] * 8)
    case = case._replace(
        q_THE=case.q_THE[2:], cu_seqlens_q=torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 6]).int()
    )
    assert_bitwise_equal(run(case), run(apart(case)), name="o_THE beside pages that are not shared")
    without = run(case, cascade=False)
    assert_equal_across_variants(run(case), without, device=DEVICE, name="o_THE without cascade")
    assert_right(case)


@pytest.mark.parametrize("heads", [2, 4, 6, 16])
def test_groups_of_any_rows_change_no_bit(heads: int) -> None:
    """Groups may consist of any rows of the batch.

    Nine siblings, more than a tile holds, and three other sequences are shuffled; some have ended.
    """
    shared = [96] * 9 + [0] * 3
    seq_lens = [97, 130, 96, 111, 128, 99, 140, 97, 100, 120, 64, 33]
    case = siblings(shared, seq_lens, heads=heads)
    expected = run(apart(case), cascade=False)
    for seed in range(3):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[: 12 - 2 * seed]
        shuffled = Case(
            case.q_THE[order],
            *case[1:3],
            case.block_table_BM[order],
            case.seq_lens_B[order],
            torch.arange(len(order) + 1).int(),
        )
        assert_bitwise_equal(run(shuffled), expected[order], name=f"order {seed}")


def test_no_tokens_and_strided_arguments() -> None:
    case = make_case([5, 9, 7], [2, 1, 7], heads=2, kv_heads=1, head_dim=64, page_size=16)
    q, lens, cu = (
        torch.stack([x, x.roll(1, 0)], 1)[:, 0]
        for x in (case.q_THE, case.seq_lens_B, case.cu_seqlens_q)
    )
    strided = run(case._replace(q_THE=q, seq_lens_B=lens, cu_seqlens_q=cu))
    assert_bitwise_equal(strided, run(case), name="strided")
    empty = case._replace(q_THE=case.q_THE[:0], cu_seqlens_q=torch.zeros(4).int())
    assert run(empty).shape == (0, 2, 64)
