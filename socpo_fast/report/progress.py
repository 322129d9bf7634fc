"""A run for people: a live display on a terminal, elsewhere one plain line a batch or evaluation."""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from socpo_fast.metrics import Kind


class Progress:
    """A run for people: a live display on a terminal, elsewhere one plain line a batch or evaluation.

    with Progress(num_batches=100) as progress:
        progress.phase("rollout", batch=1, update=0, total=128)
        progress.advance(num_tokens=57)
        progress.report(metrics, kind="batch", batch=1, update=2)
    """

    def __init__(self, *, num_batches: int, first_batch: int = 1, live: bool = True, file: TextIO | None = None):
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self.num_batches, self._first_batch, self._batches_done = num_batches, first_batch, first_batch - 1
        self._started = self._phase_started = time.monotonic()
        self._phase, self._batch, self._update, self._done, self._total, self._tokens = "start", 0, 0, 0, 0, 0
        self._unassisted: dict[Kind, list[float]] = {"batch": [], "update": [], "eval": []}
        shown = live and self._console.is_terminal
        self._live = Live(get_renderable=self._display, console=self._console) if shown else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._live is not None:
            with suppress(OSError, SystemExit):
                self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays. A terminal that is closed costs the line and nothing else."""
        # A closed pipe, as rich takes it, a closed file, an encoding that lacks a letter.
        with suppress(OSError, ValueError, SystemExit):
            self._console.print(text, soft_wrap=True)

    def phase(self, name: str, *, batch: int, update: int, total: int) -> None:
        """Begin a phase (rollout, update, eval) of `total` units of work."""
        self._phase, self._batch, self._update, self._total = name, batch, update, total
        self._done, self._tokens, self._phase_started = 0, 0, time.monotonic()

    def advance(self, units: int = 1, *, num_tokens: int = 0) -> None:
        self._done += units
        self._tokens += num_tokens

    def report(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """End a batch, update or evaluation with its metrics."""
        if math.isfinite(unassisted := metrics.get("success/unassisted", math.nan)):
            self._unassisted[kind].append(unassisted)
        if kind == "batch":
            self._batches_done = batch
        if self._live is None and kind != "update":
            self.note(self._line(metrics, kind, batch, update))

    def _line(self, metrics: Mapping[str, float], kind: Kind, batch: int, update: int) -> str:
        shares = [
            f"{label} {100 * metrics[name]:.1f}%"
            for name, label in (("success/unassisted", "unassisted"), ("success/assisted", "assisted"))
            if name in metrics
        ]
        if metrics.get("guidance/failed"):
            shares.append(f"guidance failed {metrics['guidance/failed']:.0f}")
        if "perf/rollout_tok_s" in metrics:
            shares.append(f"{metrics['perf/rollout_tok_s']:.0f} tok/s")
        place = f"{'train' if kind == 'batch' else kind:<5} batch {batch}/{self.num_batches} update {update}"
        return "  ".join([place, *shares, f"left {self._eta()}"])

    def _eta(self) -> str:
        """Time left at the mean pace of this process."""
        done = self._batches_done - self._first_batch + 1
        if not done:
            return "?"
        left_s = (time.monotonic() - self._started) / done * (self.num_batches - self._batches_done)
        return f"{int(left_s // 3600)}:{int(left_s // 60 % 60):02d}:{int(left_s % 60):02d}"

    def _display(self) -> Table:
        """The live picture, drawn anew at every refresh."""
        elapsed_s = max(time.monotonic() - self._phase_started, 1e-9)
        pace = f"{self._tokens / elapsed_s:.0f} tok/s" if self._tokens else ""
        table = Table.grid(padding=(0, 2))
        table.add_row(f"batch {self._batch}/{self.num_batches}", f"update {self._update}", f"left {self._eta()}")
        bar = ProgressBar(total=max(self._total, 1), completed=self._done, width=30)
        table.add_row(f"{self._phase} {self._done}/{self._total}", bar, pace)
        curves = {"unassisted, training": self._unassisted["batch"], "unassisted, held out": self._unassisted["eval"]}
        for label, values in curves.items():
            if values:
                table.add_row(label, sparkline(values[-30:]), f"{100 * values[-1]:.1f}%")
        return table


def sparkline(shares: list[float]) -> str:
    """Shares in [0, 1] as one block character each."""
    return "".join("▁▂▃▄▅▆▇█"[min(int(share * 8), 7)] for share in shares)
