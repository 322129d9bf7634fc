"""Keeps what `socpo eval` found: RUN/eval.json, a list of evaluations, the newest last.

A training run may write to the same folder meanwhile, so metrics.jsonl is left to it.

    [{"checkpoint": "runs/run/checkpoints/update_000010", "when": "2026-01-31T09:15:00+00:00",
      "data": "held_out.jsonl", "measured_by": "200 with hash .., 16 samples of ..",
      "metrics": {"success/unassisted": 0.41, ..}}]
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from socpo_fast.files import locked, replace_file
from socpo_fast.report.tracker import ScalarWriter, without_nan

FILE = "eval.json"


class Evaluation(BaseModel, extra="allow"):
    """One entry of the file; metrics are None where they are not known."""

    checkpoint: str
    when: str
    data: str
    measured_by: str
    metrics: dict[str, FiniteFloat | None]


_EVALUATIONS = TypeAdapter(list[Evaluation])


def add_evaluation(
    folder: Path, metrics: Mapping[str, float], *, checkpoint: str, data: str, measured_by: str
) -> None:
    """Adds an evaluation to a run's eval.json.

    TensorBoard shows it as the run tb/eval, at the update that the checkpoint's name ends in, or 0.

    Args:
        folder:      the run's; created if absent. Two processes may add to it at the same time.
        checkpoint:  what was evaluated: a folder, a name, or "builtin".
        data:        the setting data.eval.
        measured_by: text of all that the result depends on beside the weights.

    Raises:
        ValueError: the file holds something else. RunFailed, OSError: the disk is full or fails.
    """
    evaluation = {
        "checkpoint": checkpoint,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": data,
        "measured_by": measured_by,
        "metrics": without_nan(metrics),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        evaluations = [*read_evaluations(folder), evaluation]
        replace_file(folder / FILE, json.dumps(evaluations, indent=1) + "\n")
    update = re.search(r"update_(\d+)/?$", checkpoint)
    # Not in tb/ itself: TensorBoard reads the newest file of a folder only, and so would miss what
    # a training writes there from now on.
    scalars = ScalarWriter(folder / "tb" / "eval")
    scalars.add({f"eval/{name}": x for name, x in metrics.items()}, int(update[1]) if update else 0)
    scalars.close()


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the evaluations of a run's eval.json, the newest last; [] if there is none.

    Raises:
        ValueError: the file is no list of evaluations.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        evaluations = _EVALUATIONS.validate_json(path.read_bytes(), strict=True)
    except ValueError:
        raise ValueError(
            f"eval: {path} must be a list of evaluations, got something else; move it"
        ) from None
    return [evaluation.model_dump() for evaluation in evaluations]
