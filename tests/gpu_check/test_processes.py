"""A command with limits: it ends in time, its output stays small, and no process of it is left."""

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


def test_output_and_status_of_an_ordinary_end() -> None:
    ending, log = run("print('a'); raise SystemExit(3)")
    assert (ending.returncode, ending.last_lines, ending.num_survivors) == (3, "a", 0)
    assert log == b"a\n"


def test_a_signal_that_ended_it_is_told() -> None:
    ending, _ = run("import os; print('half', flush=True); os.abort()")
    assert (ending.returncode, ending.last_lines) == (-6, "half")


# In the group, in a session of its own, and as an orphan whose parent has gone already.
@pytest.mark.parametrize("kind", ["start_new_session=False", "start_new_session=True", "orphan"])
def test_a_hang_is_ended_with_all_its_children(kind: str) -> None:
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


def test_children_left_behind_by_an_ordinary_end_are_ended_too() -> None:
    spawn = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])"
    ending, log = run(f"import subprocess, sys; print({spawn}.pid)")
    assert ending.returncode == 0 and ending.num_survivors == 0
    assert not is_alive(int(log.split()[0]))


def test_processes_of_somebody_else_are_left_alone() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        run("pass")
        assert other.poll() is None and other.pid in descendants(os.getpid())
    finally:
        other.kill()
        other.wait()


def test_a_flood_is_cut_in_the_middle() -> None:
    total = 4 * (HEAD_BYTES + TAIL_BYTES)
    code = f"import sys; sys.stdout.write('first\\n' + 'x' * {total} + '\\nlast\\n')"
    ending, log = run(code)
    assert ending.returncode == 0 and ending.last_lines.endswith("last")
    assert log.startswith(b"first\n") and log.endswith(b"last\n")
    assert b"bytes left out" in log and len(log) < HEAD_BYTES + TAIL_BYTES + 100


def test_somebody_watches_meanwhile() -> None:
    ticks = []
    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    given = {"limit_s": 30.0, "log": io.BytesIO(), "environ": dict(os.environ)}
    run_limited(command, **given, folder=Path.cwd(), on_tick=lambda: ticks.append(1))
    assert len(ticks) >= 3


def test_an_exception_meanwhile_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal to the driver does."""
    seen: list[int] = []

    def stop() -> None:
        seen.extend(descendants(os.getpid()))
        if seen:
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "POLL_S", 0.05)
    command = [sys.executable, "-c", "import time; time.sleep(300)"]
    given = {"limit_s": 60.0, "log": io.BytesIO(), "environ": dict(os.environ)}
    with pytest.raises(KeyboardInterrupt):
        run_limited(command, **given, folder=Path.cwd(), on_tick=stop)
    assert seen and not any(is_alive(pid) for pid in seen)
