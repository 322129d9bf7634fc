"""Real signals to real processes: answered, saved, gone; the next start goes on bit for bit."""

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
GONE_S = 8.0  # two seconds, where nothing else runs; tests share their machine
AT_ONCE, AFTER, WITHOUT, WRITING = ANSWERS.values()
WORDS = {"run.num_batches": 3, "data.eval": "none", "rollout.questions_per_batch": 2}

# Says where it is, and waits there. Sleeps are what a signal handler may interrupt.
SLOW = """
import signal, sys, time
import socpo_fast.trainer as trainer
from socpo_fast.cli import main

# Tests that a shell runs in the background inherit that Ctrl-C is ignored.
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
    """A teacher that never answers, on a thread that nobody can end."""
    print("here", flush=True)
    time.sleep(600)
    return ""


def start(where: str, run_dir: Path, words: dict[str, Any], seconds: float = 600, **io: Any) -> Any:
    """A training that waits at its second save or update, in an evaluation, or for its teacher."""
    command = [sys.executable, "-c", SLOW, where, str(seconds)]
    command += words_of("train", run_dir, WORDS | words)
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | io
    process = subprocess.Popen(command, cwd=ROOT, text=True, **files)
    if process.stdout is not None:
        for line in process.stdout:
            if line == "here\n":
                break
    return process


def answer(process: Any, signum: int, text: str) -> None:
    """The line that a signal is answered by, which comes at once."""
    sent = time.monotonic()
    process.send_signal(signum)
    assert process.stdout.readline() == "\n"
    assert process.stdout.readline() == f"{signal.Signals(signum).name}: {text}\n"
    assert time.monotonic() - sent < GONE_S / 2


def gone(process: Any, code: int) -> str:
    """What it still says; it ends in time, with this code."""
    sent = time.monotonic()
    said = process.stdout.read()  # not communicate, which loses what readline has read ahead
    returncode = process.wait(60)
    assert time.monotonic() - sent < GONE_S, said
    assert returncode == code, said
    assert "Traceback" not in said
    return said


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run_dir / "run" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def manifests(run_dir: Path) -> dict[str, Any]:
    """Every file of the last checkpoint by its hash."""
    last = max((run_dir / "run" / "checkpoints").iterdir())
    return json.loads((last / "manifest.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    assert main(words_of("train", run_dir, WORDS)) == 0
    return run_dir


def goes_on(run_dir: Path, straight: Path) -> None:
    assert main(words_of("train", run_dir, WORDS)) == 0
    assert rows_of(run_dir) == rows_of(straight)
    assert manifests(run_dir) == manifests(straight)


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_while_every_teacher_call_hangs(signum: int, tmp_path: Path) -> None:
    process = start("", tmp_path, {"teacher.rule": f"{__name__}:hang"})
    answer(process, signum, AT_ONCE)
    said = gone(process, 128 + signum)
    assert "stopped before the first update; there is nothing to save" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["none_yet"]


@pytest.mark.slow
def test_while_evaluating(tmp_path: Path) -> None:
    process = start("evaluate", tmp_path, {"data.eval": "builtin"})
    answer(process, signal.SIGTERM, AT_ONCE)
    assert "stopped before the first update" in gone(process, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_in_an_update(tmp_path: Path, straight: Path) -> None:
    """After it."""
    process = start("update", tmp_path, {}, seconds=1)
    answer(process, signal.SIGHUP, AFTER)
    assert "stopped and saved after batch 2" in gone(process, 128 + signal.SIGHUP)
    goes_on(tmp_path, straight)


def test_twice_in_an_update(tmp_path: Path, straight: Path) -> None:
    """At once; the last checkpoint is where it goes on."""
    words = {"run.checkpoint_every_updates": 1}
    process = start("update", tmp_path, words)
    answer(process, signal.SIGINT, AFTER)
    answer(process, signal.SIGTERM, WITHOUT)
    said = gone(process, 128 + signal.SIGINT)
    assert "stopped amid the updates of batch 2; the last checkpoint stays" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["update_000001"]
    goes_on(tmp_path, straight)


@pytest.mark.slow
def test_twice_while_saving(tmp_path: Path, straight: Path) -> None:
    """What is being written is written to its end, however often one asks."""
    process = start("save", tmp_path, {"run.checkpoint_every_updates": 1}, seconds=1)
    answer(process, signal.SIGTERM, WRITING)
    answer(process, signal.SIGTERM, WRITING)
    assert "stopped and saved after batch 2" in gone(process, 128 + signal.SIGTERM)
    goes_on(tmp_path, straight)


@pytest.mark.slow
def test_in_the_last_save(tmp_path: Path, straight: Path) -> None:
    """The run is whole, the report is left to another start."""
    words = {"run.checkpoint_every_updates": 1, "run.num_batches": 2}
    process = start("save", tmp_path, words, seconds=1)
    answer(process, signal.SIGTERM, WRITING)
    gone(process, 128 + signal.SIGTERM)
    assert not (tmp_path / "run" / "report.html").exists()
    goes_on(tmp_path, straight)


def test_a_closed_terminal(tmp_path: Path, straight: Path) -> None:
    """The terminal goes, which is a SIGHUP and nowhere to write: saved, and the right exit code."""
    ours, theirs = pty.openpty()
    terminal = {"stdout": theirs, "stderr": theirs, "start_new_session": True}
    process = start("update", tmp_path, {}, seconds=1, **terminal)
    os.close(theirs)
    said = b""
    while b"here" not in said:
        said += os.read(ours, 4096)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    goes_on(tmp_path, straight)


@pytest.mark.slow
def test_nohup(tmp_path: Path) -> None:
    """A signal that whoever started it wants ignored does nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("update", tmp_path, {}, seconds=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    said = process.stdout.read()
    assert (process.wait(60), "SIGHUP" in said) == (0, False)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever metrics it has: there never was a checkpoint that could have been lost."""
    words = WORDS | {
        "run.checkpoint_every_updates": 1,
        "run.name": "run2",
        "run.num_batches": 2,
        "run.keep_checkpoints": 9,
    }
    killed = """
import os, sys
from socpo_fast import trainer
from socpo_fast.cli import main
trainer.save_checkpoint = lambda *_, **__: os._exit(9)
sys.exit(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", killed, *words_of("train", tmp_path, words)], cwd=ROOT, check=False
    )
    assert done.returncode == 9
    assert '"update": 1' in (tmp_path / "run2" / "metrics.jsonl").read_text()
    assert main(words_of("train", tmp_path, words)) == 0
    assert (tmp_path / "run2" / "checkpoints" / "update_000002").is_dir()
    shutil.rmtree(tmp_path / "run2" / "checkpoints" / "update_000002")
    shutil.rmtree(tmp_path / "run2" / "checkpoints" / "update_000001")
    capsys.readouterr()
    assert main(words_of("train", tmp_path, words)) == 2
    assert_refused(capsys.readouterr().err, "run: .*/run2/checkpoints must hold a checkpoint")


def swallow(_text: str, _question: Any) -> bool:
    """A grader that nothing gets out of."""
    print("here", flush=True)
    while True:
        with suppress(BaseException):
            time.sleep(0.01)


def take_your_time(_text: str, _question: Any) -> bool:
    print("here", flush=True)
    with suppress(BaseException):
        time.sleep(1.5)
    return False


def test_a_grader_that_swallows_the_stop(tmp_path: Path) -> None:
    """It is stopped behind that question, not behind all of them."""
    process = start(
        "", tmp_path, {"data.grader": f"{__name__}:take_your_time", "rollout.group_size": 8}
    )
    answer(process, signal.SIGTERM, AT_ONCE)
    assert "stopped before the first update" in gone(process, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_whoever_insists(tmp_path: Path) -> None:
    """The third signal ends what swallows the first two."""
    process = start("", tmp_path, {"data.grader": f"{__name__}:swallow", "grader.timeout_s": 600})
    answer(process, signal.SIGTERM, AT_ONCE)
    answer(process, signal.SIGTERM, AT_ONCE)
    answer(process, signal.SIGTERM, "gone, without saving; the last checkpoint stays")
    gone(process, 128 + signal.SIGTERM)
