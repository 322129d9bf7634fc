"""Compares rotary_qkv, and rotary_write with norms, with fp64.

Also tests that tokens are batch-invariant, and that raw qkv gets one gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import rms_norm, rotary, rotary_qkv, rotary_write
from socpo_fast.ops.rotary import rotary_qkv_ref
from tests.helpers.elementwise import (
    KERNELS,
    assert_as_right_as_ref,
    assert_batch_invariant,
    assert_same_bits,
    needs_cpp,
    randn,
    thread_counts,
    values_and_gradients,
)
from tests.helpers.error_rule import assert_bitwise_equal, assert_equal_across_variants
from tests.ops.test_rotary import device_of, tables, write_case

EPS = 1e-5
IMPLS = [pytest.param("cpp", marks=needs_cpp), "triton"]
# (tokens, H, K, E): one pair; less than a vector; one token more than partial sums have; more heads
# than a tile, and pairs that are no power of two; no token; SmolLM2; Phi's head dim; Qwen3.
SHAPES = [
    (2, 1, 1, 2),
    (5, 4, 2, 6),
    (97, 9, 3, 16),
    (7, 37, 1, 36),
    (0, 4, 2, 64),
    (13, 9, 3, 64),
    (3, 2, 2, 96),
    (4, 16, 8, 128),
]


class Case(NamedTuple):
    """Inputs on the CPU in fp32; the first three are differentiable."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, num_tokens: int, heads: int, kv_heads: int, head_dim: int) -> Case:
        """Returns random inputs of these sizes."""
        weights = (1 + 0.5 * randn(head_dim, seed=seed) for seed in (1, 2))
        return cls(
            randn(num_tokens, heads + 2 * kv_heads, head_dim),
            *weights,
            *tables(num_tokens, head_dim),
        )


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("impl", "dtype"), KERNELS)
def test_as_right_as_ref(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], has_norms: bool
) -> None:
    case = Case.of(*shape)
    kv_heads = shape[2]
    device = device_of(impl)
    options: dict[str, Any] = {"num_kv_heads": kv_heads, "eps": EPS if has_norms else None}

    def run(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rotary_qkv(
            qkv, case.cos.to(device), case.sin.to(device), *weights, **options, impl=impl
        )

    def ref(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rotary_qkv_ref(qkv, case.cos, case.sin, *weights, **options)

    inputs = list(case[:3]) if has_norms else [case.qkv]
    of_weight = (
        8 * max(1, shape[0] * shape[1]) ** 0.5
    )  # their gradients are sums over tokens and heads
    scales = [4.0, 4.0, 8.0, of_weight, of_weight][: 2 + len(inputs)]
    assert_as_right_as_ref(run, ref, inputs, dtype, device, scales=scales)


@pytest.mark.parametrize("has_norms", [False, True])
def test_ref_gradcheck(has_norms: bool) -> None:
    case = Case.of(3, 2, 1, 4)
    inputs = [x.double().requires_grad_() for x in (case[:3] if has_norms else case[:1])]
    run = partial(rotary_qkv, num_kv_heads=1, eps=EPS if has_norms else None)
    assert torch.autograd.gradcheck(
        lambda qkv, *weights: run(qkv, case.cos, case.sin, *weights), inputs
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_and_thread_invariant(impl: str) -> None:
    """Tokens alone equal them in a batch, forward and backward, with any number of threads."""
    num_tokens = 31
    device = device_of(impl)
    case = Case.of(num_tokens, 5, 2, 36)
    weights = [x.to(device) for x in case[1:3]]
    upstream = [randn(num_tokens, heads, 36, seed=heads).to(device) for heads in (5, 2, 2)]

    def run(qkv: Tensor, cos: Tensor, sin: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops.socpo_fast.rotary_qkv_backward
        q, k = rotary_qkv(qkv, cos, sin, *weights, num_kv_heads=2, eps=EPS, impl=impl)
        return q, k, op(*grads, qkv, cos, sin, *weights, EPS, impl)[0]

    inputs = [x.to(device) for x in (case.qkv, case.cos, case.sin)] + upstream
    all_tokens = list(run(*inputs))
    for rows in (slice(0, 1), slice(30, None), slice(3, 20), slice(1, None)):
        assert_batch_invariant(run, inputs, all_tokens, rows, device)
    for num_threads in thread_counts() if impl == "cpp" else ():
        assert_same_bits(list(run(*inputs)), all_tokens, f"{num_threads} threads")


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl: str) -> None:
    """Strided inputs equal their copies.

    A slice of wider tokens is read where it is; other strides are copied.
    """
    device = device_of(impl)
    case = Case.of(10, 3, 2, 12)
    wide = randn(10, 11, 12, seed=3).to(device)
    weights_and_tables = [x.to(device) for x in case[1:]]

    def run(qkv: Tensor) -> list[Tensor]:
        cos, sin = weights_and_tables[2:]
        inputs = [
            qkv.detach().requires_grad_(),
            *(x.clone().requires_grad_() for x in weights_and_tables[:2]),
        ]
        q, k = rotary_qkv(inputs[0], cos, sin, *inputs[1:], num_kv_heads=2, eps=EPS, impl=impl)
        upstream = [
            randn(*x.shape, seed=9).to(device).transpose(0, 1).contiguous().transpose(0, 1)
            for x in (q, k)
        ]
        return [q.detach(), k.detach(), *torch.autograd.grad((q, k), inputs, upstream)]

    for qkv in (
        wide[:, 2:9],
        wide[:, :7],
        wide[:, 1:8].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_same_bits(run(qkv), run(qkv.contiguous()), "strided")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_gradient_of_qkv(impl: str) -> None:
    """The gradient of v is the one that came for v, bitwise, and 0 without one.

    The gradients of q, k and the weights do not depend on it.
    """
    device = device_of(impl)
    case = Case(*(x.to(device) for x in Case.of(9, 4, 2, 16)))
    grads = [randn(9, heads, 16, seed=heads).to(device) for heads in (4, 2)]
    grad_v = randn(9, 2, 16, seed=5).to(device)
    tail = case.qkv, case.cos, case.sin, case.q_weight, case.k_weight, EPS, impl
    op = torch.ops.socpo_fast.rotary_qkv_backward
    (with_v, weights), (without, again) = (op(*grads, x, *tail) for x in (grad_v, None))
    assert_bitwise_equal(with_v[:, 6:], grad_v, name="v")
    assert_bitwise_equal(without[:, 6:], torch.zeros_like(grad_v), name="no v")
    assert_equal_across_variants(
        with_v[:, :6], without[:, :6], device=device, name="q and k", scale=8.0
    )
    assert_equal_across_variants(weights, again, device=device, name="weights", scale=16.0)


@needs_cpp
def test_cpp_equals_its_parts_bitwise() -> None:
    """The C++ equals two norms, a cat and a rotation, forward and backward."""
    case = Case.of(33, 6, 2, 20)

    def parts(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.split((6, 2, 2), dim=1)
        normed = [rms_norm(x, w, eps=EPS, impl="cpp") for x, w in ((q, q_weight), (k, k_weight))]
        qk = torch.cat((*normed, v), dim=1)[:, :8]
        return rotary(qk, case.cos, case.sin, impl="cpp").split((6, 2), dim=1)

    def fused(qkv: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rotary_qkv(qkv, case.cos, case.sin, *weights, num_kv_heads=2, eps=EPS, impl="cpp")

    both = (
        values_and_gradients(run, list(case[:3]), torch.float32, "cpu") for run in (fused, parts)
    )
    assert_same_bits(*both, "fused and parts")


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", [*IMPLS, "ref"])
def test_write_norms(impl: str, cache_dtype: torch.dtype) -> None:
    """q and the pages equal those of rotary_qkv; a negative slot is written nowhere."""
    device = device_of(impl)
    qkv, cos, sin, *caches, slots = (x.to(device) for x in write_case(20, 4, 2, 16, 4))
    k_cache, v_cache = (x.to(cache_dtype) for x in caches)
    weights = [(1 + 0.5 * randn(16, seed=seed)).to(device) for seed in (1, 2)]
    norms = {"q_weight_E": weights[0], "k_weight_E": weights[1], "eps": EPS}
    q = rotary_write(qkv, cos, sin, k_cache, v_cache, slots, **norms, impl=impl)
    expected_q, expected_k = rotary_qkv(qkv, cos, sin, num_kv_heads=2, **norms, impl=impl)
    compare = partial(assert_equal_across_variants, device=device, scale=4.0)
    compare(q, expected_q, name="q")
    is_kept = slots >= 0
    for name, cache, rows in (("k", k_cache, expected_k), ("v", v_cache, qkv[:, -2:])):
        written = cache.flatten(0, 1)[slots[is_kept]]
        if impl == "triton" and device == "cpu" and cache_dtype == torch.bfloat16:
            # Triton's interpreter truncates to bf16 instead of rounding.
            rows = (rows.view(torch.int32) >> 16 << 16).view(torch.float32)
        compare(written, rows[is_kept].to(cache_dtype), name=name)
        assert cache.flatten(0, 1).isfinite().all(-1).all(-1).sum() == is_kept.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "heads of qkv must be > 2 K = 8, with K > 0, got 7"),
        ({"num_kv_heads": 0}, "heads of qkv must be > 2 K = 0, with K > 0, got 7"),
        ({"q_weight_E": torch.ones(4)}, r"q_weight_E must be .* \[E=8\], got float32 \[4\]"),
        ({"eps": None}, "eps must be finite and > 0 with both weights, None with none, got None"),
        ({"eps": 0.0}, "eps must be finite and > 0 with both weights, None with none, got 0.0"),
        (
            {"k_weight_E": None},
            "eps must be finite and > 0 with both weights, None with none, got 1e-05",
        ),
        ({"cos_TE": torch.ones(6, 4)}, r"cos_TE must be .* \[T=6, E=8\]"),
        (
            {"qkv_TXE": torch.ones(6, 7, 8).double(), "impl": "cpp"},
            "impl must be one of auto, ref for float64",
        ),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    good = {"qkv_TXE": torch.ones(6, 7, 8), "cos_TE": torch.ones(6, 8), "sin_TE": torch.ones(6, 8)}
    good |= {
        "q_weight_E": torch.ones(8),
        "k_weight_E": torch.ones(8),
        "num_kv_heads": 2,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=f"rotary_qkv: {message}"):
        rotary_qkv(**(good | change))
