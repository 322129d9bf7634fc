"""Computes an update's loss one token at a time, to compare the packed and fused code with.

Nothing of training/ is used, and of ops/ only the rotary embedding. Every attempt is forwarded by
itself behind its whole context, through any function from token ids to logits: a decoder whose
attention is written out, or transformers. A token's loss is a handful of scalars. Everything is in
fp64 if the model is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from socpo_fast.model.decoder import Decoder
from socpo_fast.ops.rotary import Rope, split_qkv_and_apply_rope
from socpo_fast.types import Rollout
from tests.helpers.made_rollouts import contexts

TEMPERATURE = 0.8
PerToken = list[list[Tensor]]
Forward = Callable[[list[int]], Tensor]


def decoder_forward(student: Decoder) -> Forward:
    """Returns a function from the token ids of one row to its [L, V] logits."""

    def attend(layer_idx: int, qkv_TXE: Tensor, rope: Rope) -> Tensor:
        q_THE, k_TKE, v_TKE = split_qkv_and_apply_rope(qkv_TXE, rope, student.config.num_kv_heads)
        heads_per_kv = q_THE.shape[1] // k_TKE.shape[1]
        k_THE = k_TKE.repeat_interleave(heads_per_kv, 1)
        v_THE = v_TKE.repeat_interleave(heads_per_kv, 1)
        scores = torch.einsum("the,she->hts", q_THE, k_THE) / q_THE.shape[-1] ** 0.5
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        return torch.einsum(
            "hts,she->the", scores.masked_fill(future, -torch.inf).softmax(-1), v_THE
        )

    def forward(token_ids: list[int]) -> Tensor:
        hidden_TD = student(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
        return hidden_TD @ student.lm_head.weight.T

    return forward


def naive_logprobs(forward: Forward, rollout: Rollout) -> list[tuple[Tensor, Tensor]]:
    """Returns (logprob, entropy) of every token of every attempt, [L] each."""
    pairs = []
    # A rollout without attempts still has a prompt, so the two lists may differ in length.
    for context, attempt in zip(contexts(rollout), rollout.attempts, strict=False):
        logits = forward(context + attempt.token_ids)[len(context) - 1 : -1] / TEMPERATURE
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        logprobs = probabilities[
            torch.arange(attempt.num_tokens), torch.tensor(attempt.token_ids)
        ].log()
        pairs.append((logprobs, -(probabilities * probabilities.log()).sum(-1)))
    return pairs


def token_loss(
    logprob: Tensor,
    old: float,
    advantage: float,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> tuple[Tensor, bool]:
    """Returns the loss of one token, and whether a clip replaced its ratio.

    Weights, entropy and KL come later.
    """
    ratio = (logprob - old).clamp(-20.0, 20.0).exp()
    low = 1 - clip_low
    high = 1 + clip_high
    if advantage >= 0:
        return (
            (-advantage * ratio, False)
            if ratio.item() <= high
            else (logprob.new_tensor(-advantage * high), True)
        )
    if ratio.item() < low:
        return logprob.new_tensor(-advantage * low), True
    if dual_clip is not None and ratio.item() > dual_clip:
        return logprob.new_tensor(-advantage * dual_clip), True
    return -advantage * ratio, False


def token_kl(logprob: Tensor, ref: float, estimator: str) -> Tensor:
    """Returns one token's estimate of the KL divergence from the reference."""
    log_ratio = ref - logprob
    if estimator == "k1":
        return -log_ratio
    return log_ratio**2 / 2 if estimator == "k2" else log_ratio.exp() - 1 - log_ratio


def naive_loss(
    forward: Forward,
    rollouts: list[Rollout],
    *,
    loss_agg: str = "token_mean",
    max_new_tokens: int | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    old: PerToken | None = None,
    ref: PerToken | None = None,
    tis_clip: float | None = None,
    **clips: Any,
) -> tuple[Tensor, float]:
    """Returns (loss with its graph, share of clipped tokens) of these rollouts as one update.

    old=None takes the sampler's log-probs as the old ones.
    """
    attempt_lens = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    terms = []
    num_clipped = 0
    for idx, rollout in enumerate(rollouts):
        for k, (logprobs, entropy) in enumerate(naive_logprobs(forward, rollout)):
            sampler = rollout.attempts[k].logprobs.tolist()
            olds = sampler if old is None else old[idx][k].tolist()
            for t, logprob in enumerate(logprobs):
                term, clipped = token_loss(logprob, olds[t], rollout.turns[k].advantage, **clips)
                num_clipped += clipped
                term = term - entropy_coef * entropy[t]
                if ref is not None:
                    term = term + kl_coef * token_kl(logprob, ref[idx][k][t].item(), kl_estimator)
                # Each kind of aggregation is a weight of the token.
                if loss_agg == "token_mean":
                    weight = 1 / sum(attempt_lens)
                elif loss_agg == "seq_mean_token_mean":
                    weight = 1 / len(attempt_lens) / len(logprobs)
                else:
                    assert max_new_tokens is not None
                    weight = 1 / len(attempt_lens) / max_new_tokens
                if tis_clip is not None:
                    weight *= min(math.exp(olds[t] - sampler[t]), tis_clip)
                terms.append(weight * term)
    return torch.stack(terms).sum(), num_clipped / len(terms)


def naive_gradients(
    student: Decoder, rollouts: list[Rollout], **options: Any
) -> tuple[dict[str, Tensor], float, float]:
    """Returns (gradient by parameter name, loss, share of clipped tokens).

    The options are those of naive_loss.
    """
    student.zero_grad(set_to_none=True)
    loss, clipped = naive_loss(decoder_forward(student), rollouts, **options)
    loss.backward()
    return (
        {name: param.grad.clone() for name, param in student.named_parameters()},
        loss.item(),
        clipped,
    )


def near_policy(student: Decoder, rollouts: list[Rollout], spread: float, seed: int) -> PerToken:
    """Returns fp32 log-probs near the student's, so that some ratios clip and others do not."""
    generator = torch.Generator().manual_seed(seed)
    forward = decoder_forward(student)
    with torch.no_grad():
        current = [
            [logprobs.float() for logprobs, _ in naive_logprobs(forward, rollout)]
            for rollout in rollouts
        ]
    return [
        [x + spread * torch.randn(x.shape, generator=generator) for x in attempts]
        for attempts in current
    ]


def set_sampler_logprobs(rollouts: list[Rollout], logprobs: PerToken) -> None:
    """Replaces the sampler's log-probs of all attempts."""
    for rollout, by_attempt in zip(rollouts, logprobs, strict=True):
        for attempt, logprobs_L in zip(rollout.attempts, by_attempt, strict=True):
            attempt.logprobs = logprobs_L


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Asserts that every entry is within tolerance of its tensor's largest entry."""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        error = (actual[name] - grad).abs().max()
        size = grad.abs().max()
        assert error <= tolerance * size, f"{name}: off by {error:.2e} of {size:.2e}"


def norm(grads: dict[str, Tensor]) -> float:
    """Returns the norm over all gradients together."""
    return float(sum(grad.double().square().sum() for grad in grads.values())) ** 0.5


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns the norm of the difference of two sets of gradients."""
    return norm({name: one[name].double() - other[name].double() for name in one})
