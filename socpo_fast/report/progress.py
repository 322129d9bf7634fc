"""Tells people about a run while it goes.

Progress shows how far a run is and how it ended, and GuidanceWatch warns when the teacher does not
answer or its guidance has no effect. status.py holds what is known of the run, live.py draws it on
a terminal.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, TextIO

from rich.console import Console

from socpo_fast.metrics import Kind
from socpo_fast.report.accuracy import failures_text
from socpo_fast.report.live import LiveDisplay, from_to, hms, percent
from socpo_fast.report.printable import one_line, printable
from socpo_fast.report.status import Score, Status
from socpo_fast.report.summary import mean, with_interval
from socpo_fast.types import Question, Rollout

# A teacher that has answered before counts as silent after this many failures in a row. A student
# that is nearly always right asks once or twice a batch. A single late answer then leaves a batch
# without any, which is no reason to stop a run.
SILENCE = 8
# Off a terminal a long phase says how far it is, after so many seconds without another line.
PLAIN_LINE_S = 30.0


class Progress:
    """Shows a run: live on a terminal, elsewhere as one plain line a batch or evaluation.

    with Progress(num_batches=100) as progress:
        progress.phase("rollout", batch=1, update=0, total=128)
        progress.add_rollout(rollout, question)
        progress.report(metrics, kind="batch", batch=1, update=2)
        progress.end_card("run r: finished")

    Args:
        num_batches: of the whole run; 0 for an evaluation alone.
        first_batch: the first one of this process.
        num_evals:   evaluations that this process will make.
        num_tokens:  sampled before this process began.
        earlier:     rows of metrics.jsonl that were written before this process began.
        live:        draw on a terminal.
        quiet:       show nothing but warnings and one line at the end.
        file:        what to write to; None: stdout.
    """

    def __init__(
        self,
        *,
        num_batches: int,
        first_batch: int = 1,
        num_evals: int = 0,
        num_tokens: int = 0,
        earlier: Iterable[Mapping[str, Any]] = (),
        live: bool = True,
        quiet: bool = False,
        file: TextIO | None = None,
    ):
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._told_at = time.monotonic()
        self.quiet = quiet
        self.status = Status(
            num_batches=num_batches,
            first_batch=first_batch,
            num_evals=num_evals,
            num_tokens=num_tokens,
        )
        for row in earlier:
            self._keep(row, row["kind"], row["batch"], row["update"])
            self.status.update = row["update"]
        draws = self._console.is_terminal and not self._console.is_dumb_terminal
        is_live = live and draws and not quiet
        self._live = LiveDisplay(self.status, self._console) if is_live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays, unless the run is quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Prints a line that stays. If the terminal is gone, only the line is lost."""
        self._told_at = time.monotonic()
        # rich turns a closed pipe into SystemExit; a closed file is a ValueError. Neither should
        # end a run of many hours.
        with suppress(OSError, ValueError, SystemExit):
            self._console.print(printable(text, self._console.encoding), soft_wrap=True)

    def phase(self, name: str, *, batch: int, update: int, total: int) -> None:
        """Begins a phase (rollout, update, evaluation) of `total` units of work."""
        self.status.begin(name, batch=batch, update=update, total=total)

    def add_rollout(self, rollout: Rollout, question: Question) -> None:
        """Counts a finished rollout of the current phase, which may be shown."""
        self.status.add(rollout, question)
        self._tell_if_long()

    def advance(self, units: int = 1, *, num_tokens: int = 0) -> None:
        """Counts finished units of work and sampled tokens of the current phase."""
        self.status.done += units
        self.status.phase_tokens += num_tokens
        self.status.work = None

    def work(self, name: str, done: int, total: int) -> None:
        """Tells how far the current unit of work is: microbatches of an update, for example."""
        self.status.work = (name, done, total)
        self._tell_if_long()

    def report(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """Ends a batch, update or evaluation with its metrics."""
        if kind == "batch" and (verdicts := self.status.counts.verdicts):
            # The rows of batches have no interval, which would be drawn around each of them.
            shares = [mean(list(map(float, group))) for group in verdicts.values()]
            metrics = {**metrics, **with_interval("success/unassisted", shares)}
        self._keep(metrics, kind, batch, update)
        self.status.end(kind, metrics, batch=batch, update=update)
        # A line for each update would bury those of batches and evaluations.
        if self._live is not None or kind == "update":
            return
        self.note(self._line(metrics, kind, batch, update))
        if kind == "batch" and batch == self.status.first_batch < self.status.num_batches:
            self.note(self._estimate())

    def end_card(
        self,
        title: str,
        *,
        facts: Iterable[tuple[str, str]] = (),
        next_commands: Iterable[str] = (),
    ) -> None:
        """Ends the display; prints what the run came to and what to do next.

        A quiet run prints one line.

        Args:
            title: the run and how it ended, with the reason if it ended early.
            facts: further lines, as (label, text).
        """
        if self._live is not None:
            self._live.stop()
        rows = [*self._changes(), *self._work_done(), *facts]
        if self.quiet:
            self.warn(one_line("; ".join([title, *map(" ".join, rows)])))
            return
        rows += [("next" if i == 0 else "", command) for i, command in enumerate(next_commands)]
        self.note("\n".join([title, *(f"  {label:<14}{text}" for label, text in rows)]))

    def _tell_if_long(self) -> None:
        """Off a terminal, says how far a phase is that has been silent for long."""
        if self._live is not None or time.monotonic() - self._told_at < PLAIN_LINE_S:
            return
        status = self.status
        parts = [f"{status.phase} {status.done}/{status.total}"]
        if status.work is not None:
            name, done, total = status.work
            parts.append(f"{name} {done}/{total}")
        self.note(", ".join([*parts, f"elapsed {hms(status.elapsed_s)}"]))

    def _keep(self, metrics: Mapping[str, Any], kind: Kind, batch: int, update: int) -> None:
        """Keeps the score of a row for the curves and the card."""
        score = Score.of(metrics, batch=batch, update=update)
        if math.isfinite(score.unassisted):
            self.status.scores[kind].append(score)

    def _line(self, metrics: Mapping[str, float], kind: Kind, batch: int, update: int) -> str:
        score = Score.of(metrics, batch=batch, update=update)
        shares = [f"unassisted {100 * score.unassisted:.1f}%"]
        if math.isfinite(score.assisted):
            shares.append(f"assisted {100 * score.assisted:.1f}%")
        if metrics.get("guidance/failed"):
            shares.append(f"guidance failed {metrics['guidance/failed']:.0f}")
        if "perf/rollout_tok_s" in metrics:
            shares.append(f"{metrics['perf/rollout_tok_s']:.0f} tok/s")
        # Every batch of a training makes updates; `socpo rollout` makes none.
        names: dict[Kind, str] = {"batch": "train" if update else "rollout", "eval": "eval"}
        position = f"{names[kind]:<5} batch {batch}/{self.status.num_batches}"
        position += f" update {update}" if update or kind == "eval" else ""
        left_s = self.status.left_s
        return "  ".join([position, *shares, f"left {'?' if left_s is None else hms(left_s)}"])

    def _estimate(self) -> str:
        """Returns how long the run will take, from its first batch."""
        status = self.status
        unit: dict[Kind, str] = {"batch": "a batch", "eval": "an evaluation"}
        paces = ", ".join(
            f"{seconds / status.num_ended[kind]:.1f} s {unit[kind]}"
            for kind, seconds in status.spent_s.items()
        )
        what = "the whole run" if status.first_batch == 1 else "the rest of the run"
        time_text = hms(status.elapsed_s + (status.left_s or 0.0))
        return f"estimate: {what} takes about {time_text} ({paces})"

    def _changes(self) -> list[tuple[str, str]]:
        """Returns lines from where to where the student came, by evaluations if there are two."""
        scores = self.status.scores
        counts = self.status.all_counts
        if not self.status.update and not scores["eval"] and (total := counts.rollouts):
            # Rollouts of one student, which did not come anywhere.
            rows = [("unassisted", percent(counts.unassisted / total))]
            if counts.guided:
                rows.append(("assisted", percent((counts.unassisted + counts.rescued) / total)))
            return rows
        name: Kind = "eval" if len(scores["eval"]) > 1 or not scores["batch"] else "batch"
        where = "held-out questions" if name == "eval" else "training batches"
        # The first and the last one, or the only one.
        ends = scores[name][:1] + scores[name][1:][-1:]
        span = " to ".join(str(x.update) for x in ends)
        texts = from_to(ends)
        if texts:
            texts["unassisted"] += f"  {where}, update {span}"
        return list(texts.items())

    def _work_done(self) -> list[tuple[str, str]]:
        """Returns lines of what was done: sums of the run, and the teacher's part."""
        status = self.status
        counts = status.all_counts
        done = status.first_batch - 1 + status.num_ended.get("batch", 0)
        since = "" if status.first_batch == 1 else f" since batch {status.first_batch}"
        work = [
            counted(done, "batch", "es"),
            counted(status.update, "update"),
            f"{counted(status.num_tokens, 'token')} sampled",
        ]
        if status.num_ended or counts.rollouts:
            work.append(f"{hms(status.elapsed_s)}{since}")
        rows = [("done", ", ".join(work))]
        if counts.guided or counts.failed:
            leaked = f", stated the answer in {counts.leaked}" if counts.leaked else ""
            failed = f", failed to answer in {counts.failed}" if counts.failed else ""
            guided = f"guided {counts.guided} of {counts.rollouts} rollouts{since}"
            rows.append(("teacher", f"{guided}, rescued {counts.rescued}{leaked}{failed}"))
        return rows


def counted(count: int, noun: str, ending: str = "s") -> str:
    """Returns a count with its noun: 1 batch, 2,000 batches."""
    return f"{count:,} {noun}{ending if count != 1 else ''}"


class GuidanceWatch:
    """Watches batch by batch whether the teacher still answers. Call `watch_batch` after each
    batch.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._has_answered = False
        self._failed_in_a_row: float = 0  # since the last batch with an answer

    def watch_batch(self, rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> str | None:
        """Prints warnings about a batch; returns the warning if the teacher counts as silent.

        A teacher that never answered is silent after the first batch that asked it in vain. One
        that has answered is silent after SILENCE failures in a row.
        """
        line = unanswered(rollouts, metrics)
        for warning in (overflow(rollouts), line):
            if warning is not None:
                self._progress.warn(f"warning: {warning}")
        if any(map(has_guidance, rollouts)):
            self._has_answered = True
            self._failed_in_a_row = 0
        else:
            self._failed_in_a_row += metrics["guidance/failed"]
        is_silent = not self._has_answered or self._failed_in_a_row >= SILENCE
        return line if is_silent else None


def unanswered(rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> str | None:
    """Returns a line if all guidance of a batch failed; None if some came or none was needed."""
    num_failed = metrics["guidance/failed"]
    if any(map(has_guidance, rollouts)) or not num_failed:
        return None
    return f"teacher: all {num_failed:.0f} guidances of a batch failed ({failures_text(metrics)})"


def has_guidance(rollout: Rollout) -> bool:
    """Whether the teacher answered at least once, even if the student was not shown the answer."""
    return any(turn.guidance is not None for turn in rollout.turns)


def overflow(rollouts: Sequence[Rollout]) -> str | None:
    """Returns a line if no guidance led to another attempt, as the context had no room for one."""
    guided = [rollout for rollout in rollouts if has_guidance(rollout)]
    if not guided or any(rollout.end_reason != "overflow" for rollout in guided):
        return None
    return (
        f"guidance: all {len(guided)} rollouts with guidance ended there, as a next attempt would "
        "exceed the student's context; lower rollout.attempt_limit, rollout.guidance_limit or "
        "rollout.max_new_tokens"
    )
