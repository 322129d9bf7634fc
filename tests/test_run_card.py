"""What a run that was trained from Python says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from socpo_fast import TrainingRun


def test_a_share_that_is_not_known_has_no_line(tmp_path: Path) -> None:
    """A single batch came from nowhere, and without guidance there is no assisted share."""
    (tmp_path / "config.toml").touch()
    row = {"kind": "batch", "batch": 1, "update": 1, "success/unassisted": 0.5}
    rows = [row | {"success/assisted": 0.75}, row | {"batch": 2, "success/assisted": None}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(rows[0]) + "\n")
    assert repr(TrainingRun(tmp_path)).endswith(": 50.0 %; assisted, training batches: 75.0 %)")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert repr(TrainingRun(tmp_path)).endswith(": 50.0 % -> 50.0 %)")
