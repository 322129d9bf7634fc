"""Tests credit by attempt and by trajectory.

With worked examples, a loop over rollouts, and bitwise against the C++.
"""

from __future__ import annotations

import pytest
import torch

from socpo_fast.ops import CreditOptions, credit_attempts, decay_rewards
from tests.helpers.error_rule import assert_bitwise_equal
from tests.ops.test_decay_advantage import ESTIMATORS, impl, naive_advantages

__all__ = ["impl"]


def rescued_and_not() -> dict[str, torch.Tensor]:
    """Returns two questions of two rollouts each.

    Question 0: one right at once, one rescued by guidance. Question 1: one rescued in its third
    attempt, one never right.
    """
    columns = [
        # reward, tokens, question, attempt, rollout
        (1.0, 3, 0, 0, 0),
        (0.0, 4, 0, 0, 1),
        (1.0, 5, 0, 1, 1),
        (0.0, 3, 1, 0, 0),
        (0.0, 4, 1, 1, 0),
        (1.0, 5, 1, 2, 0),
        (0.0, 3, 1, 0, 1),
        (0.0, 4, 1, 1, 1),
        (0.0, 5, 1, 2, 1),
    ]
    names = ("rewards_A", "num_tokens_A", "question_idx_A", "attempt_idx_A", "rollout_idx_A")
    return {
        name: torch.tensor(x) for name, x in zip(names, zip(*columns, strict=True), strict=True)
    }


def test_a_trajectory_earns_its_last_reward(impl: str) -> None:
    """Every attempt of a rollout earns the decayed reward of the last one.

    By hand: f_1 = 1 / 4 of four first attempts, f_2 = (1 + 1 / 4) / 7 of these and three second
    ones.
    """
    f_1 = 1 / 4
    f_2 = 1.25 / 7
    options = CreditOptions(credit="trajectory", estimator="dr_grpo")
    credit = credit_attempts(**rescued_and_not(), options=options, impl=impl)
    earned = [1, f_1, f_1, f_2, f_2, f_2, 0, 0, 0]
    assert credit.rewards_A.tolist() == pytest.approx(earned)
    means = [(1 + 2 * f_1) / 3] * 3 + [3 * f_2 / 6] * 6
    by_hand = [reward - mean for reward, mean in zip(earned, means, strict=True)]
    assert credit.advantages_A.tolist() == pytest.approx(by_hand)


def test_without_decay_rescued_earns_as_right_at_once(impl: str) -> None:
    """Without decay, by trajectory, rollouts rescued by guidance and right at once earn the same.

    That is what decay is for.
    """
    batch = rescued_and_not()
    plain = CreditOptions(credit="trajectory", schedule="none", estimator="dr_grpo")
    credit = credit_attempts(**batch, options=plain, impl=impl)
    assert credit.advantages_A[:3].tolist() == [0.0, 0.0, 0.0]
    by_attempt = credit_attempts(
        **batch, options=CreditOptions(schedule="none", estimator="dr_grpo"), impl=impl
    )
    assert by_attempt.rewards_A.tolist() == batch["rewards_A"].tolist()
    assert by_attempt.advantages_A[1] < 0 < by_attempt.advantages_A[2]


def random_credit(seed: int) -> dict[str, torch.Tensor]:
    """Returns rewards in [0, 1] in any order; indices are neither small nor consecutive."""
    rng = torch.Generator().manual_seed(seed)
    table = [
        (1000 - 37 * q, 5 * r - 9, k)
        for q in range(7)
        for r in range(5)
        for k in range(1 + (q + 3 * r) % 4)
    ]
    order = torch.randperm(len(table), generator=rng).tolist()
    question_idx_A, rollout_idx_A, attempt_idx_A = (
        torch.tensor([table[i] for i in order]).t().contiguous()
    )
    return {
        "rewards_A": torch.rand(len(table), generator=rng),
        "num_tokens_A": torch.randint(0, 50, (len(table),), generator=rng),
        "question_idx_A": question_idx_A,
        "attempt_idx_A": attempt_idx_A,
        "rollout_idx_A": rollout_idx_A,
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("schedule", [{}, {"schedule": "constant", "factor": 0.5}])
def test_trajectory_credit_equals_the_loop(
    estimator: str, schedule: dict[str, object], impl: str
) -> None:
    batch = random_credit(3)
    options = CreditOptions(credit="trajectory", estimator=estimator, **schedule)
    rows = list(
        zip(
            *(batch[f"{name}_idx_A"].tolist() for name in ("question", "rollout", "attempt")),
            strict=True,
        )
    )
    decayed = decay_rewards(
        batch["rewards_A"], batch["attempt_idx_A"], impl="ref", **schedule
    ).tolist()
    last_reward = {}
    for (question, rollout, _), reward in sorted(zip(rows, decayed, strict=True)):
        last_reward[question, rollout] = reward
    earned = [last_reward[question, rollout] for question, rollout, _ in rows]
    groups = [question for question, _, _ in rows]
    expected = naive_advantages(earned, batch["num_tokens_A"].tolist(), groups, estimator, 1e-6)
    credit = credit_attempts(**batch, options=options, impl=impl)
    torch.testing.assert_close(credit.rewards_A, torch.tensor(earned), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        credit.advantages_A.double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-7
    )
    again = credit_attempts(**batch, options=options, impl=impl)
    assert_bitwise_equal(again.advantages_A, credit.advantages_A, name="two runs")


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("credit", ["attempt", "trajectory"])
def test_cpp_equals_ref_bitwise(estimator: str, credit: str) -> None:
    """Where nothing is whitened, both add in index order."""
    batch = random_credit(4)
    options = CreditOptions(estimator=estimator, credit=credit)
    expected, actual = (
        credit_attempts(**batch, options=options, impl=impl) for impl in ("ref", "cpp")
    )
    for name, x in expected._asdict().items():
        assert_bitwise_equal(getattr(actual, name), x, name=name)
