"""Real signals to real processes: they are answered at once, the run is saved and ends in time.

The next start resumes, and its metrics and checkpoints are bitwise those of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.cli import main
from socpo_fast.stopping import ANSWERS
from tests.helpers.bad_input import assert_refused, words_of

ROOT = Path(__file__).parent.parent
END_TIMEOUT_S = 8.0  # about two seconds on an idle machine; tests may share theirs
AT_ONCE, AFTER_UPDATE, WITHOUT_SAVING, WHILE_WRITING = ANSWERS.values()
WORDS = {"run.num_batches": 3, "data.eval": "none", "rollout.questions_per_batch": 2}

# A training that prints "here" and sleeps at the point that its first argument names. A signal
# handler may interrupt the sleep.
SLOW = """
import signal, sys, time
import socpo_fast.trainer as trainer
from socpo_fast.cli import main

# A shell makes its background processes ignore Ctrl-C, and tests that run there inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
where, seconds = sys.argv.pop(1), float(sys.argv.pop(1))

def waiting(name, function):
    calls = []
    def wrapper(*args, **options):
        calls.append(1)
        if len(calls) == 2 or name == "evaluate":
            print("here", flush=True)
            time.sleep(seconds)
        return function(*args, **options)
    return wrapper

if where == "save":
    trainer.save_checkpoint = waiting(where, trainer.save_checkpoint)
if where == "update":
    trainer.Trainer.update = waiting(where, trainer.Trainer.update)
if where == "evaluate":
    trainer.Session.evaluate = waiting(where, trainer.Session.evaluate)
sys.exit(main())
"""


def hang(_request: Any) -> str:
    """Plays a teacher that never answers, on a thread that cannot be ended."""
    print("here", flush=True)
    time.sleep(600)
    return ""


def start(
    point: str, run_dir: Path, settings: dict[str, Any], seconds: float = 600, **streams: Any
) -> Any:
    """Starts a training and waits until it sleeps in an evaluation, or its second save or update.

    With `point` empty the teacher or grader of `settings` prints the line that this waits for.
    """
    command = [sys.executable, "-c", SLOW, point, str(seconds)]
    command += words_of("train", run_dir, WORDS | settings)
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | streams
    process = subprocess.Popen(command, cwd=ROOT, text=True, **outputs)
    if process.stdout is not None:
        for line in process.stdout:
            if line == "here\n":
                break
    return process


def assert_answers(process: Any, signum: int, text: str) -> None:
    """Sends a signal, and checks that the process answers at once with this line."""
    sent_at = time.monotonic()
    process.send_signal(signum)
    assert process.stdout.readline() == "\n"
    assert process.stdout.readline() == f"{signal.Signals(signum).name}: {text}\n"
    assert time.monotonic() - sent_at < END_TIMEOUT_S / 2


def wait_for_end(process: Any, code: int) -> str:
    """Checks that the process ends in time with this exit code; returns its last output."""
    started = time.monotonic()
    output = process.stdout.read()  # communicate would lose lines that readline has buffered
    returncode = process.wait(60)
    assert time.monotonic() - started < END_TIMEOUT_S, output
    assert returncode == code, output
    assert "Traceback" not in output
    return output


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Returns all metrics of a run except for times and speeds."""
    rows = map(json.loads, (run_dir / "run" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def manifests(run_dir: Path) -> dict[str, Any]:
    """Returns the size and hash of every file of the last checkpoint."""
    last = max((run_dir / "run" / "checkpoints").iterdir())
    return json.loads((last / "manifest.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that no signal interrupted."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert main(words_of("train", run_dir, WORDS)) == 0
    return run_dir


def assert_resumes(run_dir: Path, uninterrupted: Path) -> None:
    """Checks that the next start finishes the run bitwise as the uninterrupted one."""
    assert main(words_of("train", run_dir, WORDS)) == 0
    assert rows_of(run_dir) == rows_of(uninterrupted)
    assert manifests(run_dir) == manifests(uninterrupted)


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_signal_while_every_teacher_call_hangs(signum: int, tmp_path: Path) -> None:
    process = start("", tmp_path, {"teacher.rule": f"{__name__}:hang"})
    assert_answers(process, signum, AT_ONCE)
    output = wait_for_end(process, 128 + signum)
    assert "stopped before the first update; there is nothing to save" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["none_yet"]


@pytest.mark.slow
def test_signal_while_evaluating(tmp_path: Path) -> None:
    process = start("evaluate", tmp_path, {"data.eval": "builtin"})
    assert_answers(process, signal.SIGTERM, AT_ONCE)
    assert "stopped before the first update" in wait_for_end(process, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_signal_in_an_update_stops_after_it(tmp_path: Path, uninterrupted: Path) -> None:
    """The signal takes effect after the update."""
    process = start("update", tmp_path, {}, seconds=1)
    assert_answers(process, signal.SIGHUP, AFTER_UPDATE)
    assert "stopped and saved after batch 2" in wait_for_end(process, 128 + signal.SIGHUP)
    assert_resumes(tmp_path, uninterrupted)


def test_second_signal_in_an_update_stops_at_once(tmp_path: Path, uninterrupted: Path) -> None:
    """The next start resumes from the last checkpoint."""
    words = {"run.checkpoint_every_updates": 1}
    process = start("update", tmp_path, words)
    assert_answers(process, signal.SIGINT, AFTER_UPDATE)
    assert_answers(process, signal.SIGTERM, WITHOUT_SAVING)
    output = wait_for_end(process, 128 + signal.SIGINT)
    assert "stopped amid the updates of batch 2; the last checkpoint stays" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["update_000001"]
    assert_resumes(tmp_path, uninterrupted)


@pytest.mark.slow
def test_signals_while_saving_wait_for_the_save(tmp_path: Path, uninterrupted: Path) -> None:
    """A save is always finished, however many signals come."""
    process = start("save", tmp_path, {"run.checkpoint_every_updates": 1}, seconds=1)
    assert_answers(process, signal.SIGTERM, WHILE_WRITING)
    assert_answers(process, signal.SIGTERM, WHILE_WRITING)
    assert "stopped and saved after batch 2" in wait_for_end(process, 128 + signal.SIGTERM)
    assert_resumes(tmp_path, uninterrupted)


@pytest.mark.slow
def test_signal_in_the_last_save(tmp_path: Path, uninterrupted: Path) -> None:
    """The run is complete, and the next start writes the report."""
    words = {"run.checkpoint_every_updates": 1, "run.num_batches": 2}
    process = start("save", tmp_path, words, seconds=1)
    assert_answers(process, signal.SIGTERM, WHILE_WRITING)
    wait_for_end(process, 128 + signal.SIGTERM)
    assert not (tmp_path / "run" / "report.html").exists()
    assert_resumes(tmp_path, uninterrupted)


def test_closed_terminal_saves_the_run(tmp_path: Path, uninterrupted: Path) -> None:
    """A closed terminal sends SIGHUP and fails every write: the run is saved all the same."""
    our_end, their_end = pty.openpty()
    terminal = {"stdout": their_end, "stderr": their_end, "start_new_session": True}
    process = start("update", tmp_path, {}, seconds=1, **terminal)
    os.close(their_end)
    output = b""
    while b"here" not in output:
        output += os.read(our_end, 4096)
    os.close(our_end)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert_resumes(tmp_path, uninterrupted)


@pytest.mark.slow
def test_ignored_signal_does_nothing(tmp_path: Path) -> None:
    """nohup starts a process that ignores SIGHUP, and the training keeps it so."""
    old_handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("update", tmp_path, {}, seconds=1)
    finally:
        signal.signal(signal.SIGHUP, old_handler)
    process.send_signal(signal.SIGHUP)
    output = process.stdout.read()
    assert (process.wait(60), "SIGHUP" in output) == (0, False)


def test_run_killed_before_first_checkpoint_restarts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It restarts although it has metrics, since it never had a checkpoint that could be lost.

    Without the marker of that case a start refuses: checkpoints that existed were lost.
    """
    words = WORDS | {
        "run.checkpoint_every_updates": 1,
        "run.name": "run2",
        "run.num_batches": 2,
        "run.keep_checkpoints": 9,
    }
    program = """
import os, sys
from socpo_fast import trainer
from socpo_fast.cli import main
trainer.save_checkpoint = lambda *_, **__: os._exit(9)
sys.exit(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", program, *words_of("train", tmp_path, words)], cwd=ROOT, check=False
    )
    assert result.returncode == 9
    assert '"update": 1' in (tmp_path / "run2" / "metrics.jsonl").read_text()
    assert main(words_of("train", tmp_path, words)) == 0
    assert (tmp_path / "run2" / "checkpoints" / "update_000002").is_dir()
    shutil.rmtree(tmp_path / "run2" / "checkpoints" / "update_000002")
    shutil.rmtree(tmp_path / "run2" / "checkpoints" / "update_000001")
    capsys.readouterr()
    assert main(words_of("train", tmp_path, words)) == 2
    assert_refused(capsys.readouterr().err, "run: .*/run2/checkpoints must hold a checkpoint")


def swallow(_text: str, _question: Any) -> bool:
    """Plays a grader that catches every exception and never returns."""
    print("here", flush=True)
    while True:
        with suppress(BaseException):
            time.sleep(0.01)


def swallow_one_stop(_text: str, _question: Any) -> bool:
    """Plays a slow grader that catches the exception of one stop."""
    print("here", flush=True)
    with suppress(BaseException):
        time.sleep(1.5)
    return False


def test_stop_swallowed_by_a_grader_acts_after_it(tmp_path: Path) -> None:
    """The run stops after the answer that is being graded, not after all of them."""
    process = start(
        "", tmp_path, {"data.grader": f"{__name__}:swallow_one_stop", "rollout.group_size": 8}
    )
    assert_answers(process, signal.SIGTERM, AT_ONCE)
    assert "stopped before the first update" in wait_for_end(process, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_third_signal_ends_the_process(tmp_path: Path) -> None:
    """A third signal ends the process if a grader swallows the first two."""
    process = start("", tmp_path, {"data.grader": f"{__name__}:swallow", "grader.timeout_s": 600})
    assert_answers(process, signal.SIGTERM, AT_ONCE)
    assert_answers(process, signal.SIGTERM, AT_ONCE)
    assert_answers(process, signal.SIGTERM, "gone, without saving; the last checkpoint stays")
    wait_for_end(process, 128 + signal.SIGTERM)
