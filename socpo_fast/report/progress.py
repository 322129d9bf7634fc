"""Tells people about a run while it goes.

first_line names the run, Progress shows how far it is, and GuidanceWatch warns when the teacher
does not answer or its guidance has no effect.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TextIO

import torch
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from socpo_fast.config import RunConfig
from socpo_fast.metrics import Kind
from socpo_fast.ops import available_impls
from socpo_fast.report.accuracy import failures_text, sparkline
from socpo_fast.report.printable import printable
from socpo_fast.types import Rollout

# A teacher that has answered before counts as silent after this many failures in a row. A student
# that is nearly always right asks once or twice a batch. A single late answer then leaves a batch
# without any, which is no reason to stop a run.
SILENCE = 8


class Progress:
    """Shows a run: live on a terminal, elsewhere as one plain line a batch or evaluation.

    with Progress(num_batches=100) as progress:
        progress.phase("rollout", batch=1, update=0, total=128)
        progress.advance(num_tokens=57)
        progress.report(metrics, kind="batch", batch=1, update=2)
    """

    def __init__(
        self,
        *,
        num_batches: int,
        first_batch: int = 1,
        live: bool = True,
        file: TextIO | None = None,
    ):
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self.num_batches = num_batches
        self._first_batch = first_batch
        self._batches_done = first_batch - 1
        self._started = self._phase_started = time.monotonic()
        self._phase = "start"
        self._batch = 0
        self._update = 0
        self._done = 0
        self._total = 0
        self._tokens = 0
        self._unassisted: dict[Kind, list[float]] = {"batch": [], "update": [], "eval": []}
        is_live = live and self._console.is_terminal
        self._live = Live(get_renderable=self._display, console=self._console) if is_live else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            with suppress(OSError, SystemExit):  # the terminal may be gone by now
                self._live.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays. If the terminal is gone, only the line is lost."""
        # rich turns a closed pipe into SystemExit; a closed file is a ValueError. Neither should
        # end a run of many hours.
        with suppress(OSError, ValueError, SystemExit):
            self._console.print(printable(text, self._console.encoding), soft_wrap=True)

    def phase(self, name: str, *, batch: int, update: int, total: int) -> None:
        """Begins a phase (rollout, update, eval) of `total` units of work."""
        self._phase = name
        self._batch = batch
        self._update = update
        self._total = total
        self._done = 0
        self._tokens = 0
        self._phase_started = time.monotonic()

    def advance(self, units: int = 1, *, num_tokens: int = 0) -> None:
        """Counts finished units of work and sampled tokens of the current phase."""
        self._done += units
        self._tokens += num_tokens

    def report(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """Ends a batch, update or evaluation with its metrics."""
        if math.isfinite(unassisted := metrics.get("success/unassisted", math.nan)):
            self._unassisted[kind].append(unassisted)
        if kind == "batch":
            self._batches_done = batch
        # A line for each update would bury those of batches and evaluations.
        if self._live is None and kind != "update":
            self.note(self._line(metrics, kind, batch, update))

    def _line(self, metrics: Mapping[str, float], kind: Kind, batch: int, update: int) -> str:
        shares = [
            f"{label} {100 * metrics[name]:.1f}%"
            for name, label in (
                ("success/unassisted", "unassisted"),
                ("success/assisted", "assisted"),
            )
            if name in metrics
        ]
        if metrics.get("guidance/failed"):
            shares.append(f"guidance failed {metrics['guidance/failed']:.0f}")
        if "perf/rollout_tok_s" in metrics:
            shares.append(f"{metrics['perf/rollout_tok_s']:.0f} tok/s")
        position = (
            f"{'train' if kind == 'batch' else kind:<5} batch {batch}/{self.num_batches} "
            f"update {update}"
        )
        return "  ".join([position, *shares, f"left {self._eta()}"])

    def _eta(self) -> str:
        """Returns the time left, at the mean pace of this process."""
        # Batches that an earlier start of the run made say nothing about this machine's pace.
        done = self._batches_done - self._first_batch + 1
        if not done:
            return "?"
        left_s = (time.monotonic() - self._started) / done * (self.num_batches - self._batches_done)
        return f"{int(left_s // 3600)}:{int(left_s // 60 % 60):02d}:{int(left_s % 60):02d}"

    def _display(self) -> Table:
        """Draws the live picture; rich calls this at every refresh."""
        elapsed_s = max(time.monotonic() - self._phase_started, 1e-9)
        pace = f"{self._tokens / elapsed_s:.0f} tok/s" if self._tokens else ""
        table = Table.grid(padding=(0, 2))
        table.add_row(
            f"batch {self._batch}/{self.num_batches}",
            f"update {self._update}",
            f"left {self._eta()}",
        )
        table.add_row(
            f"{self._phase} {self._done}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._done, width=30),
            pace,
        )
        curves = {
            "unassisted, training": self._unassisted["batch"],
            "unassisted, held out": self._unassisted["eval"],
        }
        takes_blocks = not self._console.options.ascii_only
        for label, values in curves.items():
            if values:
                curve = sparkline(values[-30:]) if takes_blocks else ""
                table.add_row(label, curve, f"{100 * values[-1]:.1f}%")
        return table


def first_line(run: RunConfig, student: torch.nn.Module, resumed_from: Path | None) -> str:
    """Returns a line that names the run, the model, and the implementation that each op uses."""
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    start = "from the start" if resumed_from is None else f"from {resumed_from.name}"
    impls = ", ".join(f"{op}={impl}" for op, impl in available_impls(run.device).items())
    return f"run {run.name} {start}: {millions:.1f}M parameters, {run.device}; ops: {impls}"


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
                self._progress.note(f"warning: {warning}")
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
