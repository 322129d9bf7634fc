"""The policy head: LM head, log-softmax and clipped policy loss in one op, over the rows that carry loss only.

linear_policy_loss_ref is `linear_logprob_ref` on the compacted rows, then `policy_loss_ref`; linear_policy_loss checks
and chooses; the fused form is in _fused_policy_loss.py. Departure from the textbook: rows are picked before the
projection, because in a packed microbatch most rows are prompt, guidance, or attempts with advantage 0, and the
projection is where the time goes.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from socpo_fast.ops._checks import TensorChecker, check_word
from socpo_fast.ops._fused_policy_loss import Metrics, fused_policy_loss
from socpo_fast.ops._head import check_head_options
from socpo_fast.ops._impl import pick_impl
from socpo_fast.ops.linear_logprob import check_linear_inputs, linear_logprob_ref
from socpo_fast.ops.policy_loss import (
    DEFAULT_OPTIONS,
    PolicyLoss,
    PolicyLossOptions,
    check_loss_inputs,
    per_token,
    policy_loss_ref,
)


def linear_policy_loss_ref(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    metrics: Metrics,
    options: PolicyLossOptions,
) -> PolicyLoss:
    """`linear_policy_loss` with one advantage and one weight a token, unchecked."""
    has_loss_N = weights_N != 0
    wanted_N = has_loss_N & (advantages_N != 0) if options.needs_advantage else has_loss_N
    wanted = (torch.ones_like(wanted_N) if metrics == "all" else wanted_N).nonzero()[:, 0]
    logprobs, entropy = linear_logprob_ref(
        hidden_TD,
        weight_VD,
        targets_N[wanted],
        temperature=temperature[wanted] if isinstance(temperature, Tensor) else temperature,
        rows_N=wanted if rows_N is None else rows_N[wanted],
        entropy_grad=options.entropy_coef != 0,
    )
    compact = policy_loss_ref(
        logprobs,
        old_logprobs_N[wanted],
        advantages_N[wanted],
        weights_N[wanted],
        entropy_N=entropy,
        ref_logprobs_N=None if ref_logprobs_N is None else ref_logprobs_N[wanted],
        options=options,
    )
    skipped = logprobs.new_full((targets_N.numel(),), torch.nan)
    return PolicyLoss(
        loss=compact.loss,
        logprobs=skipped.index_copy(0, wanted, compact.logprobs),
        entropy=skipped.index_copy(0, wanted, compact.entropy),
        ratio=skipped.index_copy(0, wanted, compact.ratio),
        # a skipped row of advantage 0 counts as a loss row in which no clip held
        clip_fraction=compact.clip_fraction * has_loss_N[wanted].sum() / has_loss_N.sum().clamp(min=1),
    )


def linear_policy_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    old_logprobs_N: Tensor,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None = None,
    *,
    temperature: float | Tensor,
    rows_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    num_loss_tokens: float | None = None,
    ref_logprobs_N: Tensor | None = None,
    options: PolicyLossOptions = DEFAULT_OPTIONS,
    metrics: Metrics = "loss_rows",
    skip_below: float = 0.0,
    workspace_mib: float | None = None,
    impl: str = "auto",
) -> PolicyLoss:
    """The policy loss of packed tokens straight from hidden states, projecting only the rows that carry loss.

        logprob, entropy = linear_logprob(hidden, weight, targets, temperature, rows)
        loss             = policy_loss(logprob, old_logprobs, advantages, .., entropy)

    A row is skipped when its weight is 0, or its advantage is exactly 0 and there is no entropy or KL term.

    Args:
        hidden_TD, weight_VD, targets_N, temperature, rows_N: those of `linear_logprob`.
        old_logprobs_N, advantages, attempt_of_token_N, weights_N, num_loss_tokens, ref_logprobs_N,
        options: those of `policy_loss`.
        metrics: "loss_rows", or "all" to project skipped rows too, for their log-probs and entropies.
        skip_below: >= 0. Leaves 256 words of a row out of the gradient GEMMs where each |d loss / d logit| is smaller.
                 0 is exact; else, for an upstream gradient of 1, errors stay below skip_below sum over v
                 |W[v, d]| for each row that reads dX[t, d], and skip_below sum over n |X[n, d]| for dW[v, d].
        workspace_mib: > 0, MiB that a chunk of logits may take; at least 16 rows are projected at
                 once. None is 208 on a CPU and 2048 on a card.
        impl:    "auto", "ref", "cpp" or "triton".

    Returns:
        PolicyLoss; skipped rows are NaN in its per-token values unless metrics is "all".

    Raises:
        ValueError: an argument breaks the rules of `linear_logprob` or `policy_loss`.

    Gradient: hidden (repeated rows summed in index order), weight; fp32 accumulation; create_graph gives it no graph.
    Memory: one chunk of logits, and from the forward on the gradients; beside dX by default at most
    dW + 256 MiB on a CPU and dW + 2048 MiB + 256 MiB on a card. Bitwise: same inputs, same bits; on
    the CPU a row's log-prob, entropy, ratio and dX are those it would have alone.
    Source: those of `linear_logprob` and `policy_loss`.
    """
    where = "linear_policy_loss"
    check = TensorChecker(where)
    check_linear_inputs(check, hidden_TD, weight_VD, targets_N, temperature, rows_N)
    check_word(where, "metrics", metrics, get_args(Metrics))
    check_head_options(where, workspace_mib, skip_below)
    weights_N = check_loss_inputs(
        check, old_logprobs_N, advantages, attempt_of_token_N, weights_N, num_loss_tokens, ref_logprobs_N, options
    )
    impl = pick_impl(where, impl, hidden_TD)
    given = hidden_TD, weight_VD, targets_N, old_logprobs_N
    how: dict[str, Any] = {"temperature": temperature, "rows_N": rows_N, "ref_logprobs_N": ref_logprobs_N}
    how |= {"options": options, "metrics": metrics}
    if impl == "ref":
        advantages_N = per_token(advantages, attempt_of_token_N)
        return linear_policy_loss_ref(*given, advantages_N, weights_N, **how)
    how |= {"skip_below": skip_below, "workspace_mib": workspace_mib, "impl": impl}
    return fused_policy_loss(*given, advantages, attempt_of_token_N, weights_N, **how)
