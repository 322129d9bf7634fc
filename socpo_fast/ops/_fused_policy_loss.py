"""linear_policy_loss with its gradient formed in the forward: impl "cpp" and "triton".

fused_policy_loss gathers a _Call and hands it to autograd; _Call.run is the loop over chunks. Departure from the
textbook: the derivative of a policy loss with respect to a log-prob needs nothing but that log-prob, so a chunk of
logits becomes its own gradient on the spot. That makes three GEMMs, where recomputing the logits in the backward makes
four; the backward only scales.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from socpo_fast.ops._head import ChunkedHead, inverse_temperatures, wide_dtype
from socpo_fast.ops._impl import kernels_of
from socpo_fast.ops.policy_loss import KLEstimator, LossOptions, PolicyLoss, per_token

Metrics = Literal["loss_rows", "all"]


def fused_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    old_logprobs_N: Tensor,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None,
    weights_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    metrics: Metrics,
    skip_below: float,
    workspace_mib: float | None,
    impl: str,
    **options: Unpack[LossOptions],
) -> PolicyLoss:
    """`linear_policy_loss` with all options, unchecked."""
    dual_clip, kl_coef = options["dual_clip"], options["kl_coef"]
    has_loss_N = weights_N != 0
    wanted_N = has_loss_N
    if metrics == "all":
        wanted_N = torch.ones_like(has_loss_N)
    elif options["entropy_coef"] == 0 and kl_coef == 0:
        wanted_N = has_loss_N & (per_token(advantages, attempt_of_token_N) != 0)
    num_rows, dtype = targets_N.numel(), wide_dtype(hidden_TD)
    call = _Call(
        rows_N=torch.arange(num_rows, device=targets_N.device) if rows_N is None else rows_N,
        targets_N=targets_N,
        old_logprobs_N=old_logprobs_N.detach().to(dtype),
        advantages=advantages.detach().to(dtype),
        attempt_of_token_N=attempt_of_token_N,
        weights_N=weights_N.to(dtype),
        inv_temperature_N=inverse_temperatures(temperature, num_rows, hidden_TD),
        ref_logprobs_N=None if kl_coef == 0 or ref_logprobs_N is None else ref_logprobs_N.detach().to(dtype),
        wanted_N=wanted_N,
        clips=(options["clip_low"], options["clip_high"], float("inf") if dual_clip is None else dual_clip),
        entropy_coef=options["entropy_coef"],
        kl_coef=kl_coef,
        kl_estimator=get_args(KLEstimator).index(options["kl_estimator"]) + 1,
        skip_below=skip_below,
        workspace_mib=workspace_mib,
        impl=impl,
    ).compact()
    loss, values_6N = _LinearPolicyLoss.apply(hidden_TD, weight_VD, call, torch.is_grad_enabled())
    clip_fraction = values_6N[4].sum() / has_loss_N.sum().clamp(min=1)
    if values_6N.shape[1] < num_rows:
        all_rows_6N = values_6N.new_full((6, num_rows), torch.nan)
        values_6N = all_rows_6N.index_copy_(1, wanted_N.nonzero()[:, 0], values_6N)
    else:
        values_6N = values_6N.where(wanted_N, torch.nan)
    return PolicyLoss(loss, values_6N[1], values_6N[2], values_6N[3], clip_fraction)


@dataclass(frozen=True)
class _Call:
    """A call of the fused form: its rows, all float tensors in the logits' dtype, and its options.

    No NamedTuple: under torch.compile, torch 2.11 makes an empty one where the graph breaks, and
    fails when it looks for tensors in it.
    """

    rows_N: Tensor
    targets_N: Tensor
    old_logprobs_N: Tensor
    advantages: Tensor  # [A] with attempt_of_token_N, else [N]
    attempt_of_token_N: Tensor | None
    weights_N: Tensor
    inv_temperature_N: Tensor
    ref_logprobs_N: Tensor | None
    wanted_N: Tensor  # bool; a row that is not wanted has neither loss nor outputs
    clips: tuple[float, float, float]  # low, high, dual (inf: off)
    entropy_coef: float
    kl_coef: float
    kl_estimator: int
    skip_below: float
    workspace_mib: float | None
    impl: str

    def compact(self) -> _Call:
        """Without the rows that are not wanted; on a GPU, where the host would wait for their number, with weight 0.

        The packer knows the rows without loss beforehand: on a GPU it is up to rows_N to leave them out. All tensors
        come out contiguous: the row pass reads them as plain arrays.
        """
        dense: dict[str, Any] = {name: x.contiguous() for name, x in self.tensors().items()}
        call = replace(self, **dense)
        if call.wanted_N.is_cuda:
            return replace(call, weights_N=call.weights_N.where(call.wanted_N, 0))
        return call if call.wanted_N.all() else call.rows(call.wanted_N.nonzero()[:, 0])

    def rows(self, index: Tensor | slice) -> _Call:
        """Of the rows in `index`."""
        by_token = self.tensors()
        if self.attempt_of_token_N is not None:
            del by_token["advantages"]
        changes: dict[str, Any] = {name: x[index] for name, x in by_token.items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are given, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if isinstance(x, Tensor)}

    def run(
        self, hidden_TD: Tensor, weight_VD: Tensor, needs_grad: tuple[bool, bool]
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        """[6, N] values of the row pass (csrc/linear_policy_loss.cpp), and the gradients of hidden and weight."""
        head = ChunkedHead(
            hidden_TD,
            weight_VD,
            self.rows_N,
            workspace_mib=self.workspace_mib,
            needs_grad=needs_grad,
            skip_below=self.skip_below,
            wanted_N=self.wanted_N,
        )
        values_6N = head.logits.new_empty((6, self.rows_N.numel()))
        for part in head.chunks():
            logits, rows = head.project(part), self.rows(part)
            values_6N[:, part] = kernels_of("linear_policy_loss", self.impl).policy_rows(
                logits,
                head.grad_logits[: logits.shape[0]] if any(needs_grad) else None,
                rows.targets_N,
                rows.old_logprobs_N,
                rows.advantages,
                rows.attempt_of_token_N,
                rows.weights_N,
                rows.inv_temperature_N,
                *self.clips,
                self.entropy_coef,
                rows.ref_logprobs_N,
                self.kl_coef,
                self.kl_estimator,
                True,  # the entropy is a by-product: measured, 3 % of the row pass
            )
            if any(needs_grad):
                has_grad = rows.weights_N != 0 if self.entropy_coef != 0 else values_6N[5, part] != 0
                head.backward(part, has_grad)
        return values_6N, head.gradients()


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, call: _Call, is_grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.call = call
        ctx.needs_grad = tuple(needed and is_grad_enabled for needed in ctx.needs_input_grad[:2])
        # call's tensors too, so that torch notices when they are changed before a second backward
        ctx.save_for_backward(hidden_TD, weight_VD, *call.tensors().values())
        values_6N, ctx.gradients = call.run(hidden_TD, weight_VD, ctx.needs_grad)
        ctx.mark_non_differentiable(values_6N)
        return values_6N[0].sum(), values_6N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and given away: a copy would be a second dW
        hidden_TD, weight_VD, *_ = ctx.saved_tensors
        if gradients is None:  # a second backward through the same graph
            gradients = ctx.call.run(hidden_TD, weight_VD, ctx.needs_grad)[1]
        return (*(None if x is None else x.mul_(grad_loss).to(hidden_TD.dtype) for x in gradients), None, None)
