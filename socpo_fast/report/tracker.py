"""What a run writes down while it runs: metrics.jsonl and TensorBoard (rollouts/: rollouts.py).

Read MetricsWriter. Below it stand the rows of any record, one JSON object a line: a file of rows is
replaced as a whole (replace_jsonl), or grows row by row, each on the disk when append_row returns.
Only such a file may end in half a line, and read_jsonl leaves that out.

A row of metrics.jsonl is {"kind": "batch" | "update" | "eval", "batch": 3, "update": 12,
"success/unassisted": 0.41, ..}; nan becomes null. The names are those of METRICS. After a crash a
file may end in half a line: readers skip it, and a resumed run rewrites what came after its
checkpoint.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, get_args

from socpo_fast.files import named_failure, replace_file
from socpo_fast.metrics import Kind, meaning_of


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends rows to metrics.jsonl and TensorBoard; each row is on the disk when write returns.

    Args:
        run_folder:          made when absent.
        resume_after_update: keep rows up to this update and drop later ones, which will be
                             written again; None starts afresh and drops all.
    """

    def __init__(self, run_folder: str | Path, *, resume_after_update: int | None = None):
        # Here, as it takes half a second and readers need none of it.
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(run_folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_after_update is None else resume_after_update
        kept = [row for row in read_metrics(self.path) if row["update"] <= last]
        reached = max((row["update"] for row in kept), default=0)
        is_own = (self.path.parent / "checkpoints" / f"update_{last:06d}").exists()
        if is_own and reached < last:
            warnings.warn(
                f"{self.path}: rows of updates {reached + 1} to {last} are missing", stacklevel=2
            )
        replace_jsonl(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard: SummaryWriter | None = None
        with self._helping():
            self._tensorboard = SummaryWriter(
                str(self.path.parent / "tb"), purge_step=last + 1, flush_secs=30
            )

    def write(self, metrics: Mapping[str, float], *, kind: Kind, batch: int, update: int) -> None:
        """Write one row. batch counts from 1; update is the number of updates made so far."""
        for name in metrics:
            assert meaning_of(name), f"metric {name} is not described in METRICS"
        values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with named_failure(self.path):
            append_row(self._file, {"kind": kind, "batch": batch, "update": update, **values})
        prefix = "eval/" if kind == "eval" else ""
        with self._helping():
            for name, value in values.items():
                if value is not None and self._tensorboard is not None:
                    self._tensorboard.add_scalar(prefix + name, value, update)

    def close(self) -> None:
        self._file.close()
        with self._helping():
            if self._tensorboard is not None:
                self._tensorboard.close()

    @contextmanager
    def _helping(self) -> Iterator[None]:
        """TensorBoard never ends a run: what fails is told, and left out from then on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - its own, from its own thread
            self._tensorboard = None
            warnings.warn(
                f"{self.path.parent / 'tb'}: TensorBoard stops here ({error}); the run goes on",
                stacklevel=3,
            )

    def __exit__(self, *_error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order, none when it is absent.

    Of rows of one (kind, batch, update) it is the last one that counts.
    """
    last = {(row["kind"], row["batch"], row["update"]): row for row in read_jsonl(path, _is_whole)}
    return list(last.values())


def _is_whole(row: Mapping[str, Any]) -> bool:
    """Whether it says what it measures, in numbers."""
    values = [value for name, value in row.items() if name not in ("kind", "batch", "update")]
    return (
        row.get("kind") in get_args(Kind)
        and all(
            isinstance(count, int) and 0 <= count < 2**63
            for count in (row.get("batch"), row.get("update"))
        )
        and all(isinstance(value, int | float | None) for value in values)
        and not any(abs(value or 0) > 1e308 for value in values)  # an integer that is no float
    )


def replace_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one line of JSON a row."""
    replace_file(path, "".join(map(_json_line, rows)))


def append_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """Append a row to an open JSONL file; it is on the disk when this returns."""
    file.write(_json_line(row))
    file.flush()
    os.fsync(file.fileno())


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(
    path: str | Path, is_whole: Callable[[dict[str, Any]], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when it is absent.

    One warning tells of torn lines, another one of rows that are not whole: both are left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # Not splitlines, which would also cut at U+2028 inside a text.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [row for line in lines if isinstance(row := _json_or_none(line), dict)]
    if num_torn := len(lines) - len(rows):
        warnings.warn(
            f"{path}: {num_torn} torn lines left out; a write was interrupted there", stacklevel=2
        )
    whole = [row for row in rows if is_whole(row)]
    if num_damaged := len(rows) - len(whole):
        warnings.warn(f"{path}: {num_damaged} damaged rows left out", stacklevel=2)
    return whole


def _json_or_none(line: bytes) -> Any:
    """What stands in a line; None where it is torn, nested without end, or no UTF-8."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
