"""A disk that is full or that fails while a run writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.cli import main
from tests.helpers.bad_input import (
    assert_refused,
    finished_run,
    run_dir,
    snapshot,
    words_of,
)

__all__ = ["finished_run", "run_dir"]  # fixtures


@pytest.mark.parametrize("full", ["metrics.jsonl", "batch_000002.jsonl.tmp", "trainer_state.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    full: str, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills while metrics, rollouts or a checkpoint are written; what was there before is
    still there.
    """
    before = snapshot(run_dir / "run" / "checkpoints")
    write_to = {
        "metrics.jsonl": "fsync",
        "batch_000002.jsonl.tmp": "fsync",
        "trainer_state.json": "write_text",
    }[full]
    fail_when_writing(full, write_to, monkeypatch)
    more = {"run.num_batches": 2, "eval.every_updates": 0}
    assert main(words_of("train", run_dir, more)) == 2
    shown = capsys.readouterr()
    assert_refused(
        shown.err,
        f"(run|checkpoint): .*{full.removesuffix('.tmp') if 'batch' in full else ''}.* could not",
    )
    assert "No space left on device" in shown.err
    after = snapshot(run_dir / "run" / "checkpoints")
    assert after == before, "the checkpoint is whole, and nothing half-written lies beside it"
    monkeypatch.undo()
    assert main(words_of("train", run_dir, more)) == 0
    rows = [
        json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == [1, 2]


def fail_when_writing(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync = os.fsync
    write_text = Path.write_text

    def fsync_or_fail(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            raise full
        fsync(descriptor)

    def write_text_or_fail(self: Path, *given: Any, **named: Any) -> int:
        if self.name == name:
            raise full
        return write_text(self, *given, **named)

    if how == "fsync":
        monkeypatch.setattr(os, "fsync", fsync_or_fail)
    else:
        monkeypatch.setattr(Path, "write_text", write_text_or_fail)
