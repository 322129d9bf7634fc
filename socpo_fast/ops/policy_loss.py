"""Computes the clipped policy loss from log-probs.

Read policy_loss_ref, the formula in plain torch, then policy_loss, which checks and calls it.

Departures from the textbook:

- The loss is a weighted sum. The weights hold the normaliser, which belongs to the whole update, so
  splitting an update into microbatches changes nothing.
- A row of weight 0 adds nothing to loss and gradient, even if its log-probs are NaN.
- Where the ratio lies exactly on a clip bound, the gradient passes.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from socpo_fast.ops._checks import INDEX, WIDE_FLOATS, TensorChecker, check_rule, check_word
from socpo_fast.ops._head import keep_rows

KLEstimator = Literal["k1", "k2", "k3"]

KL_ESTIMATORS: tuple[str, ...] = get_args(KLEstimator)
_MAX_LOG_RATIO = 20.0  # nats; keeps exp() finite where two log-probs of a token are far apart


@dataclass(frozen=True, kw_only=True)
class PolicyLossOptions:
    """The settings of the clipped policy loss; the formula is in policy_loss.

    Args:
        clip_low:     in [0, 1]; ratios below 1 - clip_low are clipped.
        clip_high:    finite and >= 0; ratios above 1 + clip_high are clipped.
        dual_clip:    finite and > 1, cap on the loss at negative advantage; None turns it off.
        entropy_coef: finite; bonus per nat of entropy.
        kl_coef:      finite and >= 0; needs the log-probs of a reference when it is not 0.
        kl_estimator: "k1", "k2" or "k3".

    Raises:
        ValueError: a value breaks its rule.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self) -> None:
        rules = {
            "clip_low": (0 <= self.clip_low <= 1, "in [0, 1]"),
            "clip_high": (0 <= self.clip_high < math.inf, "finite and >= 0"),
            "dual_clip": (
                self.dual_clip is None or 1 < self.dual_clip < math.inf,
                "finite and > 1, or None",
            ),
            "entropy_coef": (abs(self.entropy_coef) < math.inf, "finite"),
            "kl_coef": (0 <= self.kl_coef < math.inf, "finite and >= 0"),
        }
        for name, (holds, rule) in rules.items():
            check_rule("PolicyLossOptions", name, getattr(self, name), holds, rule)
        check_word("PolicyLossOptions", "kl_estimator", self.kl_estimator, KL_ESTIMATORS)

    @property
    def needs_advantage(self) -> bool:
        """Whether only the advantage gives a row a gradient: no entropy bonus, no KL."""
        return self.entropy_coef == 0 and self.kl_coef == 0

    def flat(self) -> tuple[float, float, float, float, float, int]:
        """Returns the settings as kernels take them: dual_clip inf is off, k1 to k3 are 1 to 3."""
        dual_clip = math.inf if self.dual_clip is None else self.dual_clip
        kl_estimator = KL_ESTIMATORS.index(self.kl_estimator) + 1
        return (
            self.clip_low,
            self.clip_high,
            dual_clip,
            self.entropy_coef,
            self.kl_coef,
            kl_estimator,
        )


DEFAULT_OPTIONS = PolicyLossOptions()


class PolicyLoss(NamedTuple):
    """The loss, which alone carries a gradient, and per-token values, NaN where not computed."""

    loss: Tensor  # scalar
    logprobs: Tensor  # [N], nats
    entropy: Tensor  # [N], nats
    ratio: Tensor  # [N], exp(logprob - old_logprob)
    clip_fraction: Tensor  # scalar, share of clipped rows among the rows of non-zero weight


def policy_loss_ref(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    options: PolicyLossOptions,
    entropy_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    sampler_logprobs_N: Tensor | None = None,
    tis_clip: float | None = None,
) -> PolicyLoss:
    """Computes `policy_loss`, unchecked, with one advantage and one weight a token."""
    has_loss_N = weights_N != 0
    old_logprobs_N = (
        (logprobs_N if old_logprobs_N is None else old_logprobs_N).detach().to(logprobs_N.dtype)
    )

    def only_loss_rows(x_N: Tensor) -> Tensor:
        """Returns x with zeros, which carry no gradient, in rows without loss."""
        return x_N.where(has_loss_N, 0)

    logprobs = only_loss_rows(logprobs_N)
    old = only_loss_rows(old_logprobs_N)
    advantages, weights = (only_loss_rows(x).to(logprobs.dtype) for x in (advantages_N, weights_N))
    # Truncated importance sampling: the engine and the trainer differ a little in the log-prob of a
    # token, so the tokens are not quite samples of the old policy.
    if sampler_logprobs_N is not None and tis_clip is not None:
        sampler = only_loss_rows(sampler_logprobs_N.detach()).to(logprobs.dtype)
        weights = weights * (old - sampler).exp().clamp(max=tis_clip)
    ratio = (logprobs - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    terms = torch.maximum(
        unclipped, -advantages * ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    )
    # At a negative advantage the loss grows with the ratio without bound; the dual clip bounds it.
    if options.dual_clip is not None:
        is_beyond = (advantages < 0) & (terms > -advantages * options.dual_clip)
        terms = torch.where(is_beyond, -advantages * options.dual_clip, terms)
    num_clipped = (terms.detach() != unclipped.detach()).sum()
    if entropy_N is not None and options.entropy_coef != 0:
        terms = terms - options.entropy_coef * only_loss_rows(entropy_N)
    if ref_logprobs_N is not None and options.kl_coef != 0:
        ref_logprobs = only_loss_rows(ref_logprobs_N.detach())
        terms = terms + options.kl_coef * _kl(logprobs, ref_logprobs, options.kl_estimator)
    log_ratio_N = (logprobs_N.detach() - old_logprobs_N).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return PolicyLoss(
        # Rows without loss are removed first: as zeros they would change the order of the sum.
        loss=keep_rows(has_loss_N, weights * terms)[0].sum(),
        logprobs=logprobs_N.detach(),
        entropy=torch.full_like(logprobs_N, torch.nan) if entropy_N is None else entropy_N.detach(),
        ratio=log_ratio_N.exp(),
        clip_fraction=num_clipped.to(ratio.dtype) / has_loss_N.sum().clamp(min=1),
    )


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor | None,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None = None,
    *,
    weights_N: Tensor | None = None,
    num_loss_tokens: float | None = None,
    entropy_N: Tensor | None = None,
    ref_logprobs_N: Tensor | None = None,
    sampler_logprobs_N: Tensor | None = None,
    tis_clip: float | None = None,
    options: PolicyLossOptions = DEFAULT_OPTIONS,
) -> PolicyLoss:
    """Computes PPO's clipped loss with dual clip, entropy bonus and KL, a weighted sum over tokens.

        ratio = exp(clamp(logprob - old_logprob, -20, 20))
        l     = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))
        l     = min(l, -A dual_clip)                      where A < 0
        loss  = sum of w (l - entropy_coef entropy + kl_coef KL) over rows of weight w != 0

        d     = clamp(ref_logprob - logprob, -20, 20)
        KL    = -d (k1),  d^2 / 2 (k2)  or  exp(d) - 1 - d (k3)

    With tis_clip, w is multiplied by min(exp(old_logprob - sampler_logprob), tis_clip), which
    carries no gradient.

    Args:
        logprobs_N:         [N] fp32 or fp64, nats. The only argument with a gradient besides
                            entropy_N.
        old_logprobs_N:     [N] fp32 or fp64, nats, of the policy before the batch's first update.
                            None: logprobs_N without its gradient, so that every ratio is 1.
        advantages:         [N] fp32 or fp64, finite; or, with attempt_of_token_N, [A], one per
                            attempt.
        attempt_of_token_N: [N] int64, each in [0, A): the attempt of a token.
        weights_N:          [N] fp32 or fp64, finite, >= 0: normaliser, importance weights and mask
                            in one. A row of weight 0 is left out; its log-probs may be NaN.
        num_loss_tokens:    > 0, of the whole update, not of a microbatch. Instead of weights_N:
                            every weight is 1 / num_loss_tokens.
        entropy_N:          [N] fp32 or fp64, nats; needed, with a gradient, when entropy_coef is
                            not 0.
        ref_logprobs_N:     [N] fp32 or fp64, nats, of a frozen reference; needed when kl_coef is
                            not 0.
        sampler_logprobs_N: [N] fp32 or fp64, nats, of the engine that sampled the tokens; needed
                            with tis_clip.
        tis_clip:           > 0, bound of the truncated importance weight; None: no such weight.
        options:            clips, entropy bonus and KL.

    Returns:
        PolicyLoss; per-token values for all N rows, entropy NaN when entropy_N is None.

    Raises:
        ValueError: an argument breaks the rules above, or not exactly one of weights_N and
                    num_loss_tokens is given.

    Gradient: logprobs, entropy; zero for clipped rows. Bitwise: same inputs, same bits.
    Source: Schulman et al. 2017, arXiv:1707.06347; Ye et al. 2020, arXiv:1912.09729 (dual clip);
    http://joschu.net/blog/kl-approx.html (k1, k2, k3).
    """
    check = TensorChecker("policy_loss")
    check("logprobs_N", logprobs_N, WIDE_FLOATS)
    check.optional(WIDE_FLOATS, entropy_N=entropy_N)
    # A detached entropy would silently turn the bonus into a constant.
    if options.entropy_coef != 0:
        detached = entropy_N is None or (logprobs_N.requires_grad and not entropy_N.requires_grad)
        rule = (
            "given with its gradient (linear_logprob: entropy_grad=True) when entropy_coef is not 0"
        )
        got = entropy_N if entropy_N is None else "a detached one"
        check_rule("policy_loss", "entropy_N", got, not detached, rule)
    advantages_N, weights_N = check_loss_inputs(
        check,
        logprobs_N,
        advantages,
        attempt_of_token_N,
        weights_N,
        num_loss_tokens,
        old_logprobs_N,
        ref_logprobs_N,
        sampler_logprobs_N,
        tis_clip,
        options,
    )
    return policy_loss_ref(
        logprobs_N,
        old_logprobs_N,
        advantages_N,
        weights_N,
        options=options,
        entropy_N=entropy_N,
        ref_logprobs_N=ref_logprobs_N,
        sampler_logprobs_N=sampler_logprobs_N,
        tis_clip=tis_clip,
    )


def check_loss_inputs(
    check: TensorChecker,
    like: Tensor,
    advantages: Tensor,
    attempt_of_token_N: Tensor | None,
    weights_N: Tensor | None,
    num_loss_tokens: float | None,
    old_logprobs_N: Tensor | None,
    ref_logprobs_N: Tensor | None,
    sampler_logprobs_N: Tensor | None,
    tis_clip: float | None,
    options: PolicyLossOptions,
) -> tuple[Tensor, Tensor]:
    """Checks the rules of policy_loss' docstring; `check` must know N and the device already.

    Returns [N] advantages and [N] weights, without a gradient. Weights made from num_loss_tokens
    have dtype and device of old_logprobs_N, or of `like` if that is None.
    """
    if options.kl_coef != 0:
        check_rule(
            check.where,
            "ref_logprobs_N",
            None,
            ref_logprobs_N is not None,
            "given when kl_coef is not 0",
        )
    if tis_clip is not None:
        check_rule(
            check.where,
            "sampler_logprobs_N",
            None,
            sampler_logprobs_N is not None,
            "given with tis_clip",
        )
        check_rule(check.where, "tis_clip", tis_clip, tis_clip > 0, "> 0, or None")
    check.optional(
        WIDE_FLOATS,
        old_logprobs_N=old_logprobs_N,
        ref_logprobs_N=ref_logprobs_N,
        sampler_logprobs_N=sampler_logprobs_N,
    )
    name = "advantages_N" if attempt_of_token_N is None else "advantages_A"
    check(name, advantages, WIDE_FLOATS)
    check.finite(name, advantages)
    if attempt_of_token_N is not None:
        check("attempt_of_token_N", attempt_of_token_N, INDEX)
        check.index_range("attempt_of_token_N", attempt_of_token_N, advantages.numel())
        advantages = advantages[attempt_of_token_N]
    if (weights_N is None) == (num_loss_tokens is None):
        raise ValueError(
            f"{check.where}: exactly one of weights_N and num_loss_tokens must be given, got "
            f"{'neither' if weights_N is None else 'both'}",
        )
    if weights_N is not None:
        check("weights_N", weights_N, WIDE_FLOATS)
        check.finite("weights_N", weights_N, at_least=0)
        return advantages.detach(), weights_N.detach()
    assert num_loss_tokens is not None
    check_rule(
        check.where,
        "num_loss_tokens",
        num_loss_tokens,
        0 < num_loss_tokens < math.inf,
        "finite and > 0",
    )
    like = like if old_logprobs_N is None else old_logprobs_N
    return advantages.detach(), like.new_full((check.sizes["N"],), 1 / num_loss_tokens)


def _kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Returns a per-token estimate of KL(policy || reference), nats."""
    d = (ref_logprobs - logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else torch.expm1(d) - d
