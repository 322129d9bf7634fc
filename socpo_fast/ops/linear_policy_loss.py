"""Computes LM head, log-softmax and clipped policy loss in one op, for rows that carry loss only.

Read linear_policy_loss_ref, which calls linear_logprob_ref and then policy_loss_ref; then
linear_policy_loss, which checks its arguments and picks an implementation. The fused form is in
_fused_policy_loss.py.

Departure from the textbook: on a CPU, rows are selected before the projection (on a GPU selecting
them would cost a sync, so the others stay in as zeros). In a packed microbatch most
rows are prompt, guidance, or attempts with advantage 0, and the projection takes most of the time.

    hidden [T, D]  --rows with loss-->  [n, D]  --chunks-->  logits [chunk, V]  -->  loss, gradients
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from socpo_fast.ops._checks import TensorChecker, check_word
from socpo_fast.ops._fused_policy_loss import fused_policy_loss
from socpo_fast.ops._head import NO_TARGET, scales_of_logits
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.linear_logprob import check_head, linear_logprob_ref
from socpo_fast.ops.policy_loss import (
    DEFAULT_OPTIONS,
    PolicyLoss,
    PolicyLossOptions,
    check_loss_inputs,
    policy_loss_ref,
)

Metrics = Literal["loss_rows", "all"]
_METRICS: tuple[str, ...] = get_args(Metrics)


def linear_policy_loss_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    rows_N: Tensor | None,
    metrics: Metrics,
    advantages_N: Tensor,
    weights_N: Tensor,
    old_logprobs_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    sampler_logprobs_N: Tensor | None,
    tis_clip: float | None,
    options: PolicyLossOptions,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> PolicyLoss:
    """Computes `linear_policy_loss` with one advantage and one weight a token, unchecked."""
    has_loss_N = is_scored_N = (weights_N != 0) & (targets_N != NO_TARGET)
    if metrics != "all" and options.needs_advantage:
        is_scored_N = has_loss_N & (advantages_N != 0)
    head_options: dict[str, Any] = {
        "temperature": temperature,
        "rows_N": rows_N,
        "entropy_grad": options.entropy_coef != 0,
        "bias_V": bias_V,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    logprobs_N, entropy_N = linear_logprob_ref(
        hidden_TD, weight_VD, targets_N.where(is_scored_N, NO_TARGET), **head_options
    )
    # Rows without loss get values too. They come from a second call without autograd, since such a
    # row may hold NaN, which must not reach a gradient.
    if metrics == "all":
        with torch.no_grad():
            values = linear_logprob_ref(hidden_TD, weight_VD, targets_N, **head_options)
        logprobs_N, entropy_N = (
            x_N.where(is_scored_N, value_N)
            for x_N, value_N in zip((logprobs_N, entropy_N), values, strict=True)
        )
    result = policy_loss_ref(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        weights_N.where(is_scored_N, 0),
        options=options,
        entropy_N=entropy_N,
        ref_logprobs_N=ref_logprobs_N,
        sampler_logprobs_N=sampler_logprobs_N,
        tis_clip=tis_clip,
    )
    # A skipped row of advantage 0 counts as a loss row that was not clipped.
    clip_fraction = result.clip_fraction * is_scored_N.sum() / has_loss_N.sum().clamp(min=1)
    # Not with _replace, which torch.compile of torch 2.11 cannot trace.
    return PolicyLoss(*result[:-1], clip_fraction)


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
    """Computes the policy loss from hidden states, projecting only the rows that carry loss.

        logprob, entropy = linear_logprob(hidden, weight, targets, temperature, rows, bias, ..)
        loss             = policy_loss(logprob, old_logprobs, advantages, .., entropy)

    A row is skipped if its target is -100 or its weight is 0 (it is then in no sum and no mean), or
    if its advantage is exactly 0 and there is no entropy or KL term.

    Args:
        hidden_TD, weight_VD, targets_N, temperature, rows_N, bias_V, softcap, logit_scale,
        workspace_mib: those of `linear_logprob`.
        old_logprobs_N, advantages, attempt_of_token_N, weights_N, num_loss_tokens, ref_logprobs_N,
        sampler_logprobs_N, tis_clip, options: those of `policy_loss`.
        metrics: "loss_rows", or "all" to project skipped rows with a target too, for their values.
        impl:    "auto", "ref", "cpp" or "triton".

    Returns:
        PolicyLoss; skipped rows are NaN in its per-token values unless metrics is "all".

    Raises:
        ValueError: an argument breaks the rules of `linear_logprob` or `policy_loss`.

    Gradient: hidden (repeated rows summed in index order), weight, bias; fp32 accumulation; a
    second backward computes it again, create_graph gives it no graph.
    Memory: one chunk of logits, and from the forward on the gradients. Not counting dX, by default
    at most dW + 256 MiB on a CPU and dW + 2048 MiB + 256 MiB on a GPU, where N fp32 rows of D are
    also held until the end of the forward. Bitwise: same inputs, same bits; on the CPU with
    "cpp" a row's log-prob, entropy, ratio and dX are batch-invariant.
    Source: those of `linear_logprob` and `policy_loss`.
    """
    where = "linear_policy_loss"
    check = TensorChecker(where)
    by_row = targets_N, rows_N
    scaling: Any = temperature, softcap, logit_scale
    tensors = check_head(check, hidden_TD, weight_VD, bias_V, *by_row, workspace_mib, *scaling)
    check_word(where, "metrics", metrics, _METRICS)
    scale_N, tanh_scale = scales_of_logits(check.sizes["N"], tensors[0], *scaling)
    terms: Any = old_logprobs_N, ref_logprobs_N, sampler_logprobs_N, tis_clip, options
    weighting = check_loss_inputs(
        check, scale_N, advantages, attempt_of_token_N, weights_N, num_loss_tokens, *terms
    )
    impl = pick_impl(where, impl, tensors[0])
    if impl == "ref":
        return linear_policy_loss_ref(*tensors, *by_row, metrics, *weighting, *terms, *scaling)
    return fused_policy_loss(
        *tensors,
        *by_row,
        scale_N,
        tanh_scale,
        metrics == "all",
        workspace_mib,
        impl,
        *weighting,
        *terms,
    )
