"""Rotary position embedding, and the same with the keys and values written to their pages in one pass.

Hugging Face's half-split layout: dimension i is rotated with i + E / 2.
"""

from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op


def rotary_ref(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    low, high = x_THE.chunk(2, dim=-1)
    return (x_THE * cos_TE[:, None] + torch.cat((-high, low), dim=-1) * sin_TE[:, None]).to(x_THE.dtype)


def rotary(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotates each pair (i, i + E / 2) of every head by its token's angle.

        out[t, h] = x[t, h] * cos[t] + (-high, low of x[t, h]) * sin[t]

    Args:
        x_THE:  [T, H, E] floating point (cpp: fp32; triton: not fp64), E even. A slice of the heads is not copied.
        cos_TE: [T, E] fp32 or x's dtype, from `rotary_tables`: the second half repeats the first.
        sin_TE: like cos_TE.
        impl:   "auto", "ref", "cpp" or "triton".

    Returns:
        [T, H, E], x's dtype.

    Raises:
        ValueError: a shape or dtype breaks the rules above.

    Gradient: x, by the rotation back. Bitwise: a token's bits depend on that token only.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    _check("rotary", "x_THE", x_THE, cos_TE, sin_TE)
    impl = pick_impl("rotary", impl, x_THE)
    tensors = x_THE, cos_TE, sin_TE
    return rotary_ref(*tensors) if impl == "ref" else _rotary(*tensors, False, impl)


def _save(ctx: Any, inputs: tuple, outputs: Tensor) -> None:
    _, cos_TE, sin_TE, ctx.inverse, ctx.impl = inputs
    ctx.save_for_backward(cos_TE, sin_TE)


def _backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary(grad_THE, *ctx.saved_tensors, not ctx.inverse, ctx.impl), None, None, None, None


_rotary = define_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, str impl) -> Tensor",
    lambda x, cos, sin, inverse, impl: kernels_of("rotary", impl).rotary(x, cos, sin, inverse),
    fake=lambda x, *_: x.new_empty(x.shape),
    derivative=(_save, _backward),
)


def rotary_write_ref(
    qkv_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, k_cache_PSKE: Tensor, v_cache_PSKE: Tensor, slots_T: Tensor
) -> Tensor:
    kv_heads = k_cache_PSKE.shape[2]
    q_THE, k_TKE, v_TKE = qkv_THE.split((qkv_THE.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    kept_T = slots_T >= 0
    for cache, new_TKE in ((k_cache_PSKE, rotary_ref(k_TKE, cos_TE, sin_TE)), (v_cache_PSKE, v_TKE)):
        cache.flatten(0, 1)[slots_T[kept_T]] = new_TKE[kept_T].to(cache.dtype)
    return rotary_ref(q_THE, cos_TE, sin_TE)


def rotary_write(
    qkv_THE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    slots_T: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Rotates queries and keys, and writes keys and values into their pages.

    Args:
        qkv_THE:      [T, H + 2 K, E] floating point (cpp: fp32; triton: not fp64): queries, keys, values of each token.
        cos_TE:       [T, E] fp32 or qkv's dtype; sin_TE likewise.
        k_cache_PSKE: [P, S, K, E] qkv's dtype or bf16, contiguous. Written in place; v_cache_PSKE likewise.
        slots_T:      [T] int64, page * S + place in the page, each at most once; negative: the token is not written.
        impl:         "auto", "ref", "cpp" or "triton".

    Returns:
        q_THE [T, H, E], rotated.

    Raises:
        ValueError: a shape, dtype, stride or slot breaks the rules above.

    Gradient: none, it serves the engine. Bitwise (cpp): the bits of `rotary`, rounded to nearest even for bf16 pages.
    """
    check = _check("rotary_write", "qkv_TXE", qkv_THE, cos_TE, sin_TE)
    for name, cache in (("k_cache_PSKE", k_cache_PSKE), ("v_cache_PSKE", v_cache_PSKE)):
        check(name, cache, (qkv_THE.dtype, torch.bfloat16))
        check_rule("rotary_write", f"strides of {name}", cache.stride(), cache.is_contiguous(), "contiguous")
    check_rule(
        "rotary_write", "dtype of v_cache_PSKE", v_cache_PSKE.dtype, v_cache_PSKE.dtype == k_cache_PSKE.dtype, "k's"
    )
    heads, kv_heads = qkv_THE.shape[1], k_cache_PSKE.shape[2]
    check_rule("rotary_write", "heads of qkv", heads, heads > 2 * kv_heads, f"> 2 K = {2 * kv_heads}")
    check("slots_T", slots_T, (torch.int64,))
    check.every("slots_T", slots_T, slots_T < k_cache_PSKE.shape[0] * k_cache_PSKE.shape[1], "below P * S")
    impl = pick_impl("rotary_write", impl, qkv_THE)
    return rotary_write_op(qkv_THE, cos_TE, sin_TE, k_cache_PSKE, v_cache_PSKE, slots_T, impl)


def _check(where: str, name: str, x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> TensorChecker:
    check = TensorChecker(where)
    check(name, x, FLOATS)
    check("cos_TE", cos_TE, (torch.float32, x.dtype))
    check("sin_TE", sin_TE, (cos_TE.dtype,))
    check_rule(where, "E", x.shape[2], x.shape[2] % 2 == 0, "even")
    return check


def _write_kernel(
    qkv_THE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    slots_T: Tensor,
    impl: str,
) -> Tensor:
    write = rotary_write_ref if impl == "ref" else kernels_of("rotary", impl).rotary_write
    return write(qkv_THE, cos_TE, sin_TE, k_cache_PSKE, v_cache_PSKE, slots_T)


def _write_fake(qkv_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, k_cache_PSKE: Tensor, *_: Any) -> Tensor:
    num_tokens, heads, head_dim = qkv_THE.shape
    return qkv_THE.new_empty((num_tokens, heads - 2 * k_cache_PSKE.shape[2], head_dim))


rotary_write_op = define_op(
    "rotary_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "str impl) -> Tensor",
    _write_kernel,
    fake=_write_fake,
)
