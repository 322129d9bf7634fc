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


@pytest.mark.parametrize(
    "full_file", ["metrics.jsonl", "batch_000002.jsonl.tmp", "trainer_state.json"]
)
def test_full_disk_is_one_line_and_the_run_resumes(
    full_file: str,
    run_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills while metrics, rollouts or a checkpoint are written: older files stay."""
    old_checkpoints = snapshot(run_dir / "run" / "checkpoints")
    writer = {
        "metrics.jsonl": "fsync",
        "batch_000002.jsonl.tmp": "fsync",
        "trainer_state.json": "write_text",
    }[full_file]
    fail_when_writing(full_file, writer, monkeypatch)
    changes = {"run.num_batches": 2, "eval.every_updates": 0}
    assert main(words_of("train", run_dir, changes)) == 2
    printed = capsys.readouterr()
    assert_refused(
        printed.err,
        f"(run|checkpoint): .*{full_file.removesuffix('.tmp') if 'batch' in full_file else ''}.* "
        "could not",
    )
    assert "No space left on device" in printed.err
    checkpoints = snapshot(run_dir / "run" / "checkpoints")
    assert checkpoints == old_checkpoints, (
        "the checkpoint is whole, and nothing half-written lies beside it"
    )
    monkeypatch.undo()
    assert main(words_of("train", run_dir, changes)) == 0
    rows = [
        json.loads(line) for line in (run_dir / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == [1, 2]


def fail_when_writing(name: str, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes os.fsync or Path.write_text raise ENOSPC for files of this name."""
    disk_full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync = os.fsync
    write_text = Path.write_text

    def fsync_or_fail(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == name:
            raise disk_full
        fsync(descriptor)

    def write_text_or_fail(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == name:
            raise disk_full
        return write_text(self, *args, **kwargs)

    if writer == "fsync":
        monkeypatch.setattr(os, "fsync", fsync_or_fail)
    else:
        monkeypatch.setattr(Path, "write_text", write_text_or_fail)
