"""Computes the gradient of one update, and log-probabilities under the current weights.

Read top-down: policy_gradients -> gradient_microbatches -> _backward, compute_logprobs, _forward.
Differences from the
textbook trainer:

- The loss is normalised over the whole update, never over a microbatch. How rollouts are packed and
  split therefore changes the speed, not the gradient.
- Only rows that predict a loss token pass the LM head, and nothing is padded.
- A rollout is idle if its advantages are exactly 0, as in a group that is all correct or all wrong,
  under an estimator that does not whiten. An idle rollout counts in the normalisers but is not
  forwarded (loss_inputs.drop_idle).
- The advantage is one number per attempt. The loss applies it to each of the attempt's tokens.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from socpo_fast.device import upload, upload_together
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.model.accumulate import accumulating
from socpo_fast.ops.linear_logprob import linear_logprob
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.policy_loss import DEFAULT_OPTIONS, PolicyLoss, PolicyLossOptions
from socpo_fast.training.loss_inputs import (
    LossAgg,
    OldLogprobs,
    PerToken,
    attempt_advantages,
    attempt_weights,
    check_options,
    drop_idle,
    upload_tokens,
)
from socpo_fast.training.packing import (
    PackedMicrobatch,
    Packing,
    count_unique_tokens,
    pack_rollouts,
)
from socpo_fast.types import Rollout


class LossStats(NamedTuple):
    """The numbers of one call of policy_gradients.

    entropy, ratio and mismatch are taken over the loss tokens whose log-prob was computed. A token
    with an advantage of exactly 0 needs no log-prob. If there are no such tokens they are nan. The
    mismatch is |logprob - sampler_logprob|. It is rounding only, as long as the weights are those
    that the sampler used. approx_kl estimates KL(old policy || this one) from the sampled tokens,
    without bias: the mean of ratio - 1 - log(ratio), known as k3.

    Source of k3: Schulman 2020, joschu.net/blog/kl-approx.html.
    """

    loss: float
    entropy: float  # nats
    ratio_mean: float
    clip_fraction: float
    sampler_mismatch_max_nats: float
    sampler_mismatch_mean_nats: float
    approx_kl: float  # nats, >= 0


@dataclass(frozen=True, kw_only=True)
class GradientStats:
    """The outcome of one call of policy_gradients."""

    loss_stats_7: Tensor  # fp64, on the student's device: the fields of LossStats, in its order
    tokens_forwarded: int
    unique_tokens: int  # nodes of the groups' trees: prompt once, attempts, bridges; idle included
    loss_tokens: int  # sampled tokens, idle rollouts included
    num_microbatches: int
    idle_rollouts: int  # not forwarded, because all their advantages are 0

    @cached_property
    def figures(self) -> LossStats:
        """Returns the figures on the host; the first access waits for the device."""
        return LossStats(*self.loss_stats_7.tolist())

    @property
    def loss(self) -> float:
        """Returns the loss; the first access waits for the device."""
        return self.figures.loss


class UpdateProgress(NamedTuple):
    """How far the updates of a batch are. `metrics` is set where an update has ended."""

    work: Literal["log-probs", "microbatch"]  # of groups; of the current update
    done: int
    total: int
    metrics: dict[str, float] | None = None


def policy_gradients(
    student: Decoder,
    rollouts: Sequence[Rollout],
    *,
    packing: Packing = "tree",
    token_budget: int,
    temperature: float,
    num_loss_tokens: int | None = None,
    num_attempts: int | None = None,
    max_new_tokens: int | None = None,
    advantages_A: Tensor | None = None,
    old_logprobs: OldLogprobs = None,
    loss_agg: LossAgg = "token_mean",
    ref_logprobs: PerToken | None = None,
    options: PolicyLossOptions = DEFAULT_OPTIONS,
    tis_clip: float | None = None,
    checkpointing: bool = False,
    impl: str = "auto",
) -> GradientStats:
    """Accumulates the gradient of the policy loss into .grad; takes no optimizer step.

        loss = sum over loss tokens t of w_t * l_t
        l_t: the loss of ops.policy_loss, with the advantage of t's attempt
        w_t: by loss_agg, where L is the number of tokens of t's attempt
            token_mean               1 / num_loss_tokens
            seq_mean_token_mean      1 / (num_attempts * L)
            seq_mean_token_sum_norm  1 / (num_attempts * max_new_tokens)

    Args:
        student:        the policy, on any device.
        rollouts:       with each turn's advantage filled, unless advantages_A is given. Rollouts
                        without turns are ignored. Rollouts whose advantages are all 0 are not
                        forwarded, if there is no entropy bonus and no KL.
        packing, token_budget: as in pack_rollouts.
        temperature:    > 0. The sampler's own; no default, since a mismatch biases every ratio.
        num_loss_tokens, num_attempts: of the whole update, if this call is only a part of it. The
                        default is the numbers of these rollouts.
        max_new_tokens: the sampler's. Only loss_agg="seq_mean_token_sum_norm" needs it.
        advantages_A:   [A] fp32 on the student's device, rollout by rollout. A rollout whose turns
                        have advantage 0 is still not forwarded.
        old_logprobs:   [rollout][attempt] -> [L] fp32, nats. None: the sampler's. "current": the
                        student's own, so that the ratio is 1.
        ref_logprobs:   the same under the frozen reference, for kl_coef > 0.
        options:        clips, entropy bonus and KL, as in ops.policy_loss.
        tis_clip:       > 0: w_t *= min(exp(old_logprob - sampler_logprob), tis_clip). None: no
                        such weight.
        checkpointing:  recompute each layer in the backward: less memory, a third more compute.
        impl:           of the LM head, as in ops.linear_policy_loss. "ref" also selects the
                        reference of attention.

    Raises:
        ValueError: an unknown choice, a missing normaliser, or values that do not fit the attempts.

    An exception leaves .grad partly filled: drop it. Memory: activations of one microbatch.
    Bitwise: same inputs, same bits. Other packings and budgets agree to rounding.
    """
    microbatches = gradient_microbatches(
        student,
        rollouts,
        packing=packing,
        token_budget=token_budget,
        temperature=temperature,
        num_loss_tokens=num_loss_tokens,
        num_attempts=num_attempts,
        max_new_tokens=max_new_tokens,
        advantages_A=advantages_A,
        old_logprobs=old_logprobs,
        loss_agg=loss_agg,
        ref_logprobs=ref_logprobs,
        options=options,
        tis_clip=tis_clip,
        checkpointing=checkpointing,
        impl=impl,
    )
    while True:
        try:
            next(microbatches)
        except StopIteration as end:
            return end.value


def gradient_microbatches(
    student: Decoder,
    rollouts: Sequence[Rollout],
    *,
    packing: Packing,
    token_budget: int,
    temperature: float,
    num_loss_tokens: int | None = None,
    num_attempts: int | None = None,
    max_new_tokens: int | None,
    advantages_A: Tensor | None,
    old_logprobs: OldLogprobs,
    loss_agg: LossAgg,
    ref_logprobs: PerToken | None,
    options: PolicyLossOptions,
    tis_clip: float | None,
    checkpointing: bool,
    impl: str = "auto",
) -> Generator[UpdateProgress, None, GradientStats]:
    """Does what policy_gradients does, one microbatch at a time; the arguments are the same.

    Yields after each one and returns the stats. It must run to its end, or .grad is only partly
    filled.
    """
    check_options(loss_agg, num_loss_tokens, num_attempts, max_new_tokens, tis_clip)
    attempt_lens = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    # Idle rollouts are counted here, before drop_idle: they weigh in the mean like any other.
    norm_tokens = sum(attempt_lens) if num_loss_tokens is None else num_loss_tokens
    norm_attempts = len(attempt_lens) if num_attempts is None else num_attempts
    forwarded = drop_idle(rollouts, options)
    microbatches = pack_rollouts(forwarded, packing=packing, token_budget=token_budget)
    advantages_A = attempt_advantages(rollouts, advantages_A, student.lm_head.weight.device)
    with accumulating(), student.shared.link_grads() if student.shared else nullcontext():
        outcomes = []
        for microbatch in microbatches:
            outcome = _backward(
                student,
                microbatch,
                rollouts,
                attempt_weights(microbatch, loss_agg, norm_tokens, norm_attempts, max_new_tokens),
                advantages_A,
                old_logprobs,
                ref_logprobs,
                tis_clip=tis_clip,
                checkpointing=checkpointing,
                impl=impl,
                temperature=temperature,
                options=options,
            )
            outcomes.append(outcome)
            yield UpdateProgress("microbatch", len(outcomes), len(microbatches))
    return GradientStats(
        loss_stats_7=_figures(
            outcomes, microbatches, sum(attempt_lens), student.lm_head.weight.device
        ),
        tokens_forwarded=sum(microbatch.tokens_forwarded for microbatch in microbatches),
        unique_tokens=count_unique_tokens(rollouts),
        loss_tokens=sum(attempt_lens),
        num_microbatches=len(microbatches),
        idle_rollouts=sum(
            len(full.turns) > len(kept.turns)
            for full, kept in zip(rollouts, forwarded, strict=True)
        ),
    )


@torch.no_grad()
def compute_logprobs(
    student: Decoder,
    rollouts: Sequence[Rollout],
    *,
    packing: Packing = "tree",
    token_budget: int,
    temperature: float,
    impl: str = "auto",
) -> list[list[Tensor]]:
    """Returns log-probs of every sampled token under the current student, without gradient.

    Used for recomputed old_logprobs, for a reference model, and to measure the mismatch with the
    sampler. The arguments are those of policy_gradients.

    Returns:
        [rollout][attempt] -> [L] fp32 on the CPU, nats; in the order of `rollouts`.
    """
    by_attempt: list[list[Tensor]] = [
        [torch.empty(0)] * len(rollout.attempts) for rollout in rollouts
    ]
    outcomes = []
    for microbatch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
        token_ids_T, positions_T, targets_N, rows_N = upload_together(
            [
                microbatch.token_ids_T,
                microbatch.positions_T,
                microbatch.targets_N,
                microbatch.rows_N,
            ],
            student.lm_head.weight.device,
        )
        logprobs_N, _ = linear_logprob(
            _forward(student, token_ids_T, positions_T, microbatch, checkpointing=False, impl=impl),
            student.lm_head.weight,
            targets_N,
            temperature=temperature,
            rows_N=rows_N,
            impl=impl,
        )
        outcomes.append((microbatch, logprobs_N))
    # Only now does the host wait. Inside the loop above, a wait would leave the device idle while
    # the next microbatch is launched.
    for microbatch, logprobs_N in outcomes:
        parts = logprobs_N.cpu().split(microbatch.attempt_of_token_N.bincount().tolist())
        for (rollout_idx, attempt_idx), logprobs_L in zip(microbatch.attempts, parts, strict=True):
            by_attempt[rollout_idx][attempt_idx] = logprobs_L.clone()
    return by_attempt


def _backward(
    student: Decoder,
    microbatch: PackedMicrobatch,
    rollouts: Sequence[Rollout],
    weights_A: Tensor,
    advantages_A: Tensor,
    old_logprobs: OldLogprobs,
    ref_logprobs: PerToken | None,
    *,
    tis_clip: float | None,
    checkpointing: bool,
    impl: str,
    temperature: float,
    options: PolicyLossOptions,
) -> PolicyLoss:
    """Runs forward and backward of one microbatch.

    Returns the outcome of the loss with |logprob - sampler_logprob| in the field `logprobs`.
    """
    token_ids_T, positions_T, tokens = upload_tokens(
        microbatch, rollouts, weights_A, old_logprobs, ref_logprobs, student.lm_head.weight.device
    )
    hidden_TD = _forward(
        student, token_ids_T, positions_T, microbatch, checkpointing=checkpointing, impl=impl
    )
    # The graph is cut below the LM head. The head runs its backward first and frees its buffers
    # before the layers' backward needs memory.
    head_input_TD = hidden_TD.detach().requires_grad_(hidden_TD.requires_grad)
    outcome = linear_policy_loss(
        head_input_TD,
        student.lm_head.weight,
        advantages=advantages_A,
        **tokens,
        tis_clip=tis_clip,
        temperature=temperature,
        options=options,
        impl=impl,
    )
    outcome.loss.backward()
    # There is no gradient when the student's layers are frozen.
    if head_input_TD.grad is not None:
        hidden_TD.backward(head_input_TD.grad)
    return outcome._replace(
        loss=outcome.loss.detach(), logprobs=(outcome.logprobs - tokens["sampler_logprobs_N"]).abs()
    )


def _forward(
    student: Decoder,
    token_ids_T: Tensor,
    positions_T: Tensor,
    microbatch: PackedMicrobatch,
    *,
    checkpointing: bool,
    impl: str,
) -> Tensor:
    """Returns the hidden states of the packed tokens, [T, D]."""
    return packed_forward(
        student,
        token_ids_T,
        positions_T,
        microbatch.visible_until_T,
        checkpointing=checkpointing,
        # "cpp" and "triton" select an implementation of the LM head, not one of attention.
        impl="ref" if impl == "ref" else "auto",
    )


def _figures(
    outcomes: list[PolicyLoss],
    microbatches: list[PackedMicrobatch],
    num_loss_tokens: int,
    device: torch.device,
) -> Tensor:
    """Returns [7] fp64: the values of LossStats, from the results of _backward, without a sync."""
    if not outcomes:
        values = [0.0, math.nan, math.nan, 0.0, math.nan, math.nan, math.nan]
        return upload(torch.tensor(values, dtype=torch.float64), device)
    by_token_3N = torch.cat(
        [torch.stack((x.logprobs, x.entropy, x.ratio)) for x in outcomes], dim=1
    ).double()
    mismatch_N = by_token_3N[0]
    mismatch, entropy, ratio = by_token_3N.nanmean(dim=1)
    # In fp64 the rounding of the fp32 ratio does no harm: near 1 the slope of the estimate is 0.
    ratio_N = by_token_3N[2]
    approx_kl = (ratio_N - 1.0 - ratio_N.log()).nanmean()
    # Skipped tokens are nan. amax has no nan-ignoring form, so they are replaced by 0. Adding
    # 0 * mean makes the maximum nan when all tokens are skipped, as the mean is.
    mismatch_max = mismatch_N.where(~mismatch_N.isnan(), 0.0).amax() + 0.0 * mismatch
    losses = torch.stack([policy.loss for policy in outcomes]).double()
    clipped = [
        x.clip_fraction.double() * y.targets_N.numel()
        for x, y in zip(outcomes, microbatches, strict=True)
    ]
    clip_fraction = torch.stack(clipped).sum() / num_loss_tokens
    return torch.stack(
        (losses.sum(), entropy, ratio, clip_fraction, mismatch_max, mismatch, approx_kl)
    )
