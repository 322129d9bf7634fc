"""What a person is told of the guidance in a finished batch, beyond the counts in its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from socpo_fast.report.accuracy import failures_text
from socpo_fast.report.progress import Progress
from socpo_fast.types import Rollout


def tell(
    progress: Progress,
    rollouts: Sequence[Rollout],
    metrics: Mapping[str, float],
) -> str | None:
    """Shows what is wrong with the guidance of a batch; returns the line where all of it failed."""
    line = silence(rollouts, metrics)
    for warning in (overflow(rollouts), line):
        if warning is not None:
            progress.note(f"warning: {warning}")
    return line


def silence(rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> str | None:
    """Says that no rollout got the guidance it asked for; None if one did, or none asked."""
    is_answered = any(turn.guidance is not None for rollout in rollouts for turn in rollout.turns)
    num_failed = metrics["guidance/failed"]
    if is_answered or not num_failed:
        return None
    return f"teacher: all {num_failed:.0f} guidances of a batch failed ({failures_text(metrics)})"


def overflow(rollouts: Sequence[Rollout]) -> str | None:
    """Says that guidance never led to another attempt, since the context has no room for one."""
    guided = [r for r in rollouts if any(turn.guidance is not None for turn in r.turns)]
    if not guided or any(rollout.end_reason != "overflow" for rollout in guided):
        return None
    return (
        f"guidance: all {len(guided)} rollouts with guidance ended there, as a next attempt would "
        "exceed the student's context; lower rollout.attempt_limit, rollout.guidance_limit or "
        "rollout.max_new_tokens"
    )
