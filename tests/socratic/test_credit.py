"""Rewards and advantages land on the right attempts; tests/ops tests the formulas themselves."""

import pytest
import torch

from socpo_fast.ops import CreditOptions, compute_advantages
from socpo_fast.socratic.credit import assign_credit, attempt_table
from socpo_fast.types import Attempt, Rollout, RolloutKey, Turn


def rollout(
    question_idx: int, rollout_idx: int, verdicts: list[bool], num_tokens: int = 3
) -> Rollout:
    attempts = [
        Attempt(
            token_ids=[5] * (num_tokens + attempt_idx),
            logprobs=torch.zeros(num_tokens + attempt_idx),
            kept_mass=torch.ones(num_tokens + attempt_idx),
            finish_reason="stop",
            key=RolloutKey(0, question_idx),
            rollout_idx=rollout_idx,
            attempt_idx=attempt_idx,
            policy_version=0,
        )
        for attempt_idx in range(len(verdicts))
    ]
    turns = [
        Turn(attempt=attempt, is_correct=verdict, raw_reward=float(verdict))
        for attempt, verdict in zip(attempts, verdicts, strict=True)
    ]
    return Rollout(question_idx=question_idx, rollout_idx=rollout_idx, prompt_ids=[1], turns=turns)


def rewards(rollout: Rollout) -> list[float | None]:
    return [turn.reward for turn in rollout.turns]


def worked_example() -> list[Rollout]:
    """Returns rollouts with 1 of 4 first, 1 of 3 second and 1 of 2 third attempts right."""
    verdicts = [[True], [False, True], [False, False, True], [False, False, False]]
    return [rollout(i // 2, i % 2, row) for i, row in enumerate(verdicts)]


def test_the_papers_worked_example() -> None:
    rollouts = worked_example()
    factors, advantages_A = assign_credit(rollouts, options=CreditOptions())
    assert advantages_A.tolist() == [turn.advantage for r in rollouts for turn in r.turns]
    assert factors == pytest.approx([1 / 4, 1.25 / 7])
    assert [rewards(r) for r in rollouts] == [
        [1.0],
        [0.0, 0.25],
        [0.0, 0.0, pytest.approx(1.25 / 7)],
        [0.0] * 3,
    ]


def test_a_trajectory_earns_its_last_reward() -> None:
    rollouts = worked_example()
    assert assign_credit(rollouts, options=CreditOptions(credit="trajectory"))[0] == pytest.approx(
        [1 / 4, 1.25 / 7]
    )
    f_2 = pytest.approx(1.25 / 7)
    assert [rewards(r) for r in rollouts] == [[1.0], [0.25, 0.25], [f_2] * 3, [0.0] * 3]
    for r in rollouts:
        assert len({turn.advantage for turn in r.turns}) == 1


def test_other_schedules() -> None:
    rollouts = worked_example()
    constant = CreditOptions(schedule="constant", factor=0.5)
    assert assign_credit(rollouts, options=constant)[0] == [0.5, 0.25]
    assert rewards(rollouts[2]) == [0.0, 0.0, 0.25]
    assert assign_credit(rollouts, options=CreditOptions(schedule="none"))[0] == [1.0, 1.0]
    assert rewards(rollouts[2]) == [0.0, 0.0, 1.0]
    assert assign_credit([rollout(0, 0, [True])], options=CreditOptions())[0] == []
    with pytest.warns(UserWarning, match="no loss tokens"):
        assert assign_credit([], options=CreditOptions())[0] == []


def test_a_batch_without_a_right_first_attempt_warns() -> None:
    with pytest.warns(UserWarning, match="no first attempt of the batch is correct"):
        assert assign_credit([rollout(0, 0, [False, True])], options=CreditOptions())[0] == [0.0]


@pytest.mark.parametrize("credit", ["attempt", "trajectory"])
def test_advantages_follow_their_attempts(credit: str) -> None:
    rollouts = worked_example()
    assign_credit(rollouts, options=CreditOptions(credit=credit))
    expected = compute_advantages(*attempt_table(rollouts), schedule="batch_mean", credit=credit)
    assert [turn.advantage for r in rollouts for turn in r.turns] == expected.tolist()


def test_the_table_has_a_row_an_attempt() -> None:
    table = attempt_table([rollout(7, 1, [False, True], num_tokens=4), rollout(9, 0, [True])])
    assert table.rewards_A.tolist() == [0.0, 1.0, 1.0]
    assert table.num_tokens_A.tolist() == [4, 5, 3]
    assert table.question_idx_A.tolist() == [7, 7, 9]
    assert table.attempt_idx_A.tolist() == [0, 1, 0]
    assert table.rollout_idx_A.tolist() == [1, 1, 0]


def test_duplicate_rollouts_are_refused() -> None:
    """Two rollouts with the same indices would be credited as one."""
    twins = [rollout(3, 0, [True]), rollout(4, 0, [True]), rollout(3, 0, [False])]
    with pytest.raises(
        ValueError, match="rollout_idx must be unique in a question, got 0 of question 3"
    ):
        attempt_table(twins)
