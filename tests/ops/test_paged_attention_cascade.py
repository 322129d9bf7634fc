"""Siblings share the keys of a split: that they do, only where they may, and that no bit tells."""

from __future__ import annotations

import pytest
import torch

from socpo_fast.ops._impl import extension_is_built
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.paged_cases import SPLIT, Case, assert_cpp_is_right, make_case, run

pytestmark = pytest.mark.skipif(not extension_is_built(), reason="extension not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def num_items(case: Case, *, cascade: bool) -> int:
    """Work items a KV head of the call falls into."""
    group = case.q_THE.shape[1] // case.k_cache_PSKE.shape[2]
    page_size = case.k_cache_PSKE.shape[1]
    return torch.ops.socpo.paged_attention_items(*case[3:], page_size, group, cascade)


def siblings(
    lengths: list[int],
    *,
    shared: int,
    heads: int = 9,
    kv_heads: int = 3,
    page_size: int = 32,
    **options,
) -> Case:
    q_lens = [1] * len(lengths)
    return make_case(
        lengths,
        q_lens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        page_size=page_size,
        shared=shared,
        **options,
    )


# Eight siblings with one KV head: 2 splits in common, and a third that everybody has for itself.
def test_shared_splits_become_one_item_each() -> None:
    case = siblings([2 * SPLIT + 10 + i for i in range(8)], shared=2 * SPLIT)
    assert num_items(case, cascade=False) == 8 * 3
    assert num_items(case, cascade=True) == 2 + 8


# In common: nothing, not a whole split, a split of which one sibling does not see the last key, a
# split and some more.
@pytest.mark.parametrize(
    ("lengths", "shared", "expected"),
    [
        ([140, 140], 0, 4),
        ([SPLIT + 40] * 2, SPLIT - 32, 4),
        ([SPLIT - 1, SPLIT, SPLIT], SPLIT, 2),
        ([SPLIT + 80] * 3, SPLIT + 64, 1 + 3),
    ],
)
def test_only_whole_splits_that_all_see_are_shared(
    lengths: list[int], shared: int, expected: int
) -> None:
    case = siblings(lengths, shared=shared)
    if SPLIT - 1 in lengths:  # pages in common do not help where a sibling's keys end
        case = case._replace(block_table_BM=case.block_table_BM[:1].repeat(len(lengths), 1))
    assert num_items(case, cascade=True) == expected
    assert_bitwise_equal(run(case), run(case, cascade=False), name="cascade")


def test_an_item_takes_no_more_rows_than_its_scratch_is_made_for() -> None:
    many = siblings([SPLIT] * 40, shared=SPLIT)
    assert num_items(many, cascade=True) == 3  # 16, 16 and 8 siblings of 3 heads: 48 rows at most
    assert_bitwise_equal(run(many), run(many, cascade=False), name="48 rows")
    wide = siblings([SPLIT] * 2, shared=SPLIT, heads=64, kv_heads=1)
    assert num_items(wide, cascade=True) == 2
    assert_bitwise_equal(run(wide), run(wide, cascade=False), name="64 heads of one KV head")


# Group sizes: plain multi-head, SmolLM2, one full register tile, eight. Pages: smaller and larger
# than a split.
@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "page_size"), [(2, 2, 16), (9, 3, 32), (6, 1, 1), (16, 2, 256)]
)
def test_cpp_is_as_right_and_has_the_same_bits_with_siblings(
    heads: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    shared = -(-2 * SPLIT // page_size) * page_size
    lengths = [shared + own for own in (0, 1, 5, 100, SPLIT, 7, SPLIT + 3)]
    case = siblings(
        lengths, shared=shared, heads=heads, kv_heads=kv_heads, page_size=page_size, dtype=dtype
    )
    assert num_items(case, cascade=True) < num_items(case, cascade=False)
    assert_cpp_is_right(case)
    together_THE = run(case)
    assert_bitwise_equal(together_THE, run(case, cascade=False), name="cascade")
    for b, length in enumerate(lengths):
        assert_bitwise_equal(
            run(case.part(b, b, b + 1, length)), together_THE[b : b + 1], name=f"sibling {b} alone"
        )


def test_siblings_between_other_sequences_have_the_same_bits_with_any_threads() -> None:
    lengths = [300, 290, 200, 310, 320, 290, 299]
    q_lens = [1, 1, 30, 1, 1, 0, 1]
    case = make_case(lengths, q_lens, heads=9, kv_heads=3, head_dim=64, page_size=32, shared=288)
    apart_THE = run(case, cascade=False)
    num_threads = torch.get_num_threads()
    for threads in (1, 2, 3, 16):  # with 16, single heads are dealt
        torch.set_num_threads(threads)
        assert_bitwise_equal(run(case), apart_THE, name=f"{threads} threads")
    torch.set_num_threads(num_threads)
