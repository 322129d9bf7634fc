"""Rollouts and questions of a few tokens, made by hand: for what reports and displays show."""

from __future__ import annotations

import torch

from socpo_fast.types import Attempt, Question, Rollout, RolloutKey, ShownGuidance, Turn


def make_attempt(attempt_idx: int) -> Attempt:
    return Attempt(
        token_ids=[1, 2, 3],
        logprobs=torch.zeros(3),
        kept_mass=torch.ones(3),
        finish_reason="stop",
        key=RolloutKey(0, 0),
        rollout_idx=0,
        attempt_idx=attempt_idx,
        policy_version=4,
    )


def make_question(question_idx: int) -> Question:
    messages = (
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": f"Question {question_idx}?"},
    )
    return Question(
        question_idx=question_idx, messages=messages, ground_truth="42", data_source="test"
    )


def make_rollout(
    question_idx: int,
    rollout_idx: int,
    first: dict[str, float] | None = None,
    second: dict[str, float] | None = None,
) -> Rollout:
    """Returns a rollout whose first attempt is wrong and guided, and whose second one is right.

    `first` and `second` are further fields of the two turns.
    """
    text = "Look again."
    guidance = ShownGuidance(raw_text=text, text=text, kept_tokens=3, bridge_ids=[9])
    return Rollout(
        question_idx=question_idx,
        rollout_idx=rollout_idx,
        prompt_ids=[7],
        turns=[
            Turn(attempt=make_attempt(0), text="41", guidance=guidance, **(first or {})),
            Turn(
                attempt=make_attempt(1),
                text="42",
                is_correct=True,
                raw_reward=1.0,
                **(second or {}),
            ),
        ],
        end_reason="correct",
    )
