"""Keeps what `socpo eval` found: RUN/eval.json, a list of evaluations, the newest last.

A training run may write to the same folder meanwhile, so metrics.jsonl is left to it.

    [{"checkpoint": "runs/run/checkpoints/update_000010", "when": "2026-01-31T09:15:00+00:00",
      "data": "held_out.jsonl", "measured_by": "200 with hash .., 16 samples of ..",
      "metrics": {"success/unassisted": 0.41, ..}}]
"""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from socpo_fast.files import replace_file

FILE = "eval.json"
KEYS = {"checkpoint", "when", "data", "measured_by", "metrics"}


def add_evaluation(
    folder: Path, metrics: Mapping[str, float], *, checkpoint: str, data: str, measured_by: str
) -> Path:
    """Adds an evaluation to a run's eval.json and returns the file's path.

    Args:
        folder:      the run's; created if absent.
        checkpoint:  what was evaluated: a folder, a name, or "builtin".
        data:        the setting data.eval.
        measured_by: text of all that the result depends on beside the weights.

    Raises:
        ValueError: the file holds something else. RunFailed, OSError: the disk is full or fails.
    """
    evaluations = read_evaluations(folder)
    evaluations.append(
        {
            "checkpoint": checkpoint,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": data,
            "measured_by": measured_by,
            "metrics": without_nan(metrics),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE, json.dumps(evaluations, indent=1) + "\n")
    return folder / FILE


def without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Returns metrics as JSON can hold them: None for what is not known."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the evaluations of a run's eval.json, the newest last; [] if there is none.

    Raises:
        ValueError: the file is no list of evaluations.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    rows = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if not all(isinstance(row, dict) and row.keys() >= KEYS and _is_flat(row) for row in rows):
        raise ValueError(f"eval: {path} must be a list of evaluations, got another one; move it")
    return rows


def _parse(text: str) -> list[Any]:
    """Returns a list of JSON; one with None for any other text."""
    with suppress(ValueError, RecursionError):
        if isinstance(rows := json.loads(text), list):
            return rows
    return [None]


def _is_flat(row: Mapping[str, Any]) -> bool:
    """Whether the metrics of an entry are numbers."""
    metrics = row["metrics"]
    return isinstance(metrics, dict) and all(
        isinstance(value, int | float | None) for value in metrics.values()
    )
