"""What a run writes down while it runs: metrics.jsonl, TensorBoard, rollouts/, and a line or a display for people.

Read METRICS (the names there are), MetricsWriter, then the rollout rows, then Progress. A row of metrics.jsonl is
{"kind": "batch" | "update" | "eval", "batch": 3, "update": 12, "success/unassisted": 0.41, ..}; nan becomes null.
After a crash a file may end in half a line: readers skip it, and a resumed run rewrites what came after its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

if TYPE_CHECKING:
    from rich.table import Table

    from socpo_fast.types import Question, Rollout

METRICS: dict[str, str] = {
    "success/unassisted": "share of rollouts whose first attempt, made alone, is correct: the headline",
    "success/assisted": "share of rollouts correct in any attempt, guided ones included; never the headline",
    "reward/mean": "mean reward of an attempt, after decay",
    "decay/f_1": "factor on the reward of second attempts, the first ones' mean reward (f_2 for third ones, ..)",
    "guidance/rate": "share of rollouts in which the teacher spoke",
    "guidance/rescue_rate": "share of guided rollouts that end correct",
    "guidance/leak_rate": "share of guidance that states the answer",
    "guidance/failed": "rollouts that ended because the teacher failed, count",
    "guidance/overflow": "rollouts that ended because the next context would exceed the model's length, count",
    "rollout/attempt_tokens": "mean length of an attempt, tokens",
    "rollout/truncated": "share of attempts that hit the length limit",
    "policy/loss": "clipped policy loss of the update",
    "policy/entropy": "mean entropy of the next token at temperature, nats",
    "policy/ratio_mean": "mean of exp(logprob - old logprob)",
    "policy/clip_fraction": "share of loss tokens whose ratio was clipped",
    "policy/grad_norm": "norm of the gradient before clipping",
    "policy/lr": "learning rate of the update",
    "policy/bad_updates": "updates skipped so far because loss or gradient was not finite, count",
    "policy/sampler_mismatch_nats": "largest |trainer's - sampler's| log-prob of a sampled token, nats",
    "perf/rollout_tok_s": "sampled tokens a second of rollout, tok/s",
    "perf/train_tok_s": "tokens forwarded a second of update, tok/s",
    "perf/prefill_tokens": "prompt, bridge and recomputed tokens the engine read, count",
    "perf/decode_tokens": "tokens the engine sampled, count",
    "perf/preemptions": "sequences that gave up their pages and were recomputed, count",
    "perf/tokens_forwarded": "tokens that passed the layers in the update, count",
    "perf/unique_tokens": "nodes of the rollout trees of the update (prompt once a group), tokens",
    "time/rollout_s": "rollout, guidance included, s",
    "time/teacher_wait_s": "mean wait of a guided rollout for its teacher, s",
    "time/update_s": "all updates of the batch, s",
    "time/total_s": "all of it, s",
}
Kind = Literal["batch", "update", "eval"]


class MetricsWriter:
    """Appends rows to metrics.jsonl and TensorBoard; each row is on the disk when write returns.

    Args:
        run_folder:          made when absent.
        resume_after_update: keep rows up to this update and drop later ones, which will be written again;
                             None starts afresh and drops all.
    """

    def __init__(self, run_folder: str | Path, *, resume_after_update: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # here: it takes half a second, and readers need none of it

        self.path = Path(run_folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_after_update is None else resume_after_update
        kept = [row for row in read_metrics(self.path) if row["update"] <= last]
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.path.parent / "tb"), purge_step=last + 1, flush_secs=30)

    def write(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """One row. batch and update count from 1; update is the number of updates made so far (0 before the first)."""
        for name in metrics:
            assert name in METRICS or name.startswith("decay/f_"), f"metric {name} is not described in METRICS"
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"kind": kind, "batch": batch, "update": update, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            if value is not None:
                self._tensorboard.add_scalar(f"eval/{name}" if kind == "eval" else name, value, update)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, none when it is absent; of rows of one (kind, batch, update) the last."""
    rows = {(row["kind"], row["batch"], row["update"]): row for row in read_jsonl(path)}
    return list(rows.values())


def rollout_record(rollout: Rollout, question: Question, *, batch: int) -> dict[str, Any]:
    """A rollout as a row for people: texts and numbers, no token ids. None = not known (no update, no decay yet)."""
    attempts = [
        {
            "text": rollout.texts[k],
            "is_correct": rollout.is_correct[k],
            "reward": _at(rollout.rewards, k),
            "advantage": _at(rollout.advantages, k),
            "num_tokens": attempt.num_tokens,
            "finish_reason": attempt.finish_reason,
            "cut": _at(rollout.cuts, k),
        }
        for k, attempt in enumerate(rollout.attempts)
    ]
    return {
        "batch": batch,
        "question_idx": rollout.question_idx,
        "rollout_idx": rollout.rollout_idx,
        "data_source": question.data_source,
        "question": question.text,
        "ground_truth": question.ground_truth,
        "attempts": attempts,
        "guidance": list(rollout.guidance),
        "end_reason": rollout.end_reason,
        "policy_version": rollout.attempts[0].policy_version if rollout.attempts else None,
    }


def write_rollouts(
    run_folder: str | Path, rollouts: Iterable[Rollout], questions: Mapping[int, Question], *, batch: int
) -> Path:
    """Write rollouts/batch_000001.jsonl, in the order of questions however they finished; questions by question_idx."""
    path = Path(run_folder) / "rollouts" / f"batch_{batch:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    in_order = sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
    rows = [rollout_record(rollout, questions[rollout.question_idx], batch=batch) for rollout in in_order]
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when it is absent. Torn lines are left out with one warning."""
    if not Path(path).is_file():
        return []
    rows, num_torn = [], 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):  # not splitlines: U+2028 is text
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            num_torn += 1
    if num_torn:
        warnings.warn(f"{path}: {num_torn} torn lines left out; a write was interrupted there", stacklevel=2)
    return rows


def replace_file(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader or a crash meets the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _at(values: list[Any], k: int) -> Any:
    return values[k] if k < len(values) else None


class Progress:
    """A run for people: a live display on a terminal, elsewhere one plain line a batch or evaluation.

    with Progress(num_batches=100) as progress:
        progress.phase("rollout", batch=1, update=0, total=128)
        progress.advance(num_tokens=57)
        progress.report(metrics, kind="batch", batch=1, update=2)
    """

    def __init__(self, *, num_batches: int, first_batch: int = 1, live: bool = True, file: TextIO | None = None):
        from rich.console import Console
        from rich.live import Live

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
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
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
        rates = [f"{metrics[name]:.0f} tok/s" for name in ("perf/rollout_tok_s",) if name in metrics]
        place = f"batch {batch}/{self.num_batches} update {update}"
        return "  ".join([f"{'train' if kind == 'batch' else kind:<5} {place}", *shares, *rates, f"left {self._eta()}"])

    def _eta(self) -> str:
        """Time left at the mean pace of this process."""
        done = self._batches_done - self._first_batch + 1
        if not done:
            return "?"
        left_s = (time.monotonic() - self._started) / done * (self.num_batches - self._batches_done)
        return f"{int(left_s // 3600)}:{int(left_s // 60 % 60):02d}:{int(left_s % 60):02d}"

    def _display(self) -> Table:
        """The live picture, drawn anew at every refresh."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

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
