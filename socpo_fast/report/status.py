"""Holds what is known of a run while it goes. report/progress.py fills it, report/live.py draws it.

Read Status. Two threads share one: the run fills it, the display reads it. Every field is therefore
replaced by one assignment, dicts included, and lists only grow.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from socpo_fast.metrics import Kind
from socpo_fast.types import Question, Rollout

EXCHANGE_S = 6.0  # a dialogue stays this long on the display, long enough to read it
EXCHANGE_MIN_S = 2.0  # or this long, if a better one has come
EXCHANGE_CHARS = 2000  # of each end of its texts; a display shows less


class Score(NamedTuple):
    """Shares of a batch or an evaluation, and the 95 % interval of the first; nan if unknown."""

    batch: int
    update: int
    unassisted: float
    low: float
    high: float
    assisted: float

    @classmethod
    def of(cls, metrics: Mapping[str, Any], *, batch: int, update: int) -> "Score":
        """Returns the score that a row of metrics holds."""
        names = ("unassisted", "unassisted_low", "unassisted_high", "assisted")
        values = [metrics.get(f"success/{name}") for name in names]
        if metrics.get("guidance/rate") == 0:
            # Then it would be the unassisted share under another name.
            values[-1] = None
        return cls(batch, update, *(math.nan if value is None else value for value in values))


class Exchange(NamedTuple):
    """A question, an attempt, the guidance that followed it and the next attempt.

    rank: 2 for a rescued student, 1 for guidance in vain, 0 for an attempt that led to no other.
    """

    question: str
    attempt: str
    guidance: str
    next_attempt: str
    is_correct: bool  # the last attempt
    rank: int

    @classmethod
    def of(cls, rollout: Rollout, question: Question) -> "Exchange":
        """Returns the last exchange of a rollout, its texts cut."""
        *before, last = rollout.turns
        guided = before[-1] if before else last
        guidance = "" if guided.guidance is None else guided.guidance.text
        return cls(
            question=_cut(question.text),
            attempt=_cut(guided.text),
            guidance=_cut(guidance),
            next_attempt=_cut(last.text),
            is_correct=last.is_correct,
            rank=1 + last.is_correct if before else 0,
        )


@dataclass
class Counts:
    """Counts of rollouts by how they went."""

    rollouts: int = 0
    unassisted: int = 0  # right at the first attempt
    guided: int = 0  # the student was shown guidance
    rescued: int = 0  # and was right then
    failed: int = 0  # the teacher gave no guidance
    leaked: int = 0  # the teacher stated the answer, whether that was shown or not
    verdicts: dict[int, list[bool]] = field(default_factory=dict)  # first attempts, by question

    def add(self, rollout: Rollout) -> None:
        """Counts a finished rollout."""
        is_guided = len(rollout.turns) > 1
        self.rollouts += 1
        self.unassisted += rollout.turns[0].is_correct
        self.guided += is_guided
        self.rescued += is_guided and rollout.turns[-1].is_correct
        self.failed += bool(rollout.failure)
        self.verdicts.setdefault(rollout.question_idx, []).append(rollout.turns[0].is_correct)
        self.leaked += any(turn.guidance and turn.guidance.leaks for turn in rollout.turns)


@dataclass(kw_only=True)
class Status:
    """The state of a run that is going.

    Fields:
        first_batch:  the first one of this process; a resumed run has made others before.
        num_evals:    evaluations that this process will make, for the time left.
        phase:        what goes on: start, rollout, update, evaluation. done and total are its units
                      (rollouts or updates), phase_tokens what was sampled in it.
        work:         within an update: (log-probs or microbatch, done, total).
        num_tokens:   sampled in training rollouts since the run began.
        counts:       of the current batch or evaluation.
        all_counts:   of all batches of this process.
        scores:       by kind, of the whole run.
        metrics:      of the last batch.
        newer:        the exchange that the display shows next.
    """

    num_batches: int
    first_batch: int = 1
    num_evals: int = 0
    num_tokens: int = 0
    batch: int = 0
    update: int = 0
    phase: str = "start"
    done: int = 0
    total: int = 0
    work: tuple[str, int, int] | None = None
    phase_tokens: int = 0
    counts: Counts = field(default_factory=Counts)
    all_counts: Counts = field(default_factory=Counts)
    scores: dict[Kind, list[Score]] = field(
        default_factory=lambda: {"batch": [], "update": [], "eval": []}
    )
    metrics: Mapping[str, float] = field(default_factory=dict)
    newer: Exchange | None = None
    started: float = field(default_factory=time.monotonic)
    phase_started: float = field(default_factory=time.monotonic)
    # Seconds and number of the batches and evaluations that this process has finished.
    spent_s: dict[Kind, float] = field(default_factory=dict)
    num_ended: dict[Kind, int] = field(default_factory=dict)
    _ended_at: float = field(default_factory=time.monotonic)
    _shown_at: float = -math.inf
    _shown_rank: int = 0

    def begin(self, phase: str, *, batch: int, update: int, total: int) -> None:
        """Begins a phase."""
        if phase != "update":
            self.counts = Counts()
        self.phase = phase
        self.batch = batch
        self.update = update
        self.total = total
        self.done = 0
        self.phase_tokens = 0
        self.work = None
        self.phase_started = time.monotonic()

    def add(self, rollout: Rollout, question: Question) -> None:
        """Counts a finished rollout of the phase."""
        self.done += 1
        self.counts.add(rollout)
        self.phase_tokens += rollout.num_sampled
        if self.phase != "evaluation":
            self.all_counts.add(rollout)
            self.num_tokens += rollout.num_sampled
        exchange = Exchange.of(rollout, question)
        newer = self.newer  # read once, as the display may take it at any time
        if newer is None or exchange.rank >= newer.rank:
            self.newer = exchange

    def end(self, kind: Kind, metrics: Mapping[str, float], *, batch: int, update: int) -> None:
        """Ends a batch, an update or an evaluation."""
        self.batch = batch
        self.update = update
        if kind == "update":
            return
        if kind == "batch":
            self.metrics = metrics
        now = time.monotonic()
        spent_s = self.spent_s.get(kind, 0.0) + now - self._ended_at
        # New dicts, since the display may be reading the old ones.
        self.spent_s = {**self.spent_s, kind: spent_s}
        self.num_ended = {**self.num_ended, kind: self.num_ended.get(kind, 0) + 1}
        self._ended_at = now

    def next_exchange(self, now: float) -> Exchange | None:
        """Returns the exchange to show next, if the last one was shown long enough."""
        newer = self.newer
        if newer is None:
            return None
        is_better = newer.rank > self._shown_rank
        if now - self._shown_at < (EXCHANGE_MIN_S if is_better else EXCHANGE_S):
            return None
        self.newer = None
        self._shown_at = now
        self._shown_rank = newer.rank
        return newer

    @property
    def elapsed_s(self) -> float:
        """Returns the seconds since this process began the run."""
        return time.monotonic() - self.started

    @property
    def left_s(self) -> float | None:
        """Returns the seconds left at the mean pace of this process; None if none is known yet.

        Batches that an earlier start of the run made say nothing about this machine.
        """
        if not self.num_batches and self.done:
            return (time.monotonic() - self.phase_started) / self.done * (self.total - self.done)
        if not self.num_ended.get("batch"):
            return None
        pace_s = {kind: self.spent_s[kind] / n for kind, n in self.num_ended.items()}
        batches = self.num_batches - self.first_batch + 1 - self.num_ended["batch"]
        evals = max(self.num_evals - self.num_ended.get("eval", 0), 0)
        left_s = batches * pace_s["batch"] + evals * pace_s.get("eval", 0.0)
        running: Kind = "eval" if self.phase == "evaluation" else "batch"
        # What the running batch has taken is no longer left, up to what a batch takes.
        gone_s = min(time.monotonic() - self._ended_at, pace_s.get(running, 0.0))
        return max(left_s - gone_s, 0.0)


def _cut(text: str) -> str:
    """Returns both ends of a text that is too long for a display."""
    ends = (text[:EXCHANGE_CHARS], text[-EXCHANGE_CHARS:])
    return text if len(text) <= 2 * EXCHANGE_CHARS else " .. ".join(ends)
