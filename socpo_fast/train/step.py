"""The gradient of one update, and log-probabilities under the model as it is.

Read top-down: policy_gradients -> _backward, compute_logprobs, _forward. Differences from the
textbook trainer:

- The normaliser is the update's, never a microbatch's: packing and splitting change speed, not the
  gradient.
- Only rows that predict a loss token meet the LM head, and nothing is padded. A rollout is idle
  where its advantages are exactly 0, as in a group all right or all wrong under an estimator that
  does not whiten. It counts in the normalisers and is not forwarded (loss_inputs.drop_idle).
- The advantage is one number an attempt; it is spread over the attempt's tokens inside the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from socpo_fast.device import upload, upload_together
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.model.accumulate import accumulating
from socpo_fast.ops.linear_logprob import linear_logprob
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.policy_loss import DEFAULT_OPTIONS, PolicyLoss, PolicyLossOptions
from socpo_fast.train.loss_inputs import (
    LossAgg,
    OldLogprobs,
    PerToken,
    attempt_advantages,
    attempt_weights,
    check_options,
    drop_idle,
    upload_tokens,
)
from socpo_fast.train.packing import PackedMicrobatch, Packing, count_unique_tokens, pack_rollouts
from socpo_fast.types import Rollout


class Figures(NamedTuple):
    """Of one call of policy_gradients, in numbers.

    entropy, ratio and mismatch are over the loss tokens whose log-prob was computed (an advantage
    of exactly 0 needs none); nan when there is none. The mismatch is |logprob - the sampler's|:
    rounding alone as long as the weights are the sampler's.
    """

    loss: float
    entropy: float  # nats
    ratio_mean: float
    clip_fraction: float
    sampler_mismatch_max_nats: float
    sampler_mismatch_mean_nats: float


@dataclass(frozen=True, kw_only=True)
class GradientStats:
    """What one call of policy_gradients did."""

    figures_6: Tensor  # fp64, on the student's device: those of Figures, in its order
    tokens_forwarded: int
    unique_tokens: int  # nodes of the groups' trees: prompt once, attempts, bridges; idle ones too
    loss_tokens: int  # sampled tokens, idle rollouts' too
    num_microbatches: int
    idle_rollouts: int  # whose advantages are all 0, so that they were not forwarded

    @cached_property
    def figures(self) -> Figures:
        """The figures, for which the host waits when it first asks."""
        return Figures(*self.figures_6.tolist())

    @property
    def loss(self) -> float:
        return self.figures.loss


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
    """Accumulate into .grad the gradient of the policy loss of these rollouts; takes no optimizer
    step.

        loss = sum over loss tokens t of w_t * l_t        l_t: ops.policy_loss, A = the attempt's
        advantage token_mean               w_t = 1 / num_loss_tokens
        seq_mean_token_mean      w_t = 1 / (num_attempts * L)            L: tokens of t's attempt
        seq_mean_token_sum_norm  w_t = 1 / (num_attempts * max_new_tokens)

    Args:
        student:        the policy, on any device.
        rollouts:       with each turn's advantage filled, unless advantages_A is given. Those
                        without turns count for nothing; with advantages of 0 alone, no entropy
                        bonus and no KL, they are not forwarded.
        packing, token_budget: those of pack_rollouts. options: clips, entropy bonus and KL, as of
                               ops.policy_loss.
        temperature:    > 0. The sampler's own; no default, since a mismatch biases every ratio.
        num_loss_tokens, num_attempts: the update's, when this call is only part of it; default: of
                                       these rollouts.
        max_new_tokens: the sampler's, for loss_agg="seq_mean_token_sum_norm" only, which needs it.
        advantages_A:   [A] fp32 on the student's device, rollout by rollout; a turn's own 0 still
                        means: not forwarded.
        old_logprobs:   [rollout][attempt] -> [L] fp32, nats; None: the sampler's; "current": the
                        student's, ratio 1.
        ref_logprobs:   the same under the frozen reference; for kl_coef > 0.
        tis_clip:       > 0: w_t *= min(exp(old_logprob - sampler_logprob), tis_clip); None: no such
                        weight.
        checkpointing:  recompute each layer in the backward: less memory, a third more compute.
        impl:           of the LM head, as of ops.linear_policy_loss; "ref" is attention's as well.

    Raises:
        ValueError: an unknown choice, a missing normaliser, or values that do not fit the attempts.

    What ends it early leaves .grad partly filled; drop it. Memory: activations of one microbatch.
    Bitwise: same inputs, same bits; packings and budgets agree to rounding.
    """
    check_options(loss_agg, num_loss_tokens, num_attempts, max_new_tokens, tis_clip)
    lengths = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    norm_tokens = sum(lengths) if num_loss_tokens is None else num_loss_tokens
    norm_attempts = len(lengths) if num_attempts is None else num_attempts
    forwarded = drop_idle(rollouts, options)
    microbatches = pack_rollouts(forwarded, packing=packing, token_budget=token_budget)
    advantages_A = attempt_advantages(rollouts, advantages_A, student.lm_head.weight.device)
    with accumulating():
        outcomes = [
            _backward(
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
            for microbatch in microbatches
        ]
    return GradientStats(
        figures_6=_figures(outcomes, microbatches, sum(lengths), student.lm_head.weight.device),
        tokens_forwarded=sum(microbatch.tokens_forwarded for microbatch in microbatches),
        unique_tokens=count_unique_tokens(rollouts),
        loss_tokens=sum(lengths),
        num_microbatches=len(microbatches),
        idle_rollouts=sum(
            len(x.turns) > len(y.turns) for x, y in zip(rollouts, forwarded, strict=True)
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
    """Log-probs of every sampled token under the student as it is now, without gradient.

    For recomputed old_logprobs, a reference model, and the mismatch with the sampler. Arguments as
    in policy_gradients.

    Returns:
        [rollout][attempt] -> [L] fp32 on the CPU, nats; parallel to the rollouts given.
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
    for microbatch, logprobs_N in outcomes:  # the host waits when all are under way
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
    """Forward and backward of one microbatch; returns |logprob - sampler's| in place of the
    log-probs.

    The head runs backward first, so that its gradient is in .grad before the layers need memory.
    """
    token_ids_T, positions_T, tokens = upload_tokens(
        microbatch, rollouts, weights_A, old_logprobs, ref_logprobs, student.lm_head.weight.device
    )
    hidden_TD = _forward(
        student, token_ids_T, positions_T, microbatch, checkpointing=checkpointing, impl=impl
    )
    head_input_TD = hidden_TD.detach().requires_grad_(hidden_TD.requires_grad)
    policy = linear_policy_loss(
        head_input_TD,
        student.lm_head.weight,
        advantages=advantages_A,
        **tokens,
        tis_clip=tis_clip,
        temperature=temperature,
        options=options,
        impl=impl,
    )
    policy.loss.backward()
    if head_input_TD.grad is not None:
        hidden_TD.backward(head_input_TD.grad)
    return policy._replace(
        loss=policy.loss.detach(), logprobs=(policy.logprobs - tokens["sampler_logprobs_N"]).abs()
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
    """Hidden states of the packed tokens."""
    return packed_forward(
        student,
        token_ids_T,
        positions_T,
        microbatch.visible_until_T,
        checkpointing=checkpointing,
        impl="ref" if impl == "ref" else "auto",  # "cpp" and "triton" name the head's
    )


def _figures(
    outcomes: list[PolicyLoss],
    microbatches: list[PackedMicrobatch],
    num_loss_tokens: int,
    device: torch.device,
) -> Tensor:
    """[6] fp64: the values of Figures, from what _backward returned, without a host sync."""
    if not outcomes:
        values = [0.0, math.nan, math.nan, 0.0, math.nan, math.nan]
        return upload(torch.tensor(values, dtype=torch.float64), device)
    by_token_3N = torch.cat(
        [torch.stack((x.logprobs, x.entropy, x.ratio)) for x in outcomes], dim=1
    ).double()
    mismatch_N = by_token_3N[0]
    mismatch, entropy, ratio = by_token_3N.nanmean(dim=1)
    # nan, as the mean is, when all are skipped
    mismatch_max = mismatch_N.where(~mismatch_N.isnan(), 0.0).amax() + 0.0 * mismatch
    losses = torch.stack([policy.loss for policy in outcomes]).double()
    clipped = [
        x.clip_fraction.double() * y.targets_N.numel()
        for x, y in zip(outcomes, microbatches, strict=True)
    ]
    clip_fraction = torch.stack(clipped).sum() / num_loss_tokens
    return torch.stack((losses.sum(), entropy, ratio, clip_fraction, mismatch_max, mismatch))
