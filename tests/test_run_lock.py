"""One process a run folder, whatever that process leaves behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from socpo_fast.cli import main
from socpo_fast.report import folder as folder_module
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
    """A second one is told whose the folder is; the lock ends with its holder."""
    command = [sys.executable, "-c", HOLD, str(run_dir / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = snapshot(run_dir)
        assert before["run/.lock"].decode().startswith(f"{holder.pid} on ")
        rows = run_dir / "run" / "metrics.jsonl"
        for command_word in ("train", "rollout"):
            if command_word == "rollout":
                rows.rename(rows.with_suffix(".away"))
            assert main(words_of(command_word, run_dir, {"run.num_batches": 2})) == 2
            message = rf"run: .*/run is in use by process {holder.pid} on .*; wait for its end, or "
            assert_refused(capsys.readouterr().err, message)
        rows.with_suffix(".away").rename(rows)
        assert snapshot(run_dir) == before
        assert main(words_of("eval", run_dir, {})) == 0  # it only reads
        assert main(["report", str(run_dir / "run")]) == 0  # replaces its own two files whole
        holder.send_signal(signal.SIGKILL)
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    assert (run_dir / "run" / ".lock").read_text() == ""


def test_two_threads_of_a_process_are_two(tmp_path: Path) -> None:
    with (
        run_folder(tmp_path),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
        run_folder(tmp_path),
    ):
        pytest.fail("both have it")


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_fork_that_lives_on_holds_nothing(is_killed: bool, tmp_path: Path) -> None:
    """A child that a rule or a grader has forked, and that nobody ends with the run."""
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


def test_a_fork_that_goes_on_closes_nothing_of_its_own(tmp_path: Path) -> None:
    with run_folder(tmp_path):
        child = os.fork()
        if child == 0:
            mine = os.open(tmp_path / "mine", os.O_RDWR | os.O_CREAT)  # takes the lock's number
            os.write(mine, b"kept")
    if child == 0:
        os._exit(0 if os.fstat(mine).st_size == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_lock_that_went_in_between_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is refused removes what it made; who had opened that must not lock thin air."""
    open_lock = folder_module._open

    def opened_and_gone(folder: Path) -> int:
        lock = open_lock(folder)
        (folder / LOCK).unlink()
        return lock

    monkeypatch.setattr(folder_module, "_open", opened_and_gone)
    with pytest.raises(ValueError, match="is in use by process"), run_folder(tmp_path):
        pytest.fail("nobody else can see that lock")
