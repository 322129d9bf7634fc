"""What a batch of rollouts amounts to, as named metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.types import Question, Rollout


def success_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """avg@k over the rollouts of each question, then over questions; the headline is the unassisted one.

    success/unassisted counts the first attempt only; success/assisted whether any attempt was right.
    """
    return {
        "success/unassisted": mean([float(rollout.is_correct[0]) for rollout in rollouts]),
        "success/assisted": mean([float(any(rollout.is_correct)) for rollout in rollouts]),
    }


def summarize(
    rollouts: Sequence[Rollout], questions: Mapping[int, Question], decay_factors: Sequence[float]
) -> dict[str, float]:
    """Metrics of one batch. Rates are per rollout, leak_rate and rescue_rate per guidance that was given."""
    guided = [rollout for rollout in rollouts if rollout.guidance]
    texts = [(text, questions[rollout.question_idx]) for rollout in guided for text in rollout.guidance]
    attempts = [attempt for rollout in rollouts for attempt in rollout.attempts]
    reasons = [rollout.end_reason for rollout in rollouts]
    return {
        **success_rates(rollouts),
        "reward/mean": mean([reward for rollout in rollouts for reward in rollout.rewards]),
        **{f"decay/f_{n}": factor for n, factor in enumerate(decay_factors, start=1)},
        "guidance/rate": mean([float(bool(rollout.guidance)) for rollout in rollouts]),
        "guidance/rescue_rate": mean([float(any(rollout.is_correct)) for rollout in guided]),
        "guidance/leak_rate": mean([float(leaks_answer(text, question)) for text, question in texts]),
        "guidance/failed": float(reasons.count("guidance_failed")),
        "guidance/overflow": float(reasons.count("overflow")),
        "rollout/attempt_tokens": mean([float(attempt.num_tokens) for attempt in attempts]),
        "rollout/truncated": mean([float(attempt.finish_reason == "length") for attempt in attempts]),
    }


def mean(values: Sequence[float]) -> float:
    """nan for none: a rate over nothing is not 0."""
    return sum(values) / len(values) if values else float("nan")
