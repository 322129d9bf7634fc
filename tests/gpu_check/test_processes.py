"""Checks run_limited: a command ends in time, its output stays small, and no process is left."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_check import processes
from tools.gpu_check.processes import HEAD_BYTES, TAIL_BYTES, Ending, descendants, run_limited


def run(code: str, limit_s: float = 60.0) -> tuple[Ending, bytes]:
    log = io.BytesIO()
    command = [sys.executable, "-c", code]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    ending = run_limited(command, limit_s=limit_s, log=log, environ=environ, folder=Path.cwd())
    return ending, log.getvalue()


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_output_and_status_of_a_normal_exit() -> None:
    ending, log = run("print('a'); raise SystemExit(3)")
    assert (ending.returncode, ending.last_lines, ending.num_survivors) == (3, "a", 0)
    assert log == b"a\n"


def test_a_fatal_signal_is_reported() -> None:
    ending, _ = run("import os; print('half', flush=True); os.abort()")
    assert (ending.returncode, ending.last_lines) == (-6, "half")


# A child in the group of the command, one in its own session, and an orphan, whose parent is gone.
@pytest.mark.parametrize("kind", ["start_new_session=False", "start_new_session=True", "orphan"])
def test_a_hang_is_ended_with_all_its_children(kind: str) -> None:
    """A command past its limit is ended, and so is every process that it started."""
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(300)']"
    spawn = f"print(subprocess.Popen({sleeper}, {kind}).pid)"
    if kind == "orphan":
        popen = f"subprocess.Popen({sleeper}, start_new_session=True)"
        inner = f"import subprocess, sys; print({popen}.pid)"
        spawn = f"subprocess.run([sys.executable, '-c', {inner!r}])"
    started = time.perf_counter()
    ending, log = run(f"import subprocess, sys, time; {spawn}; time.sleep(300)", limit_s=3.0)
    assert ending.returncode is None and ending.num_survivors == 0
    assert time.perf_counter() - started < 20
    assert not is_alive(int(log.split()[0]))


def test_children_left_by_a_normal_exit_are_ended() -> None:
    spawn = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    ending, log = run(f"import subprocess, sys; print({spawn}.pid)")
    assert ending.returncode == 0 and ending.num_survivors == 0
    assert not is_alive(int(log.split()[0]))


def test_other_processes_are_left_alone() -> None:
    """A child of this process that run_limited did not start goes on."""
    unrelated = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        run("pass")
        assert unrelated.poll() is None and unrelated.pid in descendants(os.getpid())
    finally:
        unrelated.kill()
        unrelated.wait()


def test_a_flood_is_cut_in_the_middle() -> None:
    """Of too much output the start and the end are kept."""
    total = 4 * (HEAD_BYTES + TAIL_BYTES)
    code = f"import sys; sys.stdout.write('first\\n' + 'x' * {total} + '\\nlast\\n')"
    ending, log = run(code)
    assert ending.returncode == 0 and ending.last_lines.endswith("last")
    assert log.startswith(b"first\n") and log.endswith(b"last\n")
    assert b"bytes left out" in log and len(log) < HEAD_BYTES + TAIL_BYTES + 100


def test_on_tick_is_called_while_it_runs() -> None:
    ticks = []
    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    options = {"limit_s": 30.0, "log": io.BytesIO(), "environ": dict(os.environ)}
    run_limited(command, **options, folder=Path.cwd(), on_tick=lambda: ticks.append(1))
    assert len(ticks) >= 3


def test_an_exception_in_the_driver_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while the command runs, as from a signal to the driver, ends its processes."""
    pids: list[int] = []

    def interrupt() -> None:
        pids.extend(descendants(os.getpid()))
        if pids:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "POLL_S", 0.05)
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    options = {"limit_s": 60.0, "log": io.BytesIO(), "environ": dict(os.environ)}
    with pytest.raises(KeyboardInterrupt):
        run_limited(command, **options, folder=Path.cwd(), on_tick=interrupt)
    assert pids and not any(is_alive(pid) for pid in pids)
