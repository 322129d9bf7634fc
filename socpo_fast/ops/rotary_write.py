"""Rotates q and k as rotary_qkv does, and writes keys and values to their pages in the same pass.

For the engine: k and v of a new token go straight from the GEMM's output into the KV cache, and
only q is returned. Read rotary.py first.
"""

import torch
from torch import Tensor

from socpo_fast.ops._checks import check_rule
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op
from socpo_fast.ops.rotary import check_qkv, check_rotary, normed_qkv, rotary_qkv_ref, split_qkv


def rotary_write_ref(
    qkv_THE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    slots_T: Tensor,
    *,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Computes `rotary_write`, unchecked."""
    rope = (cos_TE, sin_TE, q_weight_E, k_weight_E)
    kv_heads = k_cache_PSKE.shape[2]
    q_THE, k_TKE = rotary_qkv_ref(qkv_THE, *rope, num_kv_heads=kv_heads, eps=eps)
    # A negative slot marks a row without a token: a decode graph may have more rows than sequences.
    is_written_T = slots_T >= 0
    for cache, new_TKE in ((k_cache_PSKE, k_TKE), (v_cache_PSKE, qkv_THE[:, -kv_heads:])):
        cache.flatten(0, 1)[slots_T[is_written_T]] = new_TKE[is_written_T].to(cache.dtype)
    return q_THE


def rotary_write(
    qkv_THE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    slots_T: Tensor,
    *,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    eps: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Norms and rotates q and k as rotary_qkv does, and writes k and v into their pages.

    Args:
        qkv_THE:      [T, H + 2 K, E] floating point (cpp: fp32; triton: not fp64): queries, keys,
                      values of each token.
        cos_TE:       [T, E] fp32 or qkv's dtype; sin_TE likewise.
        k_cache_PSKE: [P, S, K, E] qkv's dtype or bf16, contiguous. Written in place; v_cache_PSKE
                      likewise.
        slots_T:      [T] int64, page * S + index in the page, each at most once; negative: the
                      token is not written.
        q_weight_E, k_weight_E, eps: those of the norms, as in rotary_qkv; None: no norms.
        impl:         "auto", "ref", "cpp" or "triton".

    Returns:
        q_THE [T, H, E], rotated.

    Raises:
        ValueError: a shape, dtype, stride, eps or slot breaks the rules above.

    Gradient: none, it serves the engine. Bitwise (cpp): equal to `rotary_qkv`, rounded to nearest
    even for bf16 pages.
    """
    check = check_rotary("rotary_write", "qkv_TXE", qkv_THE, cos_TE, sin_TE)
    for name, cache in (("k_cache_PSKE", k_cache_PSKE), ("v_cache_PSKE", v_cache_PSKE)):
        check(name, cache, (qkv_THE.dtype, torch.bfloat16))
        check_rule(
            "rotary_write",
            f"strides of {name}",
            cache.stride(),
            cache.is_contiguous(),
            "contiguous",
        )
    check_rule(
        "rotary_write",
        "dtype of v_cache_PSKE",
        v_cache_PSKE.dtype,
        v_cache_PSKE.dtype == k_cache_PSKE.dtype,
        "k's",
    )
    check_qkv(check, qkv_THE, q_weight_E, k_weight_E, k_cache_PSKE.shape[2], eps)
    check("slots_T", slots_T, (torch.int64,))
    check.every(
        "slots_T", slots_T, slots_T < k_cache_PSKE.shape[0] * k_cache_PSKE.shape[1], "below P * S"
    )
    impl = pick_impl("rotary_write", impl, qkv_THE)
    return rotary_write_op(
        qkv_THE,
        cos_TE,
        sin_TE,
        q_weight_E,
        k_weight_E,
        eps,
        k_cache_PSKE,
        v_cache_PSKE,
        slots_T,
        impl,
    )


def _kernel(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    impl: str,
) -> Tensor:
    pages = k_cache, v_cache, slots
    if impl == "triton":
        return kernels_of("rotary", impl).rotary_write(
            qkv, cos, sin, q_weight, k_weight, eps, *pages
        )
    if impl == "ref":
        return rotary_write_ref(
            qkv, cos, sin, *pages, q_weight_E=q_weight, k_weight_E=k_weight, eps=eps
        )
    # The C++ rotates and writes, but does not norm. rms_norm is a pass before it, whose results are
    # put together again to one qkv.
    if q_weight is not None:
        qkv = torch.cat(normed_qkv(qkv, q_weight, k_weight, eps, k_cache.shape[2], impl), dim=1)
    return kernels_of("rotary", impl).rotary_write(qkv, cos, sin, *pages)


rotary_write_op = define_op(
    "rotary_write(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float? eps, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, str impl) -> Tensor",
    _kernel,
    fake=lambda qkv, *args: qkv.new_empty(split_qkv(qkv, args[5].shape[2])[0].shape),  # k_cache
)
