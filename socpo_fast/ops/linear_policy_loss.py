"""The policy head: LM head, log-softmax and clipped policy loss in one op, over the rows that carry loss only.

linear_policy_loss_ref is `linear_logprob_ref`, then `policy_loss_ref`; linear_policy_loss checks and chooses; the fused
form is in _fused_policy_loss.py. Departure from the textbook: there rows are picked before the projection, because in a
packed microbatch most rows are prompt, guidance, or attempts with advantage 0, and the projection is where the time
goes. The reference projects all rows and masks, so that it can be traced.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from socpo_fast.ops._checks import TensorChecker, check_word
from socpo_fast.ops._fused_policy_loss import linear_policy_loss_op
from socpo_fast.ops._head import NO_TARGET, check_head_options, scales_of_logits
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.linear_logprob import check_linear_inputs, linear_logprob_ref
from socpo_fast.ops.policy_loss import (
    DEFAULT_OPTIONS,
    PolicyLoss,
    PolicyLossOptions,
    check_logprobs,
    check_weights,
    per_token,
    policy_loss_ref,
)

Metrics = Literal["loss_rows", "all"]
_METRICS: tuple[str, ...] = get_args(Metrics)


def linear_policy_loss_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    old_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    options: PolicyLossOptions,
    metrics: Metrics,
    terms: dict[str, Any],
    **head: Any,
) -> PolicyLoss:
    """`linear_policy_loss` with one advantage and one weight a token, unchecked.

    head is temperature, rows_N, bias_V, softcap and logit_scale; terms the further arguments of policy_loss_ref.
    """
    has_loss_N = scored_N = (weights_N != 0) & (targets_N != NO_TARGET)
    if metrics != "all":
        scored_N = has_loss_N & (advantages_N != 0) if options.needs_advantage else has_loss_N
        targets_N = targets_N.where(scored_N, NO_TARGET)
    entropy_grad = options.entropy_coef != 0
    logprobs_N, entropy_N = linear_logprob_ref(hidden_TD, weight_VD, targets_N, entropy_grad=entropy_grad, **head)
    per_token_N = logprobs_N, old_logprobs_N, advantages_N, weights_N.where(scored_N, 0)
    result = policy_loss_ref(*per_token_N, options=options, entropy_N=entropy_N, **terms)
    return PolicyLoss(
        loss=result.loss,
        logprobs=result.logprobs,
        entropy=result.entropy,
        ratio=result.ratio,
        # a skipped row of advantage 0 counts as a loss row in which no clip held
        clip_fraction=result.clip_fraction * scored_N.sum() / has_loss_N.sum().clamp(min=1),
    )


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    old_logprobs_N: Tensor | None,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None = None,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    num_loss_tokens: float | None = None,
    ref_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    tis_clip: float | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    options: PolicyLossOptions = DEFAULT_OPTIONS,
    metrics: Metrics = "loss_rows",
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """The policy loss of packed tokens straight from hidden states, projecting only the rows that carry loss.

        logprob, entropy = linear_logprob(hidden, weight, targets, temperature, rows, bias, softcap, logit_scale)
        loss             = policy_loss(logprob, old_logprobs, advantages, .., entropy)

    A row is skipped when its target is -100, its weight is 0, or its advantage is exactly 0 and there is no entropy or
    KL term. One of target -100 or weight 0 is no loss row in clip_fraction either.

    Args:
        hidden_TD, weight_VD, targets_N, temperature, rows_N, bias_V, softcap, logit_scale,
        workspace_mib: those of `linear_logprob`.
        old_logprobs_N, advantages, attempt_of_token_N, weights_N, num_loss_tokens, ref_logprobs_N,
        sampler_logprobs_N, tis_clip, options: those of `policy_loss`.
        metrics: "loss_rows", or "all" to project skipped rows that have a target too, for their
                 log-probs and entropies.
        impl:    "auto", "ref", "cpp" or "triton".

    Returns:
        PolicyLoss; skipped rows are NaN in its per-token values unless metrics is "all".

    Raises:
        ValueError: an argument breaks the rules of `linear_logprob` or `policy_loss`.

    Gradient: hidden (repeated rows summed in index order), weight, bias; fp32 accumulation; create_graph gives it no
    graph. Memory: one chunk of logits, and from the forward on the gradients; beside dX by default at most dW + 256 MiB
    on a CPU and dW + 2048 MiB + 256 MiB on a card. A second backward computes them again. Bitwise: same inputs, same
    bits; on the CPU a row's log-prob, entropy, ratio and dX are those it would have alone.
    Source: those of `linear_logprob` and `policy_loss`.
    """
    where = "linear_policy_loss"
    check = TensorChecker(where)
    linear = check_linear_inputs(check, hidden_TD, weight_VD, bias_V, targets_N, temperature, rows_N)
    check_head_options(where, workspace_mib, softcap, logit_scale)
    check_word(where, "metrics", metrics, _METRICS)
    logprobs = old_logprobs_N, ref_logprobs_N, sampler_logprobs_N
    check_logprobs(check, *logprobs, tis_clip, options)
    scale_N, tanh_scale = scales_of_logits(temperature, softcap, logit_scale, check.sizes["N"], linear[0])
    like = scale_N if old_logprobs_N is None else old_logprobs_N
    weights_N = check_weights(check, advantages, attempt_of_token_N, weights_N, num_loss_tokens, like)
    advantages_N, impl = per_token(advantages, attempt_of_token_N), pick_impl(where, impl, linear[0])
    if impl == "ref":
        head: dict[str, Any] = {"rows_N": rows_N, "bias_V": linear[2]}
        head |= {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        terms = dict(zip(("ref_logprobs_N", "sampler_logprobs_N"), logprobs[1:], strict=True), tis_clip=tis_clip)
        by_row = targets_N, old_logprobs_N, advantages_N, weights_N
        return linear_policy_loss_ref(linear[0], linear[1], *by_row, options, metrics, terms, **head)

    def wide(x_N: Tensor | None) -> Tensor | None:
        return None if x_N is None else x_N.detach().to(scale_N.dtype)

    needs = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in linear)
    loss, clip_fraction, values_3N, *_ = linear_policy_loss_op(
        *(*linear, rows_N, targets_N, scale_N, wide(advantages_N), wide(weights_N), wide(old_logprobs_N)),
        wide(ref_logprobs_N) if options.kl_coef != 0 else None,
        wide(sampler_logprobs_N) if tis_clip is not None else None,
        *(tanh_scale, float("inf") if tis_clip is None else tis_clip, *options.flat()),
        *(metrics == "all", workspace_mib, *needs, impl),
    )
    return PolicyLoss(loss, values_3N[0], values_3N[1], values_3N[2], clip_fraction)
