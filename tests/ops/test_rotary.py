"""Compares rotary and rotary_write with fp64.

Also tests that tokens are batch-invariant, and where keys and values end up.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from socpo_fast.model.decoder import rotary_tables
from socpo_fast.ops import rotary, rotary_write
from socpo_fast.ops.rotary import rotary_ref
from socpo_fast.ops.rotary_write import rotary_write_ref
from tests.helpers.elementwise import (
    DEVICE,
    KERNELS,
    assert_as_right_as_ref,
    assert_batch_invariant,
    assert_same_bits,
    needs_cpp,
    randn,
    thread_counts,
    values_and_gradients,
)
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)

IMPLS = [pytest.param("cpp", marks=needs_cpp), "triton"]
# (tokens, heads, head_dim): one pair; less than a vector; SmolLM2; vectors with a tail and more
# heads than a tile; no token; Qwen3.
SHAPES = [(5, 1, 2), (9, 3, 6), (97, 9, 64), (7, 37, 36), (0, 4, 64), (3, 2, 128)]


def tables(num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of shuffled positions, some of them large."""
    positions = (
        torch.randperm(4 * num_tokens, generator=torch.Generator().manual_seed(0))[:num_tokens] * 7
    )
    return rotary_tables(positions, 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim))


def device_of(impl: str) -> str:
    return DEVICE if impl == "triton" else "cpu"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), KERNELS)
def test_as_right_as_ref(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    cos, sin = tables(shape[0], shape[2])
    device = device_of(impl)
    assert_as_right_as_ref(
        lambda x: rotary(x, cos.to(device), sin.to(device), impl=impl),
        lambda x: rotary_ref(x, cos, sin),
        [randn(*shape)],
        dtype,
        device,
        scales=[4.0, 4.0],
    )


def test_ref_gradcheck_and_rotation_by_hand() -> None:
    """The reference rotates pairs as complex numbers, and its gradient is right."""
    cos, sin = tables(3, 6)
    x = randn(3, 2, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    out = rotary_ref(x, cos, sin)
    for pair in range(3):  # as in Hugging Face, i is paired with i + E / 2
        rotation = torch.polar(
            torch.ones(3).double(), torch.atan2(sin[:, pair].double(), cos[:, pair].double())
        )
        expected = torch.complex(x[:, :, pair], x[:, :, pair + 3]) * rotation[:, None]
        torch.testing.assert_close(
            torch.complex(out[:, :, pair], out[:, :, pair + 3]), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_and_thread_invariant(impl: str) -> None:
    """Tokens alone equal them in a batch, and C++ outputs and gradients are thread-invariant."""
    num_tokens = 400 if impl == "cpp" else 30
    cos, sin = (x.to(device_of(impl)) for x in tables(num_tokens, 36))
    x = randn(num_tokens, 5, 36)

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return rotary(x, cos, sin, impl=impl)

    device = device_of(impl)
    rotate = partial(rotary, impl=impl)
    all_tokens = values_and_gradients(run, [x], torch.float32, device)
    inputs = [x.to(device), cos, sin]
    for rows in (slice(0, 1), slice(num_tokens - 1, None), slice(3, 20), slice(1, None)):
        assert_batch_invariant(rotate, inputs, all_tokens[:1], rows, device)
    for num_threads in thread_counts() if impl == "cpp" else ():
        again = values_and_gradients(run, [x], torch.float32, "cpu")
        assert_same_bits(again, all_tokens, f"{num_threads} threads")


@pytest.mark.parametrize("impl", IMPLS)
def test_slices_of_heads_and_other_strides(impl: str) -> None:
    cos, sin = (x.to(device_of(impl)) for x in tables(10, 12))
    qkv = randn(10, 7, 12).to(device_of(impl))
    for x in (
        qkv[:, :5],
        qkv[:, 2:4],
        qkv[:, 6:],
        qkv[:, ::2],
        qkv.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_same_bits(
            [rotary(x, cos, sin, impl=impl)],
            [rotary(x.contiguous(), cos, sin, impl=impl)],
            "strided",
        )


def write_case(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, page_size: int
) -> tuple[Tensor, ...]:
    """Returns qkv, tables, caches full of NaN, and shuffled slots.

    Every third slot is negative: its token is written nowhere.
    """
    num_pages = 2 * num_tokens // page_size + 1
    caches = [torch.full((num_pages, page_size, kv_heads, head_dim), torch.nan) for _ in range(2)]
    slots = torch.randperm(num_pages * page_size, generator=torch.Generator().manual_seed(1))[
        :num_tokens
    ]
    slots[::3] = -1
    return (
        randn(num_tokens, heads + 2 * kv_heads, head_dim),
        *tables(num_tokens, head_dim),
        *caches,
        slots,
    )


# (heads, KV heads, head dim, page size): SmolLM2; groups of one head, and pages of 7 tokens; a
# group of 7 with 11 pairs a head, and pages of one token.
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(9, 3, 64, 16), (4, 4, 6, 7), (7, 1, 22, 1)])
@pytest.mark.parametrize("num_tokens", [0, 1, 97])
@pytest.mark.parametrize("impl", IMPLS)
def test_write(
    impl: str, num_tokens: int, heads: tuple[int, int, int, int], cache_dtype: torch.dtype
) -> None:
    """q is rotated, and the caches hold rotated keys and values, rounded to nearest even.

    Slots that are not written keep their NaN.
    """
    qkv, cos, sin, k_cache, v_cache, slots = write_case(num_tokens, *heads)
    device = device_of(impl)
    caches = (k_cache.to(cache_dtype), v_cache.to(cache_dtype))
    moved = [x.to(device) for x in (qkv, cos, sin, *caches, slots)]
    q = rotary_write(*moved, impl=impl)
    num_heads = heads[0]
    kv_heads = heads[1]
    q_new, k_new = rotary(moved[0][:, :-kv_heads], *moved[1:3], impl=impl).split(
        (num_heads, kv_heads), dim=1
    )
    v_new = qkv[:, num_heads + kv_heads :]
    # rotary is another kernel with the same formula, so they may differ in last bits on a card.
    assert_rotated_alike = partial(assert_equal_across_variants, device=device, scale=4.0)
    assert_rotated_alike(q, q_new, name="q")
    for name, old_cache, new_cache, rows in (
        ("k", k_cache, moved[3], k_new),
        ("v", v_cache, moved[4], v_new),
    ):
        expected = old_cache.clone()
        expected.flatten(0, 1)[slots[slots >= 0]] = rows.cpu()[slots >= 0]
        if impl == "triton" and cache_dtype == torch.bfloat16 and DEVICE == "cpu":
            # Triton's interpreter truncates to bf16 instead of rounding.
            torch.testing.assert_close(
                new_cache.float(), expected, rtol=2**-7, atol=0, equal_nan=True
            )
        else:
            compare = assert_rotated_alike if name == "k" else assert_bitwise_equal
            compare(new_cache, expected.to(cache_dtype), name=name)


def test_ref_and_halves_write_too() -> None:
    """The reference and half precision write too, to pages of the same dtype.

    q is compared with the reference in fp64; all slots that are not negative are written.
    """
    qkv, cos, sin, k_cache, v_cache, slots = write_case(20, 4, 2, 8, 4)
    truth = rotary_write_ref(
        *(x.double() for x in (qkv, cos, sin)), k_cache.double(), v_cache.double(), slots
    )
    for impl, dtype in (
        ("ref", torch.float16),
        ("triton", torch.float16),
        ("ref", torch.bfloat16),
        ("auto", None),
    ):
        device = device_of(impl)
        dtype = dtype or torch.float64
        moved = [
            x.to(device)
            for x in (qkv.to(dtype), cos, sin, k_cache.to(dtype), v_cache.to(dtype), slots)
        ]
        q = rotary_write(*moved, impl=impl)
        assert_error_rule(q, truth.to(dtype), truth, name=f"q {impl}")
        assert moved[3].isfinite().flatten(0, 1).all(-1).all(-1).sum() == (slots >= 0).sum()


@needs_cpp
def test_bf16_pages_round_to_even_and_keep_inf_and_nan() -> None:
    values = [
        1.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
        3.4e38,
        -3.4e38,
        torch.inf,
        -torch.inf,
        torch.nan,
        1e-40,
    ]
    v = torch.tensor([values])
    qkv = torch.cat([torch.zeros(1, 2, 10), v[:, None]], dim=1)
    cos = torch.ones(1, 10)
    sin = torch.zeros(1, 10)
    k_cache, v_cache = (torch.zeros(1, 1, 1, 10, dtype=torch.bfloat16) for _ in range(2))
    rotary_write(qkv, cos, sin, k_cache, v_cache, torch.tensor([0]), impl="cpp")
    assert_bitwise_equal(v_cache.flatten(), v[0].bfloat16(), name="v")


@needs_cpp
def test_write_is_thread_invariant() -> None:
    results = []
    for _ in thread_counts():
        case = write_case(500, 9, 3, 64, 16)
        results.append([rotary_write(*case, impl="cpp"), *case[3:5]])
    for result in results[1:]:
        assert_same_bits(result, results[0], "threads")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots_T": torch.full((6,), 24)}, "slots_T must be below P [*] S, got 24 at 0"),
        ({"slots_T": torch.zeros(6, dtype=torch.int32)}, r"slots_T must be int64 \[T=6\]"),
        ({"cos_TE": torch.ones(6, 4)}, r"cos_TE must be .* \[T=6, E=8\]"),
        (
            {"k_cache_PSKE": torch.ones(6, 4, 4, 8).transpose(0, 1)},
            "strides of k_cache_PSKE must be contiguous",
        ),
        ({"v_cache_PSKE": torch.ones(6, 4, 2, 8).bfloat16()}, "dtype of v_cache_PSKE must be k's"),
        ({"v_cache_PSKE": torch.ones(6, 4, 1, 8)}, "v_cache_PSKE must be"),
        ({"qkv_THE": torch.ones(6, 4, 8)}, "heads of qkv must be > 2 K = 4, with K > 0, got 4"),
    ],
)
def test_write_refuses(change: dict, message: str) -> None:
    good = {"qkv_THE": torch.ones(6, 7, 8), "cos_TE": torch.ones(6, 8), "sin_TE": torch.ones(6, 8)}
    good |= {
        "k_cache_PSKE": torch.ones(6, 4, 2, 8),
        "v_cache_PSKE": torch.ones(6, 4, 2, 8),
        "slots_T": torch.arange(6),
    }
    with pytest.raises(ValueError, match=f"rotary_write: {message}"):
        rotary_write(**(good | change))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="rotary: E must be even, got 3"):
        rotary(torch.ones(2, 1, 3), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(
        ValueError, match="rotary: impl must be one of auto, ref for float64, got 'cpp'"
    ):
        rotary(torch.ones(2, 1, 4).double(), torch.ones(2, 4), torch.ones(2, 4), impl="cpp")


@needs_cpp
def test_opcheck() -> None:
    qkv, cos, sin, k_cache, v_cache, slots = write_case(9, 4, 2, 8, 4)
    torch.library.opcheck(torch.ops.socpo.rotary.default, (qkv[:, :6], cos, sin, True))
    caches = k_cache.nan_to_num(), v_cache.nan_to_num().bfloat16().float()
    torch.library.opcheck(torch.ops.socpo.rotary_write.default, (qkv, cos, sin, *caches, slots))
