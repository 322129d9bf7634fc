"""Tests that siblings share the work on a split of their common keys.

They do so only where they may, and no result changes by it.
"""

from __future__ import annotations

import pytest
import torch

from socpo_fast.ops import available_impls
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.paged_cases import SPLIT, Case, assert_cpp_is_right, make_case, run

pytestmark = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def num_items(case: Case, *, cascade: bool) -> int:
    """Returns the number of work items of the call for each KV head."""
    group = case.q_THE.shape[1] // case.k_cache_PSKE.shape[2]
    page_size = case.k_cache_PSKE.shape[1]
    return torch.ops.socpo.paged_attention_items(*case[3:], page_size, group, cascade)


def siblings(
    seq_lens: list[int],
    *,
    shared: int,
    heads: int = 9,
    kv_heads: int = 3,
    page_size: int = 32,
    **options,
) -> Case:
    """Returns a decode of sequences that share the pages of their first `shared` tokens."""
    q_lens = [1] * len(seq_lens)
    return make_case(
        seq_lens,
        q_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        page_size=page_size,
        shared=shared,
        **options,
    )


# Eight siblings have 2 splits in common, and each has a third one of its own.
def test_shared_splits_become_one_item_each() -> None:
    case = siblings([2 * SPLIT + 10 + i for i in range(8)], shared=2 * SPLIT)
    assert num_items(case, cascade=False) == 8 * 3
    assert num_items(case, cascade=True) == 2 + 8


# In common: nothing; less than a split; a split whose last key one sibling does not see; a split
# and more.
@pytest.mark.parametrize(
    ("seq_lens", "shared", "expected"),
    [
        ([140, 140], 0, 4),
        ([SPLIT + 40] * 2, SPLIT - 32, 4),
        ([SPLIT - 1, SPLIT, SPLIT], SPLIT, 2),
        ([SPLIT + 80] * 3, SPLIT + 64, 1 + 3),
    ],
)
def test_only_whole_splits_that_all_see_are_shared(
    seq_lens: list[int], shared: int, expected: int
) -> None:
    case = siblings(seq_lens, shared=shared)
    if SPLIT - 1 in seq_lens:  # all pages shared; only lengths differ
        case = case._replace(block_table_BM=case.block_table_BM[:1].repeat(len(seq_lens), 1))
    assert num_items(case, cascade=True) == expected
    assert_bitwise_equal(run(case), run(case, cascade=False), name="cascade")


def test_rows_of_an_item_fit_its_scratch() -> None:
    """A work item takes at most 48 rows, or one sibling where that has more heads."""
    many = siblings([SPLIT] * 40, shared=SPLIT)
    assert num_items(many, cascade=True) == 3  # 16, 16 and 8 siblings of 3 heads: 48 rows at most
    assert_bitwise_equal(run(many), run(many, cascade=False), name="48 rows")
    wide = siblings([SPLIT] * 2, shared=SPLIT, heads=64, kv_heads=1)
    assert num_items(wide, cascade=True) == 2
    assert_bitwise_equal(run(wide), run(wide, cascade=False), name="64 heads of one KV head")


# Group sizes: one (multi-head attention), SmolLM2's three, a full register tile, eight. Pages:
# smaller and larger than a split.
@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_size"), [(2, 2, 16), (9, 3, 32), (6, 1, 1), (16, 2, 256)]
)
def test_cpp_is_as_right_and_bitwise_with_siblings(
    heads: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    """Shared splits keep the error rule; a sibling equals itself unshared and alone."""
    shared = -(-2 * SPLIT // page_size) * page_size
    seq_lens = [shared + num_own_tokens for num_own_tokens in (0, 1, 5, 100, SPLIT, 7, SPLIT + 3)]
    case = siblings(
        seq_lens, shared=shared, heads=heads, kv_heads=kv_heads, page_size=page_size, dtype=dtype
    )
    assert num_items(case, cascade=True) < num_items(case, cascade=False)
    assert_cpp_is_right(case)
    together_THE = run(case)
    assert_bitwise_equal(together_THE, run(case, cascade=False), name="cascade")
    for b, seq_len in enumerate(seq_lens):
        assert_bitwise_equal(
            run(case.part(b, b, b + 1, seq_len)), together_THE[b : b + 1], name=f"sibling {b} alone"
        )


def test_scattered_siblings_thread_invariant() -> None:
    """Siblings among other sequences give the same bits as without sharing, with any threads."""
    seq_lens = [300, 290, 200, 310, 320, 290, 299]
    q_lens = [1, 1, 30, 1, 1, 0, 1]
    case = make_case(seq_lens, q_lens, heads=9, kv_heads=3, head_dim=64, page_size=32, shared=288)
    apart_THE = run(case, cascade=False)
    old_num_threads = torch.get_num_threads()
    for threads in (1, 2, 3, 16):  # with 16, work is split into single heads
        torch.set_num_threads(threads)
        assert_bitwise_equal(run(case), apart_THE, name=f"{threads} threads")
    torch.set_num_threads(old_num_threads)
