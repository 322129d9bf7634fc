"""linear_policy_loss as a registered op, its gradient formed in the forward: "cpp" and "triton".

fused_policy_loss calls the op; _kernel is its loop over chunks, _Rows what a chunk needs of its
rows. Departure from the textbook: the derivative of a policy loss with respect to a log-prob needs
nothing but that log-prob, so a chunk of logits becomes its own gradient on the spot. That makes
three GEMMs, where recomputing the logits in the backward makes four; the backward only scales.
The row pass in between (policy_rows of csrc/linear_policy_loss.cpp and of kernels/) returns [6, n]
values and fills head.grad_logits.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from socpo_fast.ops._head import (
    NO_TARGET,
    ChunkedHead,
    keep_wanted,
    row_indices,
    shapes_of_gradients,
    spread,
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
    """The op, whose float tensors of a row are all of one dtype."""
    head = hidden_TD, weight_VD, bias_V
    ref_logprobs_N = ref_logprobs_N if options.kl_coef != 0 else None
    sampler_logprobs_N = sampler_logprobs_N if tis_clip is not None else None
    floats = advantages_N, weights_N, old_logprobs_N, ref_logprobs_N, sampler_logprobs_N
    loss, clip_fraction, values_3N, *_ = linear_policy_loss_op(
        *head,
        rows_N,
        targets_N,
        inv_temperature_N,
        *(x if x is None else x.detach().to(inv_temperature_N.dtype) for x in floats),
        tanh_scale,
        float("inf") if tis_clip is None else tis_clip,
        *options.flat(),
        all_rows,
        workspace_mib,
        *(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head),
        impl,
    )
    return PolicyLoss(loss, values_3N[0], values_3N[1], values_3N[2], clip_fraction)


class _Rows(NamedTuple):
    """The rows of a call or of a chunk; all float tensors in the logits' dtype."""

    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    inv_temperature_N: Tensor
    advantages_N: Tensor
    old_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None
    sampler_logprobs_N: Tensor | None

    def of(self, part: slice) -> Self:
        return type(self)(*(x if x is None else x[part] for x in self))  # type: ignore[arg-type]

    def weighted(self, tis_clip: float) -> Self:
        """With truncated importance weights multiplied in, given the sampler's log-probs."""
        if self.sampler_logprobs_N is None:
            return self
        assert self.old_logprobs_N is not None
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
    has_target_N = targets_N != NO_TARGET
    has_loss_N = has_target_N & (weights_N != 0)
    needs_advantage = not all_rows and entropy_coef == 0 and kl_coef == 0
    scored_N = has_loss_N & (advantages_N != 0) if needs_advantage else has_loss_N
    wanted_N = has_target_N if all_rows else scored_N
    by_row = (
        row_indices(rows_N, targets_N),
        targets_N.clamp(min=0),
        weights_N.where(scored_N, 0),
        inv_temperature_N,
    )
    logprobs = old_logprobs_N, ref_logprobs_N, sampler_logprobs_N
    rows = _Rows(*keep_wanted(wanted_N, *by_row, advantages_N, *logprobs))
    clips = clip_low, clip_high, dual_clip
    if old_logprobs_N is None:  # a ratio of 1 is clipped nowhere, and its rounding must not be
        clips = 1.0, float("inf"), float("inf")
    head = ChunkedHead(
        hidden_TD,
        weight_VD,
        rows.rows_N,
        bias_V=bias_V,
        tanh_scale=tanh_scale,
        workspace_mib=workspace_mib,
        needs_grad=(needs_hidden, needs_weight, needs_bias),
        moves_rows_up=impl == "cpp",
    )
    run = kernels_of("linear_policy_loss", impl)
    values = [head.logits.new_empty((6, 0))]
    for part in head.chunks():
        logits = head.project(part)
        chunk = rows.of(part)
        if old_logprobs_N is None:
            old = run.logprob_rows(logits, chunk.targets_N, chunk.inv_temperature_N)[0]
            chunk = chunk._replace(old_logprobs_N=old)
        chunk = chunk.weighted(tis_clip)
        values_6n = run.policy_rows(
            logits,
            head.grad_logits[: logits.shape[0]] if head.needs_any else None,
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
            True,  # the entropy is a by-product: measured, 3 % of the row pass
        )
        values.append(values_6n)
        if head.needs_any:
            head.backward(part, (chunk.weights_N if entropy_coef != 0 else values_6n[5]) == 0)
    values_6N = torch.cat(values, 1)
    clip_fraction = values_6N[4].sum() / has_loss_N.sum().clamp(min=1)
    return values_6N[0].sum(), clip_fraction, spread(values_6N[1:4], wanted_N), *head.gradients()


def _fake(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Any,
    rows_N: Any,
    targets_N: Tensor,
    *rest: Any,
) -> Any:
    shapes = (
        (),
        (),
        (3, targets_N.shape[0]),
        *shapes_of_gradients(hidden_TD, weight_VD, rest[-4:-1]),
    )
    return tuple(hidden_TD.new_empty(shape, dtype=wide_dtype(hidden_TD)) for shape in shapes)


def _save(ctx: Any, inputs: tuple, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients stay with ctx, and empty ones are handed out: the backward scales in place."""
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    # For a second backward only, which computes again: nothing else reads them, since under
    # activation checkpointing that would run the whole head once more.
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
    loss, clip_fraction, values_3N, *ctx.gradients = outputs
    empty = [x.new_empty(0) for x in ctx.gradients]
    ctx.mark_non_differentiable(clip_fraction, values_3N, *empty)
    return loss, clip_fraction, values_3N, *empty


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # scaled in place and given away: a copy would be a second dW
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward through the same graph
        both = zip(ctx.saved_tensors, ctx.arguments, strict=True)
        gradients = linear_policy_loss_op(*(x if saved is None else saved for saved, x in both))[3:]
    # They stay wide: autograd makes of each what the input's .grad is.
    both = zip(gradients, ctx.needs_input_grad[:3], strict=True)
    scaled = [total.mul_(grad_loss) if needed else None for total, needed in both]
    return *scaled, *[None] * (len(ctx.arguments) - 3)


# Gradients are wide, for an upstream gradient of 1, and empty where they are not needed.
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
