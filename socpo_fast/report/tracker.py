"""Writes a run's metrics to metrics.jsonl and TensorBoard, and reads and writes any JSONL file.

TensorBoard is an extra. Read MetricsWriter first. A row of metrics.jsonl is

    {"kind": "batch" | "update" | "eval", "batch": 3, "update": 12, "success/unassisted": 0.41, ..}

with the names of METRICS; nan becomes null. A resumed run drops the rows after its checkpoint and
writes them again.

Below stand the functions for any JSONL file. Such a file is either replaced as a whole
(replace_jsonl) or grows row by row (append_row, which returns when the row is on the disk). Only a
file that grows can end in half a line after a crash; read_jsonl skips that line.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO, get_args

from socpo_fast.files import named_failure, replace_file
from socpo_fast.metrics import Kind, meaning_of


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends rows to metrics.jsonl and TensorBoard; each row is on the disk when write returns.

    Args:
        run_folder:          created if absent.
        resume_after_update: keeps rows up to this update and drops later ones, which will be
                             written again; None starts afresh and drops all.
    """

    def __init__(self, run_folder: str | Path, *, resume_after_update: int | None = None):
        self.path = Path(run_folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_after_update is None else resume_after_update
        kept = [row for row in read_metrics(self.path) if row["update"] <= last]
        reached = max((row["update"] for row in kept), default=0)
        # Rows may be missing only where the run's own folder was edited. A run that begins from
        # another run's checkpoint has no rows of the updates before it.
        is_own = (self.path.parent / "checkpoints" / f"update_{last:06d}").exists()
        if is_own and reached < last:
            warnings.warn(
                f"{self.path}: rows of updates {reached + 1} to {last} are missing", stacklevel=2
            )
        replace_jsonl(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._scalars = ScalarWriter(self.path.parent / "tb", purge_step=last + 1)

    def write(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """Writes one row. batch counts from 1; update is the number of updates made so far."""
        for name in metrics:
            assert meaning_of(name), f"metric {name} is not described in METRICS"
        row = {"kind": kind, "batch": batch, "update": update, **without_nan(metrics)}
        with named_failure(self.path):
            append_row(self._file, row)
        prefix = "eval/" if kind == "eval" else ""
        self._scalars.add({prefix + name: value for name, value in metrics.items()}, update)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._scalars.close()

    def __exit__(self, *_error: object) -> None:
        self.close()


class ScalarWriter:
    """Writes numbers for TensorBoard to a folder. If TensorBoard fails, it warns and stops.

    Where the package tensorboard is not installed, there is no folder, and nothing is said.

    Args:
        purge_step: TensorBoard no longer shows what earlier starts wrote from this update on.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None):
        self.folder = folder
        self._writer: Any = None  # a SummaryWriter, until it fails
        if find_spec("tensorboard"):
            with self._optional():
                # Imported here, as it takes half a second.
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def add(self, values: Mapping[str, float], update: int) -> None:
        """Writes numbers at an update; leaves out nan and infinities."""
        with self._optional():
            for name, value in values.items():
                if self._writer is not None and math.isfinite(value):
                    self._writer.add_scalar(name, value, update)

    def close(self) -> None:
        """Closes the file."""
        with self._optional():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """Keeps a run going if TensorBoard fails: warns once and writes to it no more."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - TensorBoard raises anything, from its thread
            self._writer = None
            warnings.warn(
                f"{self.folder}: TensorBoard stops here ({error}); the run goes on", stacklevel=4
            )


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Returns metrics as JSON can hold them: None for what is not known."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl in order; [] if it is absent.

    If several rows have the same (kind, batch, update), the last one counts.
    """
    last = {
        (row["kind"], row["batch"], row["update"]): row for row in read_jsonl(path, _is_complete)
    }
    return list(last.values())


def _is_complete(row: Mapping[str, Any]) -> bool:
    """Whether a row names its kind, batch and update, and has numbers only."""
    values = [value for name, value in row.items() if name not in ("kind", "batch", "update")]
    return (
        row.get("kind") in get_args(Kind)
        and all(
            isinstance(count, int) and 0 <= count < 2**63
            for count in (row.get("batch"), row.get("update"))
        )
        and all(isinstance(value, int | float | None) for value in values)
        # JSON integers have no limit, but above 1e308 they do not convert to a float.
        and not any(abs(value or 0) > 1e308 for value in values)
    )


def replace_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a file by one line of JSON a row."""
    replace_file(path, "".join(map(_json_line, rows)))


def append_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """Appends a row to an open JSONL file; it is on the disk when this returns."""
    file.write(_json_line(row))
    file.flush()
    os.fsync(file.fileno())


def _json_line(row: Mapping[str, Any]) -> str:
    # A teacher's or grader's text may hold half of a surrogate pair, which UTF-8 cannot store.
    text = json.dumps(row, ensure_ascii=False).encode(errors="replace").decode()
    return f"{text}\n"


def read_jsonl(
    path: str | Path, is_whole: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Returns the objects of a JSONL file; [] if it is absent.

    Torn lines and rows that `is_whole` rejects are left out, with one warning for each kind.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # str.splitlines would also cut at U+2028, which may be part of a text.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [row for line in lines if isinstance(row := _json_or_none(line), dict)]
    if num_torn := len(lines) - len(rows):
        warnings.warn(
            f"{path}: {num_torn} torn lines left out; a write was interrupted there", stacklevel=2
        )
    complete = [row for row in rows if is_whole(row)]
    if num_damaged := len(rows) - len(complete):
        warnings.warn(f"{path}: {num_damaged} damaged rows left out", stacklevel=2)
    return complete


def _json_or_none(line: bytes) -> Any:
    """Parses a line; None if it is torn, nested too deeply, or not UTF-8."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
