"""Registers linear_logprob as an op: impl "cpp" and "triton".

The full [N, V] logits never exist. The forward (_kernel) projects each chunk of rows and reduces it
to three numbers a row; the backward (_backward_kernel) projects it again. Projecting twice makes
four GEMMs. `linear_policy_loss` makes three, because its loss, and so the gradient of a log-prob,
is known while the logits are still there.
"""

from typing import Any

from torch import Tensor

from socpo_fast.ops._head import (
    NO_TARGET,
    ChunkedHead,
    keep_rows,
    row_indices,
    scatter_rows,
    shapes_of_gradients,
    wide_dtype,
)
from socpo_fast.ops._impl import kernels_of
from socpo_fast.ops._register import define_op


def _kernel(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_N: Tensor | None,
    targets_N: Tensor,
    inv_temperature_N: Tensor,
    tanh_scale: float | None,
    entropy_grad: bool,
    workspace_mib: float | None,
    impl: str,
) -> tuple[Tensor, ...]:
    has_target_N = targets_N != NO_TARGET
    rows, targets, inv_temperature = keep_rows(
        has_target_N,
        row_indices(rows_N, targets_N),
        targets_N.clamp(min=0),
        inv_temperature_N,
    )
    lm_head = ChunkedHead(
        hidden_TD,
        weight_VD,
        rows,
        bias_V=bias_V,
        tanh_scale=tanh_scale,
        workspace_mib=workspace_mib,
        compacts_rows=impl == "cpp",
    )
    values_3N = lm_head.logits.new_empty((3, rows.numel()))  # log-prob, entropy, logsumexp
    for span in lm_head.chunks():
        values_3N[:, span] = kernels_of("linear_policy_loss", impl).logprob_rows(
            lm_head.project(span), targets[span], inv_temperature[span]
        )
    # Clones: outputs of a registered op must not share memory with each other.
    return tuple(x.clone() for x in scatter_rows(values_3N, has_target_N))


def _fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Any,
    rows_N: Any,
    targets_N: Tensor,
    *_: Any,
) -> Any:
    return tuple(
        hidden_TD.new_empty(targets_N.shape, dtype=wide_dtype(hidden_TD)) for _ in range(3)
    )


def _save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.tanh_scale, ctx.entropy_grad, ctx.workspace_mib, ctx.impl = inputs
    _, entropy_N, logsumexp_N = outputs
    ctx.save_for_backward(*tensors, logsumexp_N, entropy_N if ctx.entropy_grad else None)
    ctx.mark_non_differentiable(logsumexp_N, *(() if ctx.entropy_grad else (entropy_N,)))


def _backward(
    ctx: Any,
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor,
    _: Any,
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    gradients = _linear_logprob_backward(
        grad_logprobs_N,
        grad_entropy_N if ctx.entropy_grad else None,
        *ctx.saved_tensors,
        ctx.tanh_scale,
        ctx.workspace_mib,
        *needs,
        ctx.impl,
    )
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *[None] * 7


def _backward_kernel(
    grad_logprobs_N: Tensor,
    grad_entropy_N: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_N: Tensor | None,
    targets_N: Tensor,
    inv_temperature_N: Tensor,
    logsumexp_N: Tensor,
    entropy_N: Tensor | None,
    tanh_scale: float | None,
    workspace_mib: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    has_target_N = targets_N != NO_TARGET
    # The outputs of rows without a target are NaN, and so may be what flows back to them.
    grad_logprobs_N = grad_logprobs_N.where(has_target_N, 0)
    has_grad_N = grad_logprobs_N != 0
    if grad_entropy_N is not None:
        grad_entropy_N = grad_entropy_N.where(has_target_N, 0)
        has_grad_N = has_grad_N | (grad_entropy_N != 0)
    # Rows without a gradient are left out of the second projection, too.
    kept = keep_rows(
        has_grad_N,
        ~has_grad_N,
        row_indices(rows_N, targets_N),
        targets_N.clamp(min=0),
        inv_temperature_N,
        logsumexp_N,
        entropy_N,
        grad_logprobs_N,
        grad_entropy_N,
    )
    no_grad, rows, targets, inv_temperature, logsumexp, entropy, grad_logprobs, grad_entropy = kept
    lm_head = ChunkedHead(
        hidden_TD,
        weight_VD,
        rows,
        bias_V=bias_V,
        tanh_scale=tanh_scale,
        workspace_mib=workspace_mib,
        needs_grad=(needs_hidden, needs_weight, needs_bias),
        compacts_rows=impl == "cpp",
    )
    for span in lm_head.chunks():
        logits = lm_head.project(span)
        kernels_of("linear_policy_loss", impl).logprob_rows_backward(
            logits,
            lm_head.grad_logits[: logits.shape[0]],
            targets[span],
            inv_temperature[span],
            logsumexp[span],
            # The kernel takes a tensor here, but does not read it without grad_entropy.
            logsumexp[span] if entropy is None else entropy[span],
            grad_logprobs[span],
            None if grad_entropy is None else grad_entropy[span],
        )
        lm_head.backward(span, no_grad[span])
    return tuple(x.to(hidden_TD.dtype) for x in lm_head.gradients())


def _backward_fake(
    grad_logprobs_N: Any,
    grad_entropy_N: Any,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    *args: Any,
) -> Any:
    return tuple(
        hidden_TD.new_empty(shape)
        for shape in shapes_of_gradients(hidden_TD, weight_VD, args[-4:-1])
    )


_LM_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets"
linear_logprob_op = define_op(
    f"linear_logprob({_LM_HEAD}, Tensor inv_temperature, float? tanh_scale, bool entropy_grad, "
    "float? workspace_mib, str impl) -> (Tensor logprobs, Tensor entropy, Tensor logsumexp)",
    _kernel,
    fake=_fake,
    derivative=(_save, _backward),
)
# A gradient that is not needed is empty.
_linear_logprob_backward = define_op(
    f"linear_logprob_backward(Tensor grad_logprobs, Tensor? grad_entropy, {_LM_HEAD}, "
    "Tensor inv_temperature, Tensor logsumexp, Tensor? entropy, float? tanh_scale, "
    "float? workspace_mib, bool needs_hidden, bool needs_weight, bool needs_bias, str impl) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _backward_kernel,
    fake=_backward_fake,
)
