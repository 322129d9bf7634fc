"""Registers linear_policy_loss as an op: impl "cpp" and "triton".

fused_policy_loss calls the op; _kernel is its loop over chunks of rows, _Rows the per-token tensors
of a chunk.

Departure from the textbook: the gradient is formed in the forward. The derivative of a policy loss
with respect to a log-prob depends on nothing but that log-prob, so a chunk of logits is overwritten
by its gradient at once. That makes three GEMMs, where recomputing the logits in the backward makes
four; the backward only scales by the upstream gradient.

The row pass (policy_rows of csrc/linear_policy_loss.cpp and of kernels/linear_policy_loss.py) fills
lm_head.grad_logits and returns values_6n, one column a row:

    0  weighted loss     1  log-prob     2  entropy     3  ratio
    4  is clipped        5  d loss / d log-prob
"""

from typing import Any, NamedTuple, Self

import torch
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
from socpo_fast.ops.policy_loss import PolicyLoss, PolicyLossOptions


def fused_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    inv_temperature_N: Tensor,
    tanh_scale: float | None,
    all_rows: bool,
    workspace_mib: float | None,
    impl: str,
    advantages_N: Tensor,
    weights_N: Tensor,
    old_logprobs_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    sampler_logprobs_N: Tensor | None,
    tis_clip: float | None,
    options: PolicyLossOptions,
) -> PolicyLoss:
    """Calls the op, with all per-token float tensors converted to one dtype."""
    head_tensors = hidden_TD, weight_VD, bias_V
    ref_logprobs_N = ref_logprobs_N if options.kl_coef != 0 else None
    sampler_logprobs_N = sampler_logprobs_N if tis_clip is not None else None
    floats = advantages_N, weights_N, old_logprobs_N, ref_logprobs_N, sampler_logprobs_N
    loss, clip_fraction, values_3N, *_ = linear_policy_loss_op(
        *head_tensors,
        rows_N,
        targets_N,
        inv_temperature_N,
        *(x if x is None else x.detach().to(inv_temperature_N.dtype) for x in floats),
        tanh_scale,
        float("inf") if tis_clip is None else tis_clip,
        *options.flat(),
        all_rows,
        workspace_mib,
        *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head_tensors),
        impl,
    )
    return PolicyLoss(loss, values_3N[0], values_3N[1], values_3N[2], clip_fraction)


class _Rows(NamedTuple):
    """The per-token tensors of a call or of a chunk; floats are in the logits' dtype."""

    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    inv_temperature_N: Tensor
    advantages_N: Tensor
    old_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None
    sampler_logprobs_N: Tensor | None

    def of(self, span: slice) -> Self:
        """Returns the tensors of one chunk."""
        return type(self)(*(x if x is None else x[span] for x in self))  # type: ignore[arg-type]

    def weighted(self, tis_clip: float) -> Self:
        """Multiplies weights by truncated importance weights, if there are sampler log-probs."""
        if self.sampler_logprobs_N is None:
            return self
        assert self.old_logprobs_N is not None
        # A weight of 0 stays 0: a row without loss may have log-probs that are NaN.
        tis_N = (self.old_logprobs_N - self.sampler_logprobs_N).exp().clamp(max=tis_clip)
        return self._replace(weights_N=(self.weights_N * tis_N).where(self.weights_N != 0, 0))


def _kernel(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_N: Tensor | None,
    targets_N: Tensor,
    inv_temperature_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    old_logprobs_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    sampler_logprobs_N: Tensor | None,
    tanh_scale: float | None,
    tis_clip: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    entropy_coef: float,
    kl_coef: float,
    kl_estimator: int,
    all_rows: bool,
    workspace_mib: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    # A row has loss if it has a target and a weight. It is scored unless its advantage is 0 and
    # nothing else in the loss has a gradient. Rows that are not kept are not projected.
    has_target_N = targets_N != NO_TARGET
    has_loss_N = has_target_N & (weights_N != 0)
    needs_advantage = not all_rows and entropy_coef == 0 and kl_coef == 0
    is_scored_N = has_loss_N & (advantages_N != 0) if needs_advantage else has_loss_N
    kept_N = has_target_N if all_rows else is_scored_N
    indices = row_indices(rows_N, targets_N), targets_N.clamp(min=0)
    floats = weights_N.where(is_scored_N, 0), inv_temperature_N, advantages_N
    logprobs = old_logprobs_N, ref_logprobs_N, sampler_logprobs_N
    rows = _Rows(*keep_rows(kept_N, *indices, *floats, *logprobs))
    clips = clip_low, clip_high, dual_clip
    # Without old log-probs every ratio is 1 up to rounding. The clips could take that rounding for
    # a change of the policy (clip_high may be 0), so they are off.
    if old_logprobs_N is None:
        clips = 1.0, float("inf"), float("inf")
    lm_head = ChunkedHead(
        hidden_TD,
        weight_VD,
        rows.rows_N,
        bias_V=bias_V,
        tanh_scale=tanh_scale,
        workspace_mib=workspace_mib,
        needs_grad=(needs_hidden, needs_weight, needs_bias),
        compacts_rows=impl == "cpp",
    )
    run = kernels_of("linear_policy_loss", impl)
    values = [lm_head.logits.new_empty((6, 0))]  # cat needs at least one, also if no row has loss
    for span in lm_head.chunks():
        logits = lm_head.project(span)
        chunk = rows.of(span)
        # Without old log-probs, the log-probs of these very logits stand in for them.
        if old_logprobs_N is None:
            old = run.logprob_rows(logits, chunk.targets_N, chunk.inv_temperature_N)[0]
            chunk = chunk._replace(old_logprobs_N=old)
        chunk = chunk.weighted(tis_clip)
        values_6n = run.policy_rows(
            logits,
            lm_head.grad_logits[: logits.shape[0]] if lm_head.needs_any else None,
            chunk.targets_N,
            chunk.old_logprobs_N,
            chunk.advantages_N,
            None,
            chunk.weights_N,
            chunk.inv_temperature_N,
            *clips,
            entropy_coef,
            chunk.ref_logprobs_N,
            kl_coef,
            kl_estimator,
            True,  # computes the entropy, always: measured, it is 3 % of the row pass
        )
        values.append(values_6n)
        if lm_head.needs_any:
            # With an entropy bonus a row has a gradient even where that of its log-prob is 0.
            lm_head.backward(span, (chunk.weights_N if entropy_coef != 0 else values_6n[5]) == 0)
    values_6N = torch.cat(values, 1)
    clipped = values_6N[4].sum() / has_loss_N.sum().clamp(min=1)  # a fraction
    return values_6N[0].sum(), clipped, scatter_rows(values_6N[1:4], kept_N), *lm_head.gradients()


def _fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Any,
    rows_N: Any,
    targets_N: Tensor,
    *args: Any,
) -> Any:
    shapes = (
        (),
        (),
        (3, targets_N.shape[0]),
        *shapes_of_gradients(hidden_TD, weight_VD, args[-4:-1]),
    )
    return tuple(hidden_TD.new_empty(shape, dtype=wide_dtype(hidden_TD)) for shape in shapes)


def _save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keeps the gradients in ctx, since the backward scales them in place; hands out empty ones."""
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    # Only a second backward, which computes all again, reads saved_tensors. Under activation
    # checkpointing reading them in the first one would run the whole op once more.
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    loss, clip_fraction, values_3N, *ctx.gradients = outputs
    empty = [x.new_empty(0) for x in ctx.gradients]
    ctx.mark_non_differentiable(clip_fraction, values_3N, *empty)
    return loss, clip_fraction, values_3N, *empty


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # Scaled in place and given to autograd: a copy would be a second dW in memory.
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward through the same graph
        both = zip(ctx.saved_tensors, ctx.arguments, strict=True)
        gradients = linear_policy_loss_op(*(x if saved is None else saved for saved, x in both))[3:]
    # They stay fp32 or fp64: autograd casts each to the dtype of its input.
    scaled = [
        gradient.mul_(grad_loss) if needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)
    ]
    return *scaled, *[None] * (len(ctx.arguments) - 3)


# Gradients are fp32 or fp64, for an upstream gradient of 1, and empty if they are not needed.
linear_policy_loss_op = define_op(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor? rows, Tensor targets, "
    "Tensor inv_temperature, Tensor advantages, Tensor weights, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? sampler_logprobs, float? tanh_scale, float tis_clip, "
    "float clip_low, float clip_high, float dual_clip, float entropy_coef, float kl_coef, "
    "int kl_estimator, bool all_rows, float? workspace_mib, bool needs_hidden, bool needs_weight, "
    "bool needs_bias, str impl) -> (Tensor loss, Tensor clip_fraction, Tensor values, "
    "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _kernel,
    fake=_fake,
    derivative=(_save, _backward),
)
