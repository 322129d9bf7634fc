"""Computes rotary position embedding (RoPE), forward and backward; for q and k with their norms.

Read rotary -> rotary_qkv; rotary_write.py is the form that the engine uses. Departs from the
textbook: one GEMM gives q, k and v side by side, and they are never copied apart; the backward
writes one gradient of all three.

    qkv of a token, X = H + 2 K heads of E numbers:    | q heads: H | k heads: K | v heads: K |
    a head, in Hugging Face's half-split layout:       | low: i     | high: i + E / 2 |

Number i of the low half is rotated with number i of the high half, by the token's angle i.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op
from socpo_fast.ops.rms_norm import rms_norm


class Rope(NamedTuple):
    """The angles that rotate q and k, and the weights and eps of their norms, if there are any."""

    cos_TE: Tensor
    sin_TE: Tensor
    q_weight_E: Tensor | None = None
    k_weight_E: Tensor | None = None
    eps: float | None = None


def rotary_ref(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Computes `rotary`, unchecked."""
    low, high = x_THE.chunk(2, dim=-1)
    return (x_THE * cos_TE[:, None] + torch.cat((-high, low), dim=-1) * sin_TE[:, None]).to(
        x_THE.dtype
    )


def rotary(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotates each pair (i, i + E / 2) of every head by its token's angle.

        out[t, h] = x[t, h] * cos[t] + (-high, low of x[t, h]) * sin[t]

    Args:
        x_THE:  [T, H, E] floating point (cpp: fp32; triton: not fp64), E even. May be a slice of
                the heads of a larger tensor, which is not copied.
        cos_TE: [T, E] fp32 or x's dtype, from `rotary_tables`: the second half repeats the first.
        sin_TE: like cos_TE.
        impl:   "auto", "ref", "cpp" or "triton".

    Returns:
        [T, H, E], x's dtype.

    Raises:
        ValueError: a shape or dtype breaks the rules above.

    Gradient: x, by the opposite rotation. Bitwise: batch-invariant.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    check_rotary("rotary", "x_THE", x_THE, cos_TE, sin_TE)
    impl = pick_impl("rotary", impl, x_THE)
    if impl == "ref":
        return rotary_ref(x_THE, cos_TE, sin_TE)
    # qkv with 0 key heads is nothing but query heads.
    return _rotary_qkv(x_THE, cos_TE, sin_TE, None, None, None, 0, impl)[0]


def rotary_qkv_ref(
    qkv_TXE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    *,
    num_kv_heads: int,
    eps: float | None = None,
) -> tuple[Tensor, ...]:
    """Computes `rotary_qkv`, unchecked."""
    q_THE, k_TKE, _ = normed_qkv(qkv_TXE, q_weight_E, k_weight_E, eps, num_kv_heads, "ref")
    return rotary_ref(q_THE, cos_TE, sin_TE), rotary_ref(k_TKE, cos_TE, sin_TE)


def rotary_qkv(
    qkv_TXE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    q_weight_E: Tensor | None = None,
    k_weight_E: Tensor | None = None,
    *,
    num_kv_heads: int,
    eps: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Norms the heads of q and k, if the model does so, and rotates them; v is not touched.

        q, k, v = the first H, the next K and the last K heads of qkv
        out     = rotary(rms_norm(q, q_weight)), rotary(rms_norm(k, k_weight))

    Args:
        qkv_TXE:      [T, H + 2 K, E] floating point (cpp: fp32; triton: not fp64), E even.
        cos_TE:       [T, E] fp32 or qkv's dtype; sin_TE likewise.
        q_weight_E:   [E], the weight of q's norm over each head; None: no norms. Any floating point
                      for triton, otherwise as in rms_norm. k_weight_E likewise, for k.
        num_kv_heads: K, > 0.
        eps:          > 0, for both norms; None without weights.
        impl:         "auto", "ref", "cpp" or "triton".

    Returns:
        q_THE [T, H, E] and k_TKE [T, K, E], qkv's dtype.

    Raises:
        ValueError: a shape, dtype, eps or number of heads breaks the rules above.

    Gradient: qkv, both weights (fp32 sums in a fixed order). Memory: qkv is kept for the backward,
    q and k are not. Bitwise: batch-invariant; cpp equals rms_norm followed by rotary. triton rounds
    once, after the rotation, and not between the norm and the rotation.
    """
    check = check_rotary("rotary_qkv", "qkv_TXE", qkv_TXE, cos_TE, sin_TE)
    check_qkv(check, qkv_TXE, q_weight_E, k_weight_E, num_kv_heads, eps)
    impl = pick_impl("rotary_qkv", impl, qkv_TXE)
    tensors = qkv_TXE, cos_TE, sin_TE, q_weight_E, k_weight_E
    if impl == "ref":
        return rotary_qkv_ref(*tensors, num_kv_heads=num_kv_heads, eps=eps)
    return _rotary_qkv(*tensors, eps, num_kv_heads, impl)


def split_qkv_and_apply_rope(qkv_TXE: Tensor, rope: Rope, num_kv_heads: int) -> tuple[Tensor, ...]:
    """Returns the q and k of rotary_qkv, and v, which is a view of qkv_TXE."""
    q_THE, k_TKE = rotary_qkv(qkv_TXE, *rope[:4], num_kv_heads=num_kv_heads, eps=rope.eps)
    return q_THE, k_TKE, qkv_TXE[:, -num_kv_heads:]


def split_qkv(qkv_TXE: Tensor, num_kv_heads: int) -> tuple[Tensor, ...]:
    """Returns views of q, k and v."""
    num_heads = qkv_TXE.shape[1] - 2 * num_kv_heads
    return qkv_TXE.split((num_heads, num_kv_heads, num_kv_heads), dim=1)


def normed_qkv(
    qkv_TXE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    eps: float | None,
    num_kv_heads: int,
    impl: str,
) -> tuple[Any, ...]:
    """Returns q, k and v, of which q and k are normed by rms_norm if there are weights."""
    q_THE, k_TKE, v_TKE = split_qkv(qkv_TXE, num_kv_heads)
    # All three are None or none is; mypy must see each of them.
    if q_weight_E is None or k_weight_E is None or eps is None:
        return q_THE, k_TKE, v_TKE
    return (
        rms_norm(q_THE, q_weight_E, eps=eps, impl=impl),
        rms_norm(k_TKE, k_weight_E, eps=eps, impl=impl),
        v_TKE,
    )


def _kernel(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    num_kv_heads: int,
    impl: str,
) -> tuple[Tensor, ...]:
    # triton norms and rotates in one launch; cpp has a pass each.
    kernels = kernels_of("rotary", impl)
    if impl != "cpp":
        return kernels.rotary_qkv(qkv, cos, sin, q_weight, k_weight, eps, num_kv_heads)
    q, k, _ = normed_qkv(qkv, q_weight, k_weight, eps, num_kv_heads, impl)
    return kernels.rotary(q, cos, sin, False), kernels.rotary(k, cos, sin, False)


def _save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, _, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grad_qkv, grad_weights = rotary_qkv_backward_op(
        grad_q, grad_k, None, *ctx.saved_tensors, ctx.eps, ctx.impl
    )
    # Without norms grad_weights is [0, E], and unbind gives an empty tuple.
    return grad_qkv, None, None, *(grad_weights.unbind() or (None, None)), None, None, None


def _backward_kernel(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    kernels = kernels_of("rotary_backward", impl)
    if impl != "cpp":
        return kernels.rotary_qkv_backward(
            grad_q, grad_k, grad_v, qkv, cos, sin, q_weight, k_weight, eps
        )
    # First back through the rotation (True: by the opposite angle), then through the norms.
    grads = [kernels.rotary(grad, cos, sin, True) for grad in (grad_q, grad_k)]
    grad_weights = qkv.new_empty((0, qkv.shape[2]))
    if q_weight is not None:
        rows = zip(split_qkv(qkv, grad_k.shape[1]), (q_weight, k_weight), grads, strict=False)
        pairs = [kernels.rms_norm_backward(x, weight, eps, grad, None) for x, weight, grad in rows]
        grads = [pair[0] for pair in pairs]
        grad_weights = torch.stack([pair[1] for pair in pairs])
    grads.append(torch.zeros_like(grad_k) if grad_v is None else grad_v)
    return torch.cat(grads, dim=1), grad_weights


_rotary_qkv = define_op(
    "rotary_qkv(Tensor qkv, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "float? eps, int num_kv_heads, str impl) -> (Tensor q, Tensor k)",
    _kernel,
    fake=lambda qkv, *args: tuple(qkv.new_empty(x.shape) for x in split_qkv(qkv, args[-2])[:2]),
    derivative=(_save, _backward),
)
# Returns the gradient of qkv before norms and rotation, in which v's heads have grad_v or 0, and
# the gradients of both weights, fp32 [2, E], or [0, E] without norms.
rotary_qkv_backward_op = define_op(
    "rotary_qkv_backward(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor qkv, Tensor cos, "
    "Tensor sin, Tensor? q_weight, Tensor? k_weight, float? eps, str impl) "
    "-> (Tensor grad_qkv, Tensor grad_weights)",
    _backward_kernel,
    fake=lambda _, __, ___, qkv, cos, sin, q_weight, *args: (
        qkv.new_empty(qkv.shape),
        qkv.new_empty((0 if q_weight is None else 2, qkv.shape[2]), dtype=torch.float32),
    ),
)


def check_rotary(where: str, name: str, x: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> TensorChecker:
    """Checks the arguments of every rotation: x, cos and sin."""
    check = TensorChecker(where)
    check(name, x, FLOATS)
    check("cos_TE", cos_TE, (torch.float32, x.dtype))
    check("sin_TE", sin_TE, (cos_TE.dtype,))
    check_rule(where, "E", x.shape[2], x.shape[2] % 2 == 0, "even")
    return check


def check_qkv(
    check: TensorChecker,
    qkv_TXE: Tensor,
    q_weight_E: Tensor | None,
    k_weight_E: Tensor | None,
    kv_heads: int,
    eps: float | None,
) -> None:
    """Checks what rotary_qkv and rotary_write need in addition to check_rotary."""
    heads = qkv_TXE.shape[1]
    check_rule(
        check.where,
        "heads of qkv",
        heads,
        heads > 2 * kv_heads > 0,
        f"> 2 K = {2 * kv_heads}, with K > 0",
    )
    check.optional(FLOATS, q_weight_E=q_weight_E, k_weight_E=k_weight_E)
    is_present = [x is not None for x in (q_weight_E, k_weight_E, eps)]
    holds = not any(is_present) if eps is None else all(is_present) and 0 < eps < torch.inf
    check_rule(check.where, "eps", eps, holds, "finite and > 0 with both weights, None with none")
