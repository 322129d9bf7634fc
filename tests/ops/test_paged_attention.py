"""paged_attention against fp64, and that a query row's bits depend on nothing but its own position and keys."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import paged_attention
from socpo_fast.ops._impl import extension_is_built
from socpo_fast.ops.paged_attention import paged_attention_ref
from tests.error_rule import assert_bitwise_equal, assert_error_rule

needs_cpp = pytest.mark.skipif(not extension_is_built(), reason="extension not built")


class Case(NamedTuple):
    """Arguments of the op, and the keys and values as they stand in sequence order."""

    q_THE: Tensor
    k_cache_PSKE: Tensor
    v_cache_PSKE: Tensor
    block_table_BM: Tensor
    seq_lens_B: Tensor
    cu_seqlens_q: Tensor


def make_case(
    seq_lens: list[int], q_lens: list[int], *, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> Case:
    """Random keys in shuffled pages; pages and slots that must not be read hold NaN."""
    generator = torch.Generator().manual_seed(sum(seq_lens) + head_dim)
    width = -(-max(seq_lens) // page_size) + 1
    num_pages = len(seq_lens) * width
    caches = [torch.full((num_pages, page_size, kv_heads, head_dim), torch.nan) for _ in range(2)]
    table_BM = torch.randperm(num_pages, generator=generator).view(len(seq_lens), width)
    for pages_M, seq_len in zip(table_BM, seq_lens, strict=True):
        for cache in caches:
            slots = torch.arange(seq_len)
            values = torch.randn(seq_len, kv_heads, head_dim, generator=generator)
            cache[pages_M[slots // page_size], slots % page_size] = values
    q_THE = torch.randn(sum(q_lens), heads, head_dim, generator=generator)
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).int()
    return Case(q_THE, *caches, table_BM.int(), torch.tensor(seq_lens).int(), cu_seqlens_q)


def run(case: Case, impl: str = "cpp") -> Tensor:
    return paged_attention(*case, scale=case.q_THE.shape[-1] ** -0.5, impl=impl)


# Heads: one group, plain multi-head, SmolLM2, a prime group. Widths: one below, at, and above every vector width.
@needs_cpp
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 4, 32), (9, 3, 64), (7, 1, 4), (6, 2, 12), (2, 1, 20), (8, 2, 256)]
)
# Pages: one token a page, one tile of keys, not a power of two.
# Lengths: one token, a tile, a tile + 1, a chunk of a longer one, nothing queried, several pages.
@pytest.mark.parametrize("page_size", [1, 32, 7])
def test_cpp_is_as_right_as_plain_torch(heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    case = make_case(
        [1, 32, 33, 100, 70, 5],
        [1, 32, 1, 37, 0, 5],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
    scale = head_dim**-0.5
    doubles = [x.double() if x.is_floating_point() else x for x in case]
    truth_THE = paged_attention_ref(*doubles, scale=scale)
    assert_error_rule(run(case), run(case, "ref"), truth_THE, name="o_THE", dtype=torch.float32)


def test_ref_is_causal_attention_of_the_last_tokens() -> None:
    case = make_case([40], [13], heads=6, kv_heads=2, head_dim=16, page_size=8)
    slots = torch.arange(40)
    k_KLE, v_KLE = (c[case.block_table_BM[0].long()[slots // 8], slots % 8].transpose(0, 1) for c in case[1:3])
    mask_TL = torch.arange(40) <= torch.arange(27, 40)[:, None]
    q_HTE = case.q_THE.transpose(0, 1)
    expected_HTE = torch.nn.functional.scaled_dot_product_attention(q_HTE, k_KLE, v_KLE, mask_TL, enable_gqa=True)
    torch.testing.assert_close(run(case, "ref").transpose(0, 1), expected_HTE)


@needs_cpp
def test_large_scores_stay_finite() -> None:
    case = make_case([70, 40], [70, 1], heads=3, kv_heads=1, head_dim=32, page_size=16)
    case = case._replace(q_THE=case.q_THE * 1e4)
    doubles = [x.double() if x.is_floating_point() else x for x in case]
    truth_THE = paged_attention_ref(*doubles, scale=32**-0.5)
    assert_error_rule(run(case), run(case, "ref"), truth_THE, name="o_THE", dtype=torch.float32)


@needs_cpp
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (9, 3, 64), (5, 1, 12)])
def test_prefill_chunks_and_decode_give_the_same_bits(heads: int, kv_heads: int, head_dim: int) -> None:
    case = make_case([101], [101], heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=16)
    whole_THE = run(case)
    for begin, end in [(0, 1), (0, 33), (33, 64), (64, 100), (100, 101), *((t, t + 1) for t in range(0, 101, 9))]:
        part = case._replace(
            q_THE=case.q_THE[begin:end],
            seq_lens_B=torch.tensor([end]).int(),
            cu_seqlens_q=torch.tensor([0, end - begin]).int(),
        )
        assert_bitwise_equal(run(part), whole_THE[begin:end], name=f"tokens {begin}:{end}")


@needs_cpp
def test_a_sequence_alone_has_the_bits_of_the_sequence_in_a_batch_with_any_threads() -> None:
    seq_lens, q_lens = [1, 90, 33, 64, 47], [1, 1, 33, 20, 1]
    case = make_case(seq_lens, q_lens, heads=9, kv_heads=3, head_dim=64, page_size=32)
    num_threads = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(case))
    torch.set_num_threads(num_threads)
    assert_bitwise_equal(results[1], results[0], name="2 threads")
    assert_bitwise_equal(results[2], results[0], name="3 threads")
    for b, (begin, end) in enumerate(zip(case.cu_seqlens_q[:-1].tolist(), case.cu_seqlens_q[1:].tolist(), strict=True)):
        alone = case._replace(
            q_THE=case.q_THE[begin:end],
            block_table_BM=case.block_table_BM[b : b + 1],
            seq_lens_B=case.seq_lens_B[b : b + 1],
            cu_seqlens_q=torch.tensor([0, end - begin]).int(),
        )
        assert_bitwise_equal(run(alone), results[0][begin:end], name=f"sequence {b}")


@needs_cpp
def test_strided_lengths_equal_their_copies() -> None:
    case = make_case([5, 9, 7], [2, 1, 7], heads=2, kv_heads=1, head_dim=8, page_size=4)
    strided = [torch.stack([x, x.roll(1)], 1)[:, 0] for x in (case.seq_lens_B, case.cu_seqlens_q)]
    actual = run(case._replace(seq_lens_B=strided[0], cu_seqlens_q=strided[1]))
    assert_bitwise_equal(actual, run(case), name="output")


@needs_cpp
def test_which_pages_hold_the_keys_does_not_matter() -> None:
    case = make_case([70, 45], [3, 1], heads=4, kv_heads=2, head_dim=32, page_size=8)
    order = torch.arange(len(case.k_cache_PSKE)).flip(0)
    moved = case._replace(
        k_cache_PSKE=case.k_cache_PSKE[order],
        v_cache_PSKE=case.v_cache_PSKE[order],
        block_table_BM=(len(order) - 1 - case.block_table_BM).int(),
    )
    assert_bitwise_equal(run(moved), run(case), name="moved pages")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table_BM": torch.full((2, 3), 99, dtype=torch.int32)}, "block_table_BM must be in"),
        ({"seq_lens_B": torch.tensor([25, 3], dtype=torch.int32)}, "seq_lens_B must be in"),
        ({"seq_lens_B": torch.tensor([1, 3], dtype=torch.int32)}, "seq_lens_B must be in"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32)}, "cu_seqlens_q must be int32"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 3])}, "cu_seqlens_q must be int32"),
        ({"q_THE": torch.zeros(3, 3, 8)}, "H must be a multiple of K=2"),
        ({"q_THE": torch.zeros(3, 4, 16)}, r"k_cache_PSKE must be float32 \[P, S, K, E=16\]"),
    ],
)
def test_what_would_read_out_of_bounds_is_refused(change: dict, message: str) -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        run(case._replace(**change), impl="auto")


def test_other_dtypes_run_the_reference_only() -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    halves = Case(*(x.bfloat16() if x.is_floating_point() else x for x in case))
    assert run(halves, "auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="paged_attention: impl must be one of auto, ref, got 'cpp'"):
        run(halves, "cpp")


@needs_cpp
def test_the_registered_op_keeps_its_schema() -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    finite = [x.nan_to_num() for x in case]
    torch.library.opcheck(torch.ops.socpo.paged_attention.default, (*finite, 0.3), test_utils="test_schema")
