"""Compares paged_attention with fp64.

Also tests that a query row depends on nothing but its own position and keys.
"""

from __future__ import annotations

import pytest
import torch

from socpo_fast.ops import available_impls
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.paged_attention import paged_attention_op
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.paged_cases import SPLIT, Case, assert_cpp_is_right, make_case, run

needs_cpp = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


# Groups: one to eight heads, more than a register tile, more than a block of rows. Head dims:
# below, at and above every vector width, those of real models, and multiples of 4 but not of 16.
@needs_cpp
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [
        (4, 4, 32),
        (9, 3, 64),
        (7, 1, 4),
        (6, 2, 12),
        (8, 1, 80),
        (5, 1, 96),
        (16, 2, 128),
        (8, 2, 256),
        (49, 1, 36),
    ],
)
# Pages: one token, one tile of keys, not a power of two.
# Lengths: one token, a tile, a tile + 1, a chunk of a longer sequence, no queries, several pages,
# two splits.
@pytest.mark.parametrize(
    ("page_size", "dtype"), [(1, torch.float32), (32, torch.bfloat16), (7, torch.float32)]
)
def test_cpp_is_as_right_as_plain_torch(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    seq_lens = [1, 32, 33, 100, 70, 5, 150]
    q_lens = [1, 32, 1, 37, 0, 5, 40]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    assert_cpp_is_right(make_case(seq_lens, q_lens, page_size=page_size, dtype=dtype, **shape))


# Context lengths around the ends of one and two splits, queried by one token and by many.
@needs_cpp
@DTYPES
@pytest.mark.parametrize("page_size", [16, 32, 256])
def test_cpp_is_as_right_about_the_edges_of_splits(page_size: int, dtype: torch.dtype) -> None:
    seq_lens = [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT - 1, 2 * SPLIT, 2 * SPLIT + 1]
    q_lens = [1] * 6 + [SPLIT - 1, 2, 2, 2 * SPLIT - 1, SPLIT, SPLIT + 2]
    case = make_case(
        seq_lens * 2, q_lens, heads=6, kv_heads=2, head_dim=64, page_size=page_size, dtype=dtype
    )
    assert_cpp_is_right(case)


# Scores of about 30 leave weight on a few keys, scores of 1e4 on one. There fp32 is off by 1e-3, so
# plain torch and the C++ may decide near ties differently.
@needs_cpp
@pytest.mark.parametrize(
    ("factor", "dtype"), [(30.0, torch.float32), (30.0, torch.bfloat16), (1e4, torch.float32)]
)
def test_cpp_is_as_right_with_peaked_scores(factor: float, dtype: torch.dtype) -> None:
    case = make_case(
        [70, 40, 400, 140],
        [70, 1, 1, 20],
        heads=3,
        kv_heads=1,
        head_dim=32,
        page_size=16,
        dtype=dtype,
    )
    assert_cpp_is_right(case._replace(q_THE=case.q_THE * factor))


def test_ref_is_causal_attention_of_the_last_tokens() -> None:
    case = make_case([40], [13], heads=6, kv_heads=2, head_dim=16, page_size=8)
    slots = torch.arange(40)
    k_KLE, v_KLE = (
        c[case.block_table_BM[0].long()[slots // 8], slots % 8].transpose(0, 1) for c in case[1:3]
    )
    mask_TL = torch.arange(40) <= torch.arange(27, 40)[:, None]
    q_HTE = case.q_THE.transpose(0, 1)
    expected_HTE = torch.nn.functional.scaled_dot_product_attention(
        q_HTE, k_KLE, v_KLE, mask_TL, enable_gqa=True
    )
    torch.testing.assert_close(run(case, "ref").transpose(0, 1), expected_HTE)


@needs_cpp
@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (9, 3, 64), (5, 1, 12)])
def test_chunks_and_decode_equal_prefill_bitwise(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """A prompt gives the same rows in one prefill, in chunks of any size and token by token."""
    seq_len = 2 * SPLIT + 45
    case = make_case(
        [seq_len],
        [seq_len],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=16,
        dtype=dtype,
    )
    prefill_THE = run(case)
    chunks = [
        (0, 1),
        (0, 33),
        (33, 64),
        (64, 2 * SPLIT + 1),
        (SPLIT - 1, SPLIT + 1),
        (SPLIT, 2 * SPLIT),
    ]
    for begin, end in [
        *chunks,
        *((t, t + 1) for t in (*range(0, seq_len, 9), SPLIT - 1, SPLIT, seq_len - 1)),
    ]:
        chunk_THE = run(case.part(0, begin, end, end))
        assert_bitwise_equal(chunk_THE, prefill_THE[begin:end], name=f"tokens {begin}:{end}")


@needs_cpp
def test_later_keys_change_no_bits() -> None:
    """NaN at position 150 changes nothing in the rows of earlier positions."""
    case = make_case([170], [170], heads=4, kv_heads=2, head_dim=32, page_size=16)
    before_THE = run(case)
    for cache in (case.k_cache_PSKE, case.v_cache_PSKE):
        cache[case.block_table_BM[0, 150 // 16].item(), 150 % 16] = torch.nan
    after_THE = run(case)
    assert after_THE[150:].isnan().all()
    assert_bitwise_equal(after_THE[:150], before_THE[:150], name="tokens before the NaN")


@needs_cpp
def test_batch_and_thread_invariant() -> None:
    """A sequence alone equals it in a batch, and so does any number of threads."""
    seq_lens = [1, 90, 33, 164, 47, 300]
    q_lens = [1, 1, 33, 20, 1, 1]
    case = make_case(seq_lens, q_lens, heads=9, kv_heads=3, head_dim=64, page_size=32)
    old_num_threads = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 16):  # with 16, work is split into single heads
        torch.set_num_threads(threads)
        results.append(run(case))
    torch.set_num_threads(old_num_threads)
    for threads, result in zip((2, 3, 16), results[1:], strict=True):
        assert_bitwise_equal(result, results[0], name=f"{threads} threads")
    for b, (begin, end) in enumerate(
        zip(case.cu_seqlens_q[:-1].tolist(), case.cu_seqlens_q[1:].tolist(), strict=True)
    ):
        alone_THE = run(case.part(b, begin, end, seq_lens[b]))
        assert_bitwise_equal(alone_THE, results[0][begin:end], name=f"sequence {b}")


@needs_cpp
def test_strided_lengths_equal_their_copies() -> None:
    case = make_case([5, 9, 7], [2, 1, 7], heads=2, kv_heads=1, head_dim=8, page_size=4)
    strided = [torch.stack([x, x.roll(1)], 1)[:, 0] for x in (case.seq_lens_B, case.cu_seqlens_q)]
    actual = run(case._replace(seq_lens_B=strided[0], cu_seqlens_q=strided[1]))
    assert_bitwise_equal(actual, run(case), name="output")


@needs_cpp
def test_order_of_pages_does_not_matter() -> None:
    case = make_case([70, 245], [3, 1], heads=4, kv_heads=2, head_dim=32, page_size=8)
    order = torch.arange(len(case.k_cache_PSKE)).flip(0)
    moved = case._replace(
        k_cache_PSKE=case.k_cache_PSKE[order],
        v_cache_PSKE=case.v_cache_PSKE[order],
        block_table_BM=(len(order) - 1 - case.block_table_BM).int(),
    )
    assert_bitwise_equal(run(moved), run(case), name="moved pages")


def test_no_query_tokens_no_rows() -> None:
    case = make_case([3, 9], [0, 0], heads=2, kv_heads=1, head_dim=8, page_size=4)
    assert run(case, "auto").shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_op_is_the_same_unchecked(dtype: torch.dtype) -> None:
    """The registered op gives the same bits as the public function, which checks its arguments."""
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    case = case._replace(
        q_THE=case.q_THE.to(dtype), k_cache_PSKE=case[1].to(dtype), v_cache_PSKE=case[2].to(dtype)
    )
    impl = pick_impl("paged_attention", "auto", case.q_THE)
    unchecked_THE = paged_attention_op(*case, 2, 10, None, 8**-0.5, False, impl)
    assert_bitwise_equal(unchecked_THE, run(case, "auto"), name="output")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"block_table_BM": torch.full((2, 3), 99, dtype=torch.int32)},
            "block_table_BM must be in",
        ),
        ({"seq_lens_B": torch.tensor([25, 3], dtype=torch.int32)}, "seq_lens_B must be in"),
        ({"seq_lens_B": torch.tensor([1, 3], dtype=torch.int32)}, "seq_lens_B must be in"),
        (
            {"cu_seqlens_q": torch.tensor([0, 2, 4], dtype=torch.int32)},
            "cu_seqlens_q must be int32",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 2, 3])}, "cu_seqlens_q must be int32"),
        ({"q_THE": torch.zeros(3, 3, 8)}, "H must be a multiple of K=2"),
        (
            {"q_THE": torch.zeros(3, 4, 16)},
            r"k_cache_PSKE must be float32/bfloat16 \[P, S, K, E=16\]",
        ),
        (
            {"q_THE": torch.zeros(3, 4, 8).double()},
            r"k_cache_PSKE must be float64 \[P, S, K, E=8\]",
        ),
        (
            {"v_cache_PSKE": torch.zeros(6, 8, 2, 8).bfloat16()},
            r"v_cache_PSKE must be float32 \[P=6, S=8, K=2, E=8\]",
        ),
    ],
)
def test_out_of_bounds_reads_are_refused(change: dict, message: str) -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    with pytest.raises(ValueError, match=f"paged_attention: {message}"):
        run(case._replace(**change), impl="auto")


def test_other_dtypes_are_refused_by_cpp() -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8)
    halves = Case(*(x.bfloat16() if x.is_floating_point() else x for x in case))
    assert run(halves, "auto").dtype == torch.bfloat16
    with pytest.raises(
        ValueError,
        match="paged_attention: impl must be one of auto, ref, triton, flash for bfloat16, got "
        "'cpp'",
    ):
        run(halves, "cpp")


@needs_cpp
@DTYPES
def test_the_registered_op_keeps_its_schema(dtype: torch.dtype) -> None:
    case = make_case([10, 3], [2, 1], heads=4, kv_heads=2, head_dim=8, page_size=8, dtype=dtype)
    finite = [x.nan_to_num() for x in case]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.socpo.paged_attention.default, (*finite, 0.3), test_utils=tests)
