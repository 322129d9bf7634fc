"""Checks that advantages and losses are those of verl and TRL, number by number.

The peers' own functions run on random batches: one to three attempts a rollout, attempts of unequal
length, questions with a single attempt, batches without any reward. Where numbers differ,
docs/embedding.md says why, and the test feeds what makes them equal: fp64 rewards (the peers
compute in the dtype they get, ours in fp64), and the peer's eps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast import socratic_advantages
from socpo_fast.ops import (
    PolicyLossOptions,
    compute_advantages,
    decay_rewards,
    linear_policy_loss,
    policy_loss,
)
from tests.helpers.peer_algorithms import ActorConfig, trl_trainer, verl_algorithms
from tests.helpers.peer_batches import (
    MAX_ATTEMPTS,
    MAX_TOKENS,
    LossCase,
    assert_equal,
    random_attempts,
    random_loss_case,
    verls_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # of TRL's settings

SCHEDULES = {"none": None, "batch_mean": None, "constant": 0.5}  # schedule: its factor
# Our estimator: verl's, and verl's settings for it.
VERLS = {
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", {}),
    "reinforce_plus_plus": ("reinforce_plus_plus", {"config": ActorConfig(gamma=1.0)}),
    "grpo": ("grpo", {"epsilon": 1e-6, "norm_adv_by_std_in_grpo": True}),
    "dr_grpo": ("grpo", {"norm_adv_by_std_in_grpo": False}),
    "rloo": ("rloo", {}),
}
VERLS_MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]


@pytest.fixture(scope="module")
def verl() -> ModuleType:
    return verl_algorithms()


@pytest.fixture(scope="module")
def trls_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl_trainer(tmp_path_factory.mktemp("trl"))


@pytest.fixture
def trl(trls_trainer: Any) -> Any:
    """Returns a shallow copy, so that a test may set attributes of it and of its args."""
    trainer = copy.copy(trls_trainer)
    trainer.args = copy.copy(trainer.args)
    return trainer


@pytest.mark.parametrize("estimator", VERLS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_advantages_are_verls(verl: ModuleType, estimator: str, schedule: str) -> None:
    """Decay and advantages equal verl's estimator on the decayed rewards, one row an attempt."""
    name, settings = VERLS[estimator]
    decay = {"schedule": schedule, "factor": SCHEDULES[schedule]}
    for seed in range(25):
        batch = random_attempts(seed)
        earned_A = decay_rewards(batch.rewards_A, batch.attempt_idx_A, **decay)
        rows = batch.token_rows(earned_A)
        theirs_AL, _ = verl.get_adv_estimator_fn(name)(**rows, **settings)
        # With all tokens of an attempt alike, its first one stands for it.
        theirs_A = theirs_AL[:, 0]
        ours_A = compute_advantages(*batch, **decay, estimator=estimator)
        assert_equal(ours_A, theirs_A, 1e-6)
        rewards_BT, mask_BT, attempt_BT, group_B = batch.rollout_rows()
        ours_BT = socratic_advantages(rewards_BT, mask_BT, group_B, **decay, estimator=estimator)
        assert_equal(ours_BT, torch.where(mask_BT, theirs_A[attempt_BT], 0), 1e-6)


def test_equal_rewards_are_0_where_verl_rounds(verl: ModuleType) -> None:
    """Equal rewards have advantages of exactly 0; in fp32 verl's mean is off, and eps magnifies it.

    That is why these tests feed verl fp64.
    """
    largest = 0.0
    for reward in (0.1, 0.3, 0.7, 0.9):
        for size in (6, 7):
            rewards_A = torch.full((size,), reward)
            zeros_A = torch.zeros(size, dtype=torch.int64)
            rows = verls_rows(rewards_A[:, None], zeros_A[:, None] + 1, zeros_A)
            theirs_A1, _ = verl.get_adv_estimator_fn("grpo")(**rows)
            ours_A = compute_advantages(rewards_A, zeros_A + 1, zeros_A, zeros_A, estimator="grpo")
            assert ours_A.tolist() == [0.0] * size
            largest = max(largest, float(theirs_A1.abs().max()))
    assert largest > 1e-3


def test_verls_returns_are_trajectory_credit(verl: ModuleType) -> None:
    """verl's REINFORCE++ hands a row's last reward to all its attempts: credit "trajectory"."""
    for seed in range(25):
        batch = random_attempts(seed)
        rewards_BT, mask_BT, attempt_BT, group_B = batch.rollout_rows()
        # An attempt that another one follows was wrong.
        rewards_BT = rewards_BT.where(attempt_BT == attempt_BT.amax(1, keepdim=True), 0)
        rows = verls_rows(rewards_BT, mask_BT.long(), group_B)
        name, settings = VERLS["reinforce_plus_plus"]
        theirs_BT, _ = verl.get_adv_estimator_fn(name)(**rows, **settings)
        ours_BT = socratic_advantages(
            rewards_BT, mask_BT, group_B, schedule="none", credit="trajectory", estimator=name
        )
        assert_equal(ours_BT, theirs_BT, 1e-6)


@pytest.mark.parametrize(("scale_rewards", "estimator"), [("group", "grpo"), ("none", "dr_grpo")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_advantages_are_trls(trl: Any, scale_rewards: str, estimator: str, schedule: str) -> None:
    """Advantages equal TRL's on the decayed rewards; its groups are rows of equal number."""
    trl.scale_rewards = scale_rewards
    decay = {"schedule": schedule, "factor": SCHEDULES[schedule]}
    prompt = {"prompt": [{"role": "user", "content": "1 + 1?"}]}
    for seed in range(15):
        torch.manual_seed(seed)
        trl.num_generations = 2 + seed % 6
        size = trl.num_generations * (1 + seed % 4)
        rewards = torch.rand(size) if seed % 3 else (torch.rand(size) < 0.3).float()
        rewards = rewards * (seed % 7 > 0)
        attempt_idx = torch.randint(0, MAX_ATTEMPTS, (size,))
        attempt_idx[0] = 0
        trl.rewards = decay_rewards(rewards, attempt_idx, **decay)
        theirs = trl._generate_and_score_completions([prompt] * size)["advantages"]
        groups = torch.arange(size) // trl.num_generations
        lengths = torch.randint(1, MAX_TOKENS, (size,))
        # TRL's eps is 1e-4, and it stands beside the standard deviation, as ours does.
        ours = compute_advantages(
            rewards, lengths, groups, attempt_idx, **decay, estimator=estimator, eps=1e-4
        )
        assert_equal(ours, theirs, 1e-6)


def assert_equal_losses(
    case: LossCase,
    theirs: Callable[[Tensor], Tensor],
    weights_BT: Tensor,
    options: PolicyLossOptions,
    ref_logprobs_BT: Tensor | None = None,
) -> None:
    """Compares loss and gradients of both our ops with a peer's loss of log-probs."""
    has_loss_BT = case.mask_BT.bool()
    leaves = case.hidden_BTD, case.weight_VD
    settings: dict[str, Any] = {
        "weights_N": weights_BT[has_loss_BT],
        "options": options,
        "ref_logprobs_N": None if ref_logprobs_BT is None else ref_logprobs_BT[has_loss_BT],
    }
    per_token = case.old_logprobs_BT[has_loss_BT], case.advantages_BT[has_loss_BT]
    from_logprobs = policy_loss(case.logprobs_BT()[has_loss_BT], *per_token, **settings)
    from_hidden = linear_policy_loss(
        case.hidden_BTD[has_loss_BT],
        case.weight_VD,
        case.targets_BT[has_loss_BT],
        *per_token,
        temperature=case.temperature,
        **settings,
    )
    loss = theirs(case.logprobs_BT())
    gradients = torch.autograd.grad(loss, leaves)
    for ours in (from_logprobs, from_hidden):
        assert_equal(ours.loss, loss, 1e-5)
        for our_gradient, gradient in zip(
            torch.autograd.grad(ours.loss, leaves), gradients, strict=True
        ):
            assert_equal(our_gradient, gradient, 1e-5)


def verls_loss(logprobs_BT: Tensor, verl: ModuleType, case: LossCase, **settings: Any) -> Tensor:
    rows = case.old_logprobs_BT, logprobs_BT, case.advantages_BT, case.mask_BT
    return verl.get_policy_loss_fn("vanilla")(*rows, **settings)[0]


@pytest.mark.parametrize("mode", VERLS_MODES)
@pytest.mark.parametrize("dp_size", [1, 2])
def test_losses_are_verls(verl: ModuleType, mode: str, dp_size: int) -> None:
    """Loss and gradients equal verl's, alone and as one of two ranks of a larger batch."""
    for seed in range(12):
        case = random_loss_case(seed)
        per_row = case.mask_BT.sum(1, keepdim=True)
        # verl counts a row without loss tokens as no row.
        num_rows = dp_size * float((per_row > 0).sum())
        num_tokens = dp_size * float(per_row.sum())
        horizon = case.mask_BT.shape[1] if dp_size == 1 else 77
        batch_info = {
            "dp_size": dp_size,
            "batch_num_tokens": num_tokens,
            "global_batch_size": num_rows,
            "loss_scale_factor": horizon,
        }
        one = torch.ones_like(case.mask_BT)
        weights_BT = {
            "token-mean": one / num_tokens,
            "token-sum": one,
            "seq-mean-token-sum": one / num_rows,
            "seq-mean-token-sum-norm": one / num_rows / horizon,
            "seq-mean-token-mean": one / num_rows / per_row.clamp(min=1),
        }[mode]
        # Importance weights of the sampler are part of our weights.
        sampler_BT = torch.rand(case.mask_BT.shape) if seed % 2 else None
        weights_BT = dp_size * (weights_BT if sampler_BT is None else weights_BT * sampler_BT)
        config = ActorConfig(
            clip_ratio=0.2,
            clip_ratio_low=None,
            clip_ratio_high=0.28,
            clip_ratio_c=1.5,
            # On one rank verl counts by itself.
            global_batch_info=batch_info if dp_size > 1 else {},
        )
        theirs = partial(
            verls_loss,
            verl=verl,
            case=case,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=sampler_BT,
        )
        options = PolicyLossOptions(clip_low=0.2, clip_high=0.28, dual_clip=1.5)
        assert_equal_losses(case, theirs, weights_BT, options)


def trls_loss(logprobs_BT: Tensor, trl: Any, inputs: dict[str, Tensor]) -> Tensor:
    trl.logprobs = logprobs_BT
    return trl._compute_loss(trl.model, inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize(("beta", "delta"), [(0.0, None), (0.04, None), (0.0, 1.5)])
def test_losses_are_trls(
    trl: Any, loss_type: str, accumulation_steps: int, beta: float, delta: float | None
) -> None:
    """Loss and gradients equal TRL's, with KL, a second clip, and gradient accumulation."""
    trl.loss_type = loss_type
    trl.beta = beta
    trl.args.delta = delta
    trl.epsilon_low, trl.epsilon_high = 0.2, 0.28
    trl.current_gradient_accumulation_steps = accumulation_steps
    trl.model.train()
    for seed in range(12):
        case = random_loss_case(seed)
        num_rows, horizon = case.mask_BT.shape
        trl.max_completion_length = horizon
        per_row = case.mask_BT.sum(1, keepdim=True)
        generated_tokens = 3 * per_row.sum()
        ref_logprobs_BT = case.old_logprobs_BT + 0.3 * torch.randn(num_rows, horizon)
        one = torch.ones(num_rows, 1)
        inputs = {
            "prompt_ids": one.long(),
            "prompt_mask": one,
            "completion_ids": case.targets_BT,
            "completion_mask": torch.ones_like(case.mask_BT),
            "tool_mask": case.mask_BT,
            "advantages": case.advantages_BT,
            "old_per_token_logps": case.old_logprobs_BT,
            "ref_per_token_logps": ref_logprobs_BT,
            "num_items_in_batch": generated_tokens,
        }
        # TRL averages over all rows, also those without a loss token.
        weights_BT = {
            "grpo": 1 / (num_rows * per_row.clamp(min=1)) / accumulation_steps,
            "bnpo": one / per_row.sum() / accumulation_steps,
            "dr_grpo": one / (num_rows * horizon) / accumulation_steps,
            "dapo": one / (generated_tokens * accumulation_steps / trl.args.steps_per_generation),
        }[loss_type].expand_as(case.mask_BT)
        # A delta above 1 + epsilon_high is the dual clip. TRL's KL estimate is k3, here without
        # use_bias_correction_kl, by which it multiplies KL by the ratio.
        options = PolicyLossOptions(clip_low=0.2, clip_high=0.28, dual_clip=delta, kl_coef=beta)
        theirs = partial(trls_loss, trl=trl, inputs=inputs)
        assert_equal_losses(case, theirs, weights_BT, options, ref_logprobs_BT if beta else None)


def test_single_attempt_groups_differ_from_trls(trl: Any) -> None:
    """A question with a single attempt: ours, like verl's, is its reward; TRL's is 0."""
    trl.scale_rewards = "none"
    trl.num_generations = 1
    trl.rewards = torch.tensor([1.0])
    prompt = {"prompt": [{"role": "user", "content": "1 + 1?"}]}
    idx = torch.tensor([0])
    theirs = trl._generate_and_score_completions([prompt])["advantages"]
    ours = compute_advantages(trl.rewards, torch.tensor([4]), idx, idx, estimator="dr_grpo")
    assert (theirs.item(), ours.item()) == (0.0, 1.0)


def test_log_ratios_are_clamped_as_verls(verl: ModuleType, trl: Any) -> None:
    """A token 30 nats from its old log-prob: ours and verl's ratio is exp(20), TRL's is exp(30)."""
    logprobs, old = torch.tensor([[-1.0]]), torch.tensor([[-31.0]])
    one = torch.ones(1, 1)
    options = PolicyLossOptions(dual_clip=1e30)
    ours = policy_loss(logprobs[0], old[0], -one[0], num_loss_tokens=1, options=options).loss
    config = ActorConfig(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        clip_ratio_c=1e30,
        global_batch_info={},
    )
    verls, _ = verl.get_policy_loss_fn("vanilla")(old, logprobs, -one, one, "token-mean", config)
    trl.loss_type = "bnpo"
    trl.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": one.long(),
        "prompt_mask": one,
        "completion_ids": one.long(),
        "completion_mask": one,
        "advantages": -one,
        "old_per_token_logps": old,
    }
    trls = trls_loss(logprobs, trl, inputs)
    log_losses = [math.log(loss.item()) for loss in (ours, verls, trls)]
    assert log_losses == pytest.approx([20, 20, 30], abs=1e-4)
