"""One process at a time writes to a run's folder, whatever an ended process leaves behind."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from socpo_fast.cli import main
from socpo_fast.report.folder import LOCK, run_folder
from tests.helpers.bad_input import assert_refused, finished_run, run_dir, snapshot, words_of

__all__ = ["finished_run", "run_dir"]  # fixtures
Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent

HOLD = """
import sys, time
from pathlib import Path
from socpo_fast.report.folder import run_folder

with run_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_a_folder(run_dir: Path, capsys: Capture) -> None:
    """A second process is told which one holds the folder; the lock ends with its holder."""
    command = [sys.executable, "-c", HOLD, str(run_dir / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        old_files = snapshot(run_dir)
        assert old_files["run/.lock"].decode().startswith(f"{holder.pid} on ")
        metrics_path = run_dir / "run" / "metrics.jsonl"
        for subcommand in ("train", "rollout"):
            if subcommand == "rollout":
                metrics_path.rename(metrics_path.with_suffix(".away"))
            assert main(words_of(subcommand, run_dir, {"run.num_batches": 2})) == 2
            message = rf"run: .*/run is in use by process {holder.pid} on .*; wait for its end, or "
            assert_refused(capsys.readouterr().err, message)
        metrics_path.with_suffix(".away").rename(metrics_path)
        assert snapshot(run_dir) == old_files
        assert main(words_of("eval", run_dir, {})) == 0  # it only reads
        # It replaces report.html and curves.svg as a whole.
        assert main(["report", str(run_dir / "run")]) == 0
        holder.send_signal(signal.SIGKILL)
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    assert (run_dir / "run" / ".lock").read_text() == ""


def test_two_threads_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
        run_folder(tmp_path),
    ):
        pytest.fail("both have it")


@pytest.mark.parametrize("is_killed", [False, True])
def test_surviving_fork_does_not_hold_the_lock(is_killed: bool, tmp_path: Path) -> None:
    """A rule or a grader may fork a child that lives longer than the run."""
    program = """
import os, signal, sys, time
from pathlib import Path
from socpo_fast.report.folder import run_folder

with run_folder(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(600)
    print(child, flush=True)
    time.sleep(0.5)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    words = [sys.executable, "-c", program, str(tmp_path), *["kill"] * is_killed]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert parent.wait(30) == (-signal.SIGKILL if is_killed else 0)
            with run_folder(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_fork_keeps_its_own_descriptors(tmp_path: Path) -> None:
    with run_folder(tmp_path):
        child = os.fork()
        if child == 0:
            # The fork has closed the lock, so this file gets the number of its descriptor. Leaving
            # the block must not close it.
            descriptor = os.open(tmp_path / "mine", os.O_RDWR | os.O_CREAT)
            os.write(descriptor, b"kept")
    if child == 0:
        os._exit(0 if os.fstat(descriptor).st_size == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_removed_lock_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused start removes the lock file that it made, maybe just after we have opened it."""
    flock = fcntl.flock

    def unlink_and_flock(lock: int, operation: int) -> None:
        (tmp_path / LOCK).unlink()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", unlink_and_flock)
    with pytest.raises(ValueError, match="is in use by process"), run_folder(tmp_path):
        pytest.fail("nobody else can see that lock")
