"""The gradient of one update, and log-probabilities under the model as it is.

Read top-down: policy_gradients -> _backward, compute_logprobs, _forward. Differences from the textbook trainer:

- The normaliser is the update's, never a microbatch's: packing and splitting change speed, not the gradient.
- Only rows that predict a loss token meet the LM head, and nothing is padded.
- The advantage is one number an attempt; it is spread over the attempt's tokens inside the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from socpo_fast.model.decoder import Decoder, turned_heads
from socpo_fast.ops.linear_logprob import linear_logprob
from socpo_fast.ops.linear_policy_loss import linear_policy_loss
from socpo_fast.ops.packed_attention import packed_attention
from socpo_fast.ops.policy_loss import LossOptions, PolicyLoss
from socpo_fast.train.loss_inputs import (
    LossAgg,
    PerToken,
    attempt_advantages,
    attempt_weights,
    check_options,
    gather_tokens,
)
from socpo_fast.train.packing import PackedMicrobatch, Packing, count_unique_tokens, pack_rollouts
from socpo_fast.types import Rollout


@dataclass(frozen=True, kw_only=True)
class GradientStats:
    """What one call of policy_gradients did.

    entropy, ratio and mismatch are over the loss tokens whose log-prob was computed (an advantage of exactly 0 needs
    none); nan when there is none. sampler_mismatch is |logprob - the sampler's|: rounding alone as long as the weights
    are the sampler's.
    """

    loss: float
    entropy: float  # nats
    ratio_mean: float
    clip_fraction: float
    sampler_mismatch_max_nats: float
    sampler_mismatch_mean_nats: float
    tokens_forwarded: int
    unique_tokens: int  # nodes of the groups' trees: prompt once, attempts, bridges
    loss_tokens: int
    num_microbatches: int


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
    old_logprobs: PerToken | None = None,
    loss_agg: LossAgg = "token_mean",
    ref_logprobs: PerToken | None = None,
    tis_clip: float | None = None,
    checkpointing: bool = False,
    impl: str = "auto",
    **loss_options: Unpack[LossOptions],
) -> GradientStats:
    """Accumulate into .grad the gradient of the policy loss of these rollouts; takes no optimizer step.

        loss = sum over loss tokens t of w_t * l_t        l_t: ops.policy_loss, A = the attempt's advantage
        token_mean               w_t = 1 / num_loss_tokens
        seq_mean_token_mean      w_t = 1 / (num_attempts * L)            L: tokens of t's attempt
        seq_mean_token_sum_norm  w_t = 1 / (num_attempts * max_new_tokens)
        with tis_clip            w_t *= min(exp(old_logprob - sampler_logprob), tis_clip)

    Args:
        student:        the policy, on any device.
        rollouts:       with each turn's advantage filled. Those without turns count for nothing.
        packing, token_budget: those of pack_rollouts.
        temperature:    > 0. The sampler's own; no default, since a mismatch biases every ratio.
        num_loss_tokens, num_attempts: the update's, when this call is only part of it; default: of these rollouts.
        max_new_tokens: the sampler's, for loss_agg="seq_mean_token_sum_norm" only, which needs it.
        old_logprobs:   [rollout][attempt] -> [L] fp32, nats; None: the sampler's.
        ref_logprobs:   the same under the frozen reference; for kl_coef > 0.
        clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_estimator: those of ops.policy_loss.
        tis_clip:       > 0, upper bound of the truncated importance weight; None: no such weight.
        checkpointing:  recompute each layer in the backward: less memory, a third more compute.

    Raises:
        ValueError: an unknown choice, a missing normaliser, or values that do not fit the attempts.

    Memory: activations of one microbatch. Bitwise: same inputs, same bits; packings and budgets agree to rounding.
    """
    check_options(loss_agg, num_loss_tokens, num_attempts, max_new_tokens, tis_clip)
    lengths = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    norm_tokens = sum(lengths) if num_loss_tokens is None else num_loss_tokens
    norm_attempts = len(lengths) if num_attempts is None else num_attempts
    microbatches = pack_rollouts(rollouts, packing=packing, token_budget=token_budget)
    backward = partial(
        _backward,
        tis_clip=tis_clip,
        checkpointing=checkpointing,
        impl=impl,
        temperature=temperature,
        **loss_options,
    )
    outcomes = []
    for microbatch in microbatches:
        weights_A = attempt_weights(microbatch, loss_agg, norm_tokens, norm_attempts, max_new_tokens)
        outcomes.append(backward(student, microbatch, rollouts, weights_A, old_logprobs, ref_logprobs))
    return _stats(outcomes, microbatches, rollouts)


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

    For recomputed old_logprobs, a reference model, and the mismatch with the sampler. Arguments as in policy_gradients.

    Returns:
        [rollout][attempt] -> [L] fp32 on the CPU, nats; parallel to the rollouts given.
    """
    device = student.lm_head.weight.device
    by_attempt: list[list[Tensor]] = [[torch.empty(0)] * len(rollout.attempts) for rollout in rollouts]
    with torch.no_grad():
        for microbatch in pack_rollouts(rollouts, packing=packing, token_budget=token_budget):
            logprobs_N, _ = linear_logprob(
                _forward(student, microbatch, checkpointing=False, impl=impl),
                student.lm_head.weight,
                microbatch.targets_N.to(device),
                temperature=temperature,
                rows_N=microbatch.rows_N.to(device),
                impl=impl,
            )
            sizes = [rollouts[place].attempts[attempt_idx].num_tokens for place, attempt_idx in microbatch.attempts]
            for (place, attempt_idx), logprobs_L in zip(
                microbatch.attempts, logprobs_N.cpu().split(sizes), strict=True
            ):
                by_attempt[place][attempt_idx] = logprobs_L.clone()
    return by_attempt


def _backward(
    student: Decoder,
    microbatch: PackedMicrobatch,
    rollouts: Sequence[Rollout],
    weights_A: Tensor,
    old_logprobs: PerToken | None,
    ref_logprobs: PerToken | None,
    *,
    tis_clip: float | None,
    checkpointing: bool,
    impl: str,
    **loss_options: Any,
) -> PolicyLoss:
    """Forward and backward of one microbatch; returns |logprob - sampler's| in place of the log-probs."""
    device = student.lm_head.weight.device
    gather = partial(gather_tokens, microbatch=microbatch, rollouts=rollouts, device=device)
    sampler_N = gather([[attempt.logprobs for attempt in rollout.attempts] for rollout in rollouts], "sampler logprobs")
    old_N = sampler_N if old_logprobs is None else gather(old_logprobs, "old_logprobs")
    weights_N = weights_A[microbatch.attempt_of_token_N].to(device)
    if tis_clip is not None:
        # a nan is left to the loss, where it skips the update
        weights_N = weights_N * (old_N - sampler_N).exp().clamp(max=tis_clip).nan_to_num(nan=1.0)
    policy = linear_policy_loss(
        _forward(student, microbatch, checkpointing=checkpointing, impl=impl),
        student.lm_head.weight,
        microbatch.targets_N.to(device),
        old_N,
        attempt_advantages(microbatch, rollouts).to(device),
        microbatch.attempt_of_token_N.to(device),
        rows_N=microbatch.rows_N.to(device),
        weights_N=weights_N,
        ref_logprobs_N=None if ref_logprobs is None else gather(ref_logprobs, "ref_logprobs"),
        impl=impl,
        **loss_options,
    )
    policy.loss.backward()
    return policy._replace(loss=policy.loss.detach(), logprobs=(policy.logprobs - sampler_N).abs())


def _forward(student: Decoder, microbatch: PackedMicrobatch, *, checkpointing: bool, impl: str) -> Tensor:
    """Hidden states of the packed tokens; keys come from the rows of a token's own path."""
    config, device = student.config, student.lm_head.weight.device
    scale = config.head_dim**-0.5
    impl = "ref" if impl == "ref" else "auto"  # "cpp" and "triton" name the head's: attention has neither

    def attend(layer_idx: int, qkv_THE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q_THE, k_TKE, v_TKE = turned_heads(qkv_THE, rotary, config.num_kv_heads)
        return packed_attention(q_THE, k_TKE, v_TKE, microbatch.segments, scale=scale, impl=impl)

    token_ids_T, positions_T = microbatch.token_ids_T.to(device), microbatch.positions_T.to(device)
    hidden_TD = student(token_ids_T, positions_T, attend, checkpointing=checkpointing)
    return hidden_TD.to(student.lm_head.weight.dtype)  # wider only for bf16 weights on a CPU


def _stats(
    outcomes: list[PolicyLoss], microbatches: list[PackedMicrobatch], rollouts: Sequence[Rollout]
) -> GradientStats:
    """Put microbatches together; `outcomes` are those of _backward. The only host sync."""
    values = [torch.stack((policy.logprobs, policy.entropy, policy.ratio)).double() for policy in outcomes]
    values_3N = torch.cat(values, dim=1) if values else torch.empty(3, 0)
    mismatch_N, entropy_N, ratio_N = values_3N[:, ~values_3N[0].isnan()]
    sizes = [microbatch.targets_N.numel() for microbatch in microbatches]
    clipped = sum(float(policy.clip_fraction) * size for policy, size in zip(outcomes, sizes, strict=True))
    return GradientStats(
        loss=sum(float(policy.loss) for policy in outcomes),
        entropy=float(entropy_N.mean()),
        ratio_mean=float(ratio_N.mean()),
        clip_fraction=clipped / max(1, sum(sizes)),
        sampler_mismatch_max_nats=float(mismatch_N.max()) if mismatch_N.numel() else math.nan,
        sampler_mismatch_mean_nats=float(mismatch_N.mean()),
        tokens_forwarded=sum(microbatch.tokens_forwarded for microbatch in microbatches),
        unique_tokens=count_unique_tokens(rollouts),
        loss_tokens=sum(sizes),
        num_microbatches=len(microbatches),
    )
