"""What a person is told of the guidance in a finished batch, beyond the counts in its metrics."""

from collections.abc import Mapping, Sequence

from socpo_fast.report.accuracy import failures_text
from socpo_fast.report.progress import Progress
from socpo_fast.types import Rollout

# Failures in a row that are silence where the teacher has answered before. A student that is nearly
# always right asks once or twice a batch, and one late answer is no reason to stop.
SILENCE = 8


class GuidanceWatch:
    """What the guidance of one batch after the other amounts to. Tell it of each: told."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._has_answered = False
        self._failed_in_a_row: float = 0  # since the last batch with an answer

    def told(self, rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> str | None:
        """Shows what is wrong with a batch; returns the line if the teacher has fallen silent.

        That is from the first batch without any answer on, or, where there were answers before,
        after SILENCE failures without one.
        """
        line = unanswered(rollouts, metrics)
        for warning in (overflow(rollouts), line):
            if warning is not None:
                self._progress.note(f"warning: {warning}")
        if any(map(has_guidance, rollouts)):
            self._has_answered = True
            self._failed_in_a_row = 0
        else:
            self._failed_in_a_row += metrics["guidance/failed"]
        is_silent = not self._has_answered or self._failed_in_a_row >= SILENCE
        return line if is_silent else None


def unanswered(rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> str | None:
    """Says that no rollout got the guidance it asked for; None if one did, or none asked."""
    num_failed = metrics["guidance/failed"]
    if any(map(has_guidance, rollouts)) or not num_failed:
        return None
    return f"teacher: all {num_failed:.0f} guidances of a batch failed ({failures_text(metrics)})"


def has_guidance(rollout: Rollout) -> bool:
    """The teacher answered once at least, whether or not it was shown."""
    return any(turn.guidance is not None for turn in rollout.turns)


def overflow(rollouts: Sequence[Rollout]) -> str | None:
    """Says that guidance never led to another attempt, since the context has no room for one."""
    guided = [rollout for rollout in rollouts if has_guidance(rollout)]
    if not guided or any(rollout.end_reason != "overflow" for rollout in guided):
        return None
    return (
        f"guidance: all {len(guided)} rollouts with guidance ended there, as a next attempt would "
        "exceed the student's context; lower rollout.attempt_limit, rollout.guidance_limit or "
        "rollout.max_new_tokens"
    )
