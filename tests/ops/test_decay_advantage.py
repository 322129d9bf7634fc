"""Compares decay and advantages with the paper's worked example and loops over attempts in fp64.

Both are tested alone and fused.
"""

import math
import os
import statistics

import pytest
import torch

from socpo_fast.ops import CreditOptions, compute_advantages, credit_attempts, decay_rewards
from tests.helpers.error_rule import assert_bitwise_equal

ESTIMATORS = ("reinforce_plus_plus_baseline", "reinforce_plus_plus", "grpo", "dr_grpo", "rloo")


@pytest.fixture(params=["ref", "cpp", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("tensors are on the CPU here")
    return request.param


def random_batch(
    seed: int, *, max_attempts: int = 4, num_questions: int = 6, group_size: int = 3
) -> dict[str, torch.Tensor]:
    """Returns attempts of a batch as rollouts make them: a rollout ends with its first success.

    Question 0 is a single attempt, question 1 always right, question 2 always wrong. Question ids
    are neither small nor consecutive.
    """
    rng = torch.Generator().manual_seed(seed)
    attempts = []
    for question in range(num_questions):
        for _ in range(1 if question == 0 else group_size):
            for attempt in range(1 if question == 0 else max_attempts):
                success_rate = {1: 1.0, 2: 0.0}.get(question, 0.35)
                is_correct = float(torch.rand((), generator=rng)) < success_rate
                num_tokens = int(torch.randint(1, 50, (), generator=rng))
                attempts.append((float(is_correct), attempt, 1000 - 37 * question, num_tokens))
                if is_correct:
                    break
    rewards, attempt_idx, question_idx, num_tokens = zip(*attempts, strict=True)
    return {
        "rewards_A": torch.tensor(rewards),
        "attempt_idx_A": torch.tensor(attempt_idx),
        "question_idx_A": torch.tensor(question_idx),
        "num_tokens_A": torch.tensor(num_tokens),
    }


def naive_decay(rewards: list[float], attempt_idx: list[int]) -> list[float]:
    """Decays by batch_mean, one attempt index after the other, each mean computed anew."""
    decayed = list(rewards)
    for n in range(1, max(attempt_idx) + 1):
        earlier = [decayed[i] for i in range(len(rewards)) if attempt_idx[i] < n]
        for i in range(len(rewards)):
            if attempt_idx[i] == n:
                decayed[i] = rewards[i] * sum(earlier) / len(earlier)
    return decayed


def naive_advantages(
    rewards: list[float], num_tokens: list[int], groups: list[object], estimator: str, eps: float
) -> list[float]:
    """Computes advantages one attempt at a time.

    Whitening goes over a list that repeats each attempt once per token.
    """
    values = []
    for i, reward in enumerate(rewards):
        group = [rewards[j] for j in range(len(rewards)) if groups[j] == groups[i]]
        if estimator == "reinforce_plus_plus" or len(group) == 1:
            values.append(reward / (1 + eps) if estimator == "grpo" else reward)
        elif estimator == "rloo":
            other_rewards = [
                rewards[j] for j in range(len(rewards)) if groups[j] == groups[i] and j != i
            ]
            values.append(reward - statistics.fmean(other_rewards))
        else:
            scale = statistics.stdev(group) + eps if estimator == "grpo" else 1.0
            values.append((reward - statistics.fmean(group)) / scale)
    if not estimator.startswith("reinforce"):
        return values
    tokens = [value for value, count in zip(values, num_tokens, strict=True) for _ in range(count)]
    mean = statistics.fmean(tokens)
    variance = statistics.variance(tokens)
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


def test_worked_example_of_the_paper(impl: str) -> None:
    # Four first attempts, three second ones and two third ones, with one success each.
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 1, 0])
    attempt_idx = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    indices = torch.arange(9)
    credit = credit_attempts(
        rewards, indices, indices, attempt_idx, options=CreditOptions(), impl=impl
    )
    assert credit.factors_K.tolist() == [1.0, 1 / 4, 1.25 / 7]
    assert decay_rewards(rewards, attempt_idx, impl=impl).tolist() == pytest.approx(
        [1, 0, 0, 0, 0.25, 0, 0, 1.25 / 7, 0]
    )


def test_other_schedules(impl: str) -> None:
    rewards = torch.tensor([1.0, 1.0, 0.5])
    attempt_idx = torch.tensor([0, 2, 1])
    assert decay_rewards(
        rewards, attempt_idx, schedule="constant", factor=0.5, impl=impl
    ).tolist() == [1.0, 0.25, 0.25]
    assert decay_rewards(
        rewards, attempt_idx, schedule="constant", factor=0.0, impl=impl
    ).tolist() == [1.0, 0.0, 0.0]
    assert decay_rewards(rewards, attempt_idx, schedule="none", impl=impl).tolist() == [
        1.0,
        1.0,
        0.5,
    ]


def test_guided_success_needs_a_first_success(impl: str) -> None:
    """If no first attempt is right, their mean is 0, and so is every guided reward."""
    assert decay_rewards(
        torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 2]), impl=impl
    ).tolist() == [0.0, 0.0, 0.0]


def test_empty_batch(impl: str) -> None:
    empty = torch.zeros(0)
    indices = torch.zeros(0, dtype=torch.int64)
    assert decay_rewards(empty, indices, impl=impl).shape == (0,)
    with pytest.warns(UserWarning, match="no loss tokens"):
        credit = credit_attempts(
            empty, indices, indices, indices, options=CreditOptions(), impl=impl
        )
    assert [x.shape for x in credit] == [(0,)] * 3


@pytest.mark.parametrize("max_attempts", [1, 2, 4, 9])
def test_decay_equals_the_loop(max_attempts: int, impl: str) -> None:
    batch = random_batch(max_attempts, max_attempts=max_attempts)
    rewards = batch["rewards_A"]
    attempt_idx = batch["attempt_idx_A"]
    expected = naive_decay(rewards.tolist(), attempt_idx.tolist())
    assert decay_rewards(rewards, attempt_idx, impl=impl).tolist() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("max_attempts", [1, 2, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantages_equal_the_loop(estimator: str, max_attempts: int, impl: str) -> None:
    batch = random_batch(10 + max_attempts, max_attempts=max_attempts)
    batch["rewards_A"] = decay_rewards(batch["rewards_A"], batch["attempt_idx_A"])
    expected = naive_advantages(
        batch["rewards_A"].tolist(),
        batch["num_tokens_A"].tolist(),
        batch["question_idx_A"].tolist(),
        estimator,
        1e-6,
    )
    actual = compute_advantages(**batch, estimator=estimator, impl=impl)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "grpo"])
def test_grouping_by_attempt_warns_and_equals_the_loop(estimator: str, impl: str) -> None:
    batch = random_batch(20)
    groups = list(
        zip(batch["question_idx_A"].tolist(), batch["attempt_idx_A"].tolist(), strict=True)
    )
    expected = naive_advantages(
        batch["rewards_A"].tolist(), batch["num_tokens_A"].tolist(), groups, estimator, 1e-6
    )
    with pytest.warns(UserWarning, match="cancels reward decay"):
        actual = compute_advantages(
            **batch, estimator=estimator, baseline_group="question_attempt", impl=impl
        )
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_order_of_attempts_does_not_matter(estimator: str) -> None:
    batch = random_batch(30)
    order = torch.randperm(batch["rewards_A"].numel(), generator=torch.Generator().manual_seed(1))
    shuffled = {name: x[order] for name, x in batch.items()}
    torch.testing.assert_close(
        decay_rewards(shuffled["rewards_A"], shuffled["attempt_idx_A"]),
        decay_rewards(batch["rewards_A"], batch["attempt_idx_A"])[order],
    )
    torch.testing.assert_close(
        compute_advantages(**shuffled, estimator=estimator),
        compute_advantages(**batch, estimator=estimator)[order],
    )
    assert_bitwise_equal(
        compute_advantages(**batch, estimator=estimator),
        compute_advantages(**batch, estimator=estimator),
        name=estimator,
    )


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exactly_zero(estimator: str, impl: str) -> None:
    """Equal rewards give an advantage of exactly 0, which lets the loss skip the rows.

    0.1 has no exact fp32 form, so the mean of seven of them tests the summation.
    """
    indices = torch.arange(7) + 3
    advantages = compute_advantages(
        torch.full((7,), 0.1),
        indices,
        torch.zeros_like(indices),
        indices,
        estimator=estimator,
        impl=impl,
    )
    assert advantages.tolist() == [0.0] * 7


def test_whitened_tokens_have_mean_0_variance_1() -> None:
    """Over tokens, not attempts, whitened advantages have mean 0 and variance 1."""
    batch = random_batch(40)
    tokens = compute_advantages(**batch).double().repeat_interleave(batch["num_tokens_A"])
    assert tokens.mean().item() == pytest.approx(0, abs=1e-6)
    assert tokens.var().item() == pytest.approx(1, abs=1e-5)


def test_no_loss_tokens_warns_and_one_is_an_error(impl: str) -> None:
    reward = torch.ones(1)
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.warns(UserWarning, match="no loss tokens"):
        assert compute_advantages(reward, zero, zero, zero, impl=impl).tolist() == [0.0]
    with pytest.raises(ValueError, match="sum to at least 2"):
        compute_advantages(reward, zero + 1, zero, zero, impl=impl)
    assert compute_advantages(
        reward, zero + 1, zero, zero, estimator="dr_grpo", impl=impl
    ).tolist() == [1.0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("schedule", ["batch_mean", "constant"])
def test_decay_within_advantages_is_decay_before_them(
    estimator: str, schedule: str, impl: str
) -> None:
    """Advantages with a schedule are advantages of rewards that were decayed beforehand."""
    batch = random_batch(50)
    options = {"schedule": schedule, "factor": 0.5 if schedule == "constant" else None}
    fused = compute_advantages(**batch, estimator=estimator, impl=impl, **options)
    batch["rewards_A"] = decay_rewards(
        batch["rewards_A"], batch["attempt_idx_A"], impl="ref", **options
    )
    assert_bitwise_equal(
        fused, compute_advantages(**batch, estimator=estimator, impl=impl), name=estimator
    )
    torch.testing.assert_close(
        fused, compute_advantages(**batch, estimator=estimator, impl="ref"), rtol=1e-6, atol=0
    )


# The kernel reads attempts in tiles of 64 here. Group sizes: two that end with a tile, several that
# cross one, one that fills several tiles, a tile + 1, and single attempts.
@pytest.mark.filterwarnings("ignore:compute_advantages. baseline_group question_attempt")
@pytest.mark.parametrize("sizes", [(64, 64), (1, 64, 63, 1, 2), (40, 200, 3), (65,), (1,) * 130])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_across_the_kernels_tiles(estimator: str, sizes: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(sum(sizes))
    order = torch.randperm(sum(sizes), generator=rng)
    batch = {
        "rewards_A": torch.rand(sum(sizes), generator=rng),
        "num_tokens_A": torch.randint(0, 2000, (sum(sizes),), generator=rng),
        "question_idx_A": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[order]
        - 2,
        "attempt_idx_A": torch.randint(0, 4, (sum(sizes),), generator=rng),
    }
    for baseline_group in ("question", "question_attempt"):
        actual, again, expected = (
            compute_advantages(
                **batch, estimator=estimator, baseline_group=baseline_group, impl=impl
            )
            for impl in ("triton", "triton", "ref")
        )
        assert_bitwise_equal(actual, again, name="two runs")
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
