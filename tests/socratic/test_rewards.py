"""Rewards and advantages land on the right attempts; the formulas themselves are tested with the ops."""

import pytest
import torch

from socpo_fast.ops.decay_advantage import compute_advantages
from socpo_fast.socratic.advantage import assign_advantages
from socpo_fast.socratic.decay import assign_rewards
from socpo_fast.types import Attempt, Rollout, RolloutKey, Turn


def rollout(question_idx: int, rollout_idx: int, verdicts: list[bool], num_tokens: int = 3) -> Rollout:
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
    """Four first attempts with one right, three second ones with one right; and two third ones with one right."""
    verdicts = [[True], [False, True], [False, False, True], [False, False, False]]
    return [rollout(i // 2, i % 2, row) for i, row in enumerate(verdicts)]


def test_the_papers_worked_example() -> None:
    rollouts = worked_example()
    factors = assign_rewards(rollouts, schedule="batch_mean")
    assert factors == pytest.approx([1 / 4, 1.25 / 7])
    assert [rewards(r) for r in rollouts] == [[1.0], [0.0, 0.25], [0.0, 0.0, pytest.approx(1.25 / 7)], [0.0] * 3]


def test_other_schedules() -> None:
    rollouts = worked_example()
    assert assign_rewards(rollouts, schedule="constant", factor=0.5) == [0.5, 0.25]
    assert rewards(rollouts[2]) == [0.0, 0.0, 0.25]
    assert assign_rewards(rollouts, schedule="none") == [1.0, 1.0]
    assert rewards(rollouts[2]) == [0.0, 0.0, 1.0]
    assert assign_rewards([rollout(0, 0, [True])], schedule="batch_mean") == []
    assert assign_rewards([], schedule="batch_mean") == []


def test_a_batch_without_a_right_first_attempt_warns() -> None:
    with pytest.warns(UserWarning, match="no first attempt of the batch is correct"):
        assert assign_rewards([rollout(0, 0, [False, True])], schedule="batch_mean") == [0.0]


def test_advantages_follow_their_attempts() -> None:
    rollouts = worked_example()
    assign_rewards(rollouts, schedule="batch_mean")
    assign_advantages(rollouts, estimator="reinforce_plus_plus_baseline")
    rows = [
        (turn.reward, turn.attempt.num_tokens, r.question_idx, k) for r in rollouts for k, turn in enumerate(r.turns)
    ]
    rewards_A, *counts = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = compute_advantages(rewards_A, *counts)
    assert [turn.advantage for r in rollouts for turn in r.turns] == expected.tolist()
