"""Compares the policy loss with values and gradients worked out by hand, one token a case."""

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from socpo_fast.ops import PolicyLossOptions, policy_loss
from tests.helpers.loss_options import gathered

# (advantage, ratio, loss, gradient) at clips 0.2 / 0.3 and a dual clip of 3. The gradient is that
# of the log-prob, which is -A ratio where nothing is clipped. Ratios are below, between and above
# all bounds, and beyond e^20 on both sides.
HAND_COMPUTED = [
    (2.0, 0.5, -1.0, -1.0),  # A > 0 is not clipped from below
    (2.0, 1.0, -2.0, -2.0),
    (2.0, 1.25, -2.5, -2.5),
    (2.0, 1.5, -2.6, 0.0),
    (2.0, math.exp(25), -2.6, 0.0),
    (2.0, math.exp(-25), -2 * math.exp(-20), 0.0),  # the log-ratio itself is clamped
    (-2.0, 0.5, 1.6, 0.0),
    (-2.0, 0.9, 1.8, 1.8),
    (-2.0, 1.0, 2.0, 2.0),
    (-2.0, 1.5, 3.0, 3.0),  # A < 0 is not clipped from above ..
    (-2.0, 2.9, 5.8, 5.8),  # .. up to the dual clip
    (-2.0, 4.0, 6.0, 0.0),
    (-2.0, math.exp(25), 6.0, 0.0),
    (0.0, 1.7, 0.0, 0.0),
]
WITH_KL = PolicyLossOptions(kl_coef=1.0)
WITH_ENTROPY = PolicyLossOptions(entropy_coef=0.1)
CLIPS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def one_token(advantage: float, log_ratio: float, **options: object) -> tuple[float, float]:
    """Returns loss and gradient of a single token, in fp64; its old log-prob is 0."""
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(1, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    result = policy_loss(logprobs, old, advantages, num_loss_tokens=1, **gathered(options))
    result.loss.backward()
    return result.loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(("advantage", "ratio", "loss", "grad"), HAND_COMPUTED)
def test_hand_computed_tokens(advantage: float, ratio: float, loss: float, grad: float) -> None:
    assert one_token(advantage, math.log(ratio), **CLIPS) == pytest.approx(
        (loss, grad), rel=1e-12, abs=1e-12
    )


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "bound"),
    [(2.0, 0.25, "clip_high"), (-2.0, -0.25, "clip_low"), (-2.0, 1.0, "dual_clip")],
)
def test_gradient_passes_exactly_on_a_bound(advantage: float, log_ratio: float, bound: str) -> None:
    """A ratio exactly on a bound is not clipped; just beyond it is, and has no gradient."""
    # Near 1 both 1 - ratio and ratio - 1 are exact, so the bound can be met exactly.
    ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    at_bound = {"clip_high": ratio - 1, "clip_low": 1 - ratio, "dual_clip": ratio}[bound]
    assert one_token(advantage, log_ratio, **(CLIPS | {bound: at_bound})) == (
        -advantage * ratio,
        -advantage * ratio,
    )
    assert one_token(advantage, log_ratio, **(CLIPS | {bound: at_bound - 1e-9}))[1] == 0.0


def test_dual_clip_can_be_off() -> None:
    assert one_token(-2.0, math.log(8.0), dual_clip=None) == pytest.approx((16.0, 16.0))


def test_ratio_and_clip_fraction() -> None:
    advantage, ratio, loss, _ = (
        torch.tensor(x, dtype=torch.float64) for x in zip(*HAND_COMPUTED, strict=True)
    )
    result = policy_loss(
        ratio.log(),
        torch.zeros_like(ratio),
        advantage,
        weights_N=torch.ones_like(ratio),
        **gathered(CLIPS),
    )
    assert result.loss.item() == pytest.approx(loss.sum().item())
    torch.testing.assert_close(result.ratio, ratio.clamp(math.exp(-20), math.exp(20)))
    assert result.clip_fraction.item() == pytest.approx(5 / 14)
    assert result.entropy.isnan().all()
    torch.testing.assert_close(result.logprobs, ratio.log())


@pytest.mark.parametrize(
    ("estimator", "value", "grad"),
    # d = ref - logprob = 0.5
    [("k1", -0.5, 1.0), ("k2", 0.125, -0.5), ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5))],
)
def test_kl_estimators(estimator: str, value: float, grad: float) -> None:
    """Each estimator of the KL divergence has the value and gradient worked out by hand."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = policy_loss(
        logprobs,
        zero - 1,
        zero,
        num_loss_tokens=2,
        ref_logprobs_N=zero - 0.5,
        options=PolicyLossOptions(kl_coef=0.1, kl_estimator=estimator),
    ).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.05 * value)
    assert logprobs.grad.item() == pytest.approx(0.05 * grad)


def test_kl_stays_finite_far_from_the_reference() -> None:
    """500 nats from the reference the log-ratio is clamped, so loss and gradient stay finite."""
    logprobs = torch.tensor([-500.0], requires_grad=True)
    zero = torch.zeros(1)
    loss = policy_loss(
        logprobs, logprobs.detach(), zero, num_loss_tokens=1, ref_logprobs_N=zero, options=WITH_KL
    ).loss
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.item() == 0.0


def test_entropy_bonus_and_its_gradient() -> None:
    zero = torch.zeros(2)
    entropy = torch.tensor([1.0, 3.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.25])
    loss = policy_loss(
        zero, zero, zero, weights_N=weights, entropy_N=entropy, options=WITH_ENTROPY
    ).loss
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * (0.5 + 0.75))
    torch.testing.assert_close(entropy.grad, -0.1 * weights)


def test_aggregations_are_weights() -> None:
    """The three aggregations of the loss are three choices of weights.

    Worked out by hand for two attempts of 3 and 5 tokens at ratio 1.
    """
    zero = torch.zeros(8)
    attempt_of_token = torch.tensor([0] * 3 + [1] * 5)
    advantages = torch.tensor([1.0, -2.0])
    attempt_lens = torch.tensor([3.0, 5.0])
    token_mean = policy_loss(zero, zero, advantages, attempt_of_token, num_loss_tokens=8)
    seq_mean_token_mean = policy_loss(
        zero,
        zero,
        advantages,
        attempt_of_token,
        weights_N=(1 / (2 * attempt_lens))[attempt_of_token],
    )
    seq_mean_token_sum_norm = policy_loss(
        zero, zero, advantages, attempt_of_token, weights_N=torch.full((8,), 1 / (2 * 100))
    )
    assert token_mean.loss.item() == pytest.approx((-3 + 10) / 8)
    assert seq_mean_token_mean.loss.item() == pytest.approx((-1 + 2) / 2)
    assert seq_mean_token_sum_norm.loss.item() == pytest.approx((-3 + 10) / 200)


def test_rows_of_weight_zero_are_never_touched() -> None:
    """NaN or -inf in a row of weight 0 changes neither loss nor gradient."""
    logprobs = torch.tensor([-1.0, torch.nan, -torch.inf, -2.0], requires_grad=True)
    old = torch.tensor([-1.0, torch.nan, -torch.inf, -2.0])
    result = policy_loss(logprobs, old, torch.ones(4), weights_N=torch.tensor([1.0, 0.0, 0.0, 1.0]))
    result.loss.backward()
    assert result.loss.item() == -2.0
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0, -1.0]


def test_old_and_reference_logprobs_carry_no_gradient() -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    policy_loss(
        logprobs,
        logprobs,
        torch.ones(1),
        num_loss_tokens=1,
        ref_logprobs_N=logprobs,
        options=WITH_KL,
    ).loss.backward()
    assert logprobs.grad.item() == -1.0


def test_no_tokens() -> None:
    logprobs = torch.zeros(0, requires_grad=True)
    result = policy_loss(logprobs, torch.zeros(0), torch.zeros(0), num_loss_tokens=5)
    result.loss.backward()
    assert (result.loss.item(), result.clip_fraction.item(), logprobs.grad.shape) == (
        0.0,
        0.0,
        (0,),
    )


GOOD = {
    "logprobs_N": torch.zeros(2, requires_grad=True),
    "old_logprobs_N": torch.zeros(2),
    "advantages": torch.ones(2),
    "num_loss_tokens": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logprobs_N": torch.zeros(2, dtype=torch.float16)},
            r"logprobs_N must be float32/float64 \[N\], got float16 \[2\]",
        ),
        (
            {"old_logprobs_N": torch.zeros(3)},
            r"old_logprobs_N must be float32/float64 \[N=2\], got float32 \[3\]",
        ),
        (
            {"old_logprobs_N": torch.zeros(2, device="meta")},
            "old_logprobs_N must be on cpu, got meta; move it there first",
        ),
        (
            {"advantages": torch.tensor([1.0, torch.nan])},
            "advantages_N must be finite, got nan at 1",
        ),
        (
            {"attempt_of_token_N": torch.tensor([0, 2])},
            r"attempt_of_token_N must be in \[0, 2\), got 2 at 1",
        ),
        ({"num_loss_tokens": 0}, "num_loss_tokens must be finite and > 0, got 0"),
        (
            {"num_loss_tokens": None},
            "exactly one of weights_N and num_loss_tokens must be given, got neither",
        ),
        (
            {"weights_N": torch.ones(2)},
            "exactly one of weights_N and num_loss_tokens must be given, got both",
        ),
        (
            {"num_loss_tokens": None, "weights_N": torch.tensor([1.0, -1.0])},
            "weights_N must be finite and >= 0, got -1.0 at 1",
        ),
        (
            {"options": WITH_ENTROPY},
            r"entropy_N must be given with its gradient .* when entropy_coef is not 0, got None",
        ),
        (
            {"options": WITH_ENTROPY, "entropy_N": torch.ones(2)},
            r"entropy_N must be given with its gradient .*, got 'a detached one'",
        ),
        ({"options": WITH_KL}, "ref_logprobs_N must be given when kl_coef is not 0, got None"),
    ],
)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^policy_loss: {message}"):
        policy_loss(**(GOOD | change))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"clip_low": 1.5}, r"clip_low must be in \[0, 1\], got 1.5"),
        ({"clip_low": math.nan}, r"clip_low must be in \[0, 1\], got nan"),
        ({"clip_high": -0.1}, "clip_high must be finite and >= 0, got -0.1"),
        ({"dual_clip": 1.0}, "dual_clip must be finite and > 1, or None, got 1.0"),
        ({"entropy_coef": math.inf}, "entropy_coef must be finite, got inf"),
        ({"kl_coef": -0.1}, "kl_coef must be finite and >= 0, got -0.1"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, got 'k4'"),
    ],
)
def test_bad_options(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^PolicyLossOptions: {message}"):
        PolicyLossOptions(**option)


def test_options_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        PolicyLossOptions().clip_low = 0.1  # type: ignore[misc]


def test_not_a_tensor() -> None:
    with pytest.raises(
        TypeError, match=r"^policy_loss: advantages_N must be a torch.Tensor, got list"
    ):
        policy_loss(**(GOOD | {"advantages": [1.0, 1.0]}))
