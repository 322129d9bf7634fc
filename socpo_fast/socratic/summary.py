"""What a batch of rollouts amounts to, as named metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from socpo_fast.metrics import source_metric
from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.types import Question, Rollout

MAX_SOURCES = 32  # more of them are not told apart: a data set may name each row's source differently


def sources_of(questions: Iterable[Question]) -> list[str]:
    """The data sources to be told apart, in order of their names; none when there is one only, or too many."""
    sources = sorted({question.data_source for question in questions})
    return sources if 1 < len(sources) <= MAX_SOURCES else []


def success_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Shares of rollouts; the headline is the unassisted one.

    success/unassisted counts the first attempt only; success/assisted whether any attempt was right.
    """
    return {
        "success/unassisted": mean([float(rollout.turns[0].is_correct) for rollout in rollouts]),
        "success/assisted": mean([float(is_solved(rollout)) for rollout in rollouts]),
    }


def summarize(
    rollouts: Sequence[Rollout],
    questions: Mapping[int, Question],
    decay_factors: Sequence[float],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of one batch. Rates are per rollout; rescue_rate per guided one, leak_rate per guidance, shown or not.

    sources: the whole data set's, from sources_of; success is also given for each that the batch has.
    """
    guided = [rollout for rollout in rollouts if len(rollout.turns) > 1]
    turns = [(turn, questions[rollout.question_idx]) for rollout in rollouts for turn in rollout.turns]
    raw_texts = [(turn.guidance.raw_text, q) for turn, q in turns if turn.guidance is not None]
    attempts = [turn.attempt for turn, _ in turns]
    reasons = [rollout.end_reason for rollout in rollouts]
    by_source = {source: [r for r in rollouts if r.data_source == source] for source in sources}
    return {
        **success_rates(rollouts),
        **{
            source_metric(name, source): rate
            for source, chosen in by_source.items()
            if chosen
            for name, rate in success_rates(chosen).items()
        },
        "reward/mean": mean([turn.reward for turn, _ in turns if turn.reward is not None]),
        **{f"decay/f_{n}": factor for n, factor in enumerate(decay_factors, start=1)},
        "guidance/rate": mean([float(len(rollout.turns) > 1) for rollout in rollouts]),
        "guidance/rescue_rate": mean([float(is_solved(rollout)) for rollout in guided]),
        "guidance/leak_rate": mean([float(leaks_answer(text, q)) for text, q in raw_texts]),
        "guidance/failed": float(reasons.count("guidance_failed")),
        "guidance/leaked": float(reasons.count("leaked")),
        "guidance/overflow": float(reasons.count("overflow")),
        "rollout/attempt_tokens": mean([float(attempt.num_tokens) for attempt in attempts]),
        "rollout/truncated": mean([float(attempt.finish_reason == "length") for attempt in attempts]),
    }


def is_solved(rollout: Rollout) -> bool:
    """Whether any of its attempts was right."""
    return any(turn.is_correct for turn in rollout.turns)


def mean(values: Sequence[float]) -> float:
    """nan for none: a rate over nothing is not 0."""
    return sum(values) / len(values) if values else float("nan")
