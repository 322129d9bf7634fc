"""A command with a limit on its time and on its output, of which no process is left when it has
ended.

The command leads a process group of its own. At its end, or when its time is up, the whole group is
killed, and then whatever had left the group: this process adopts the orphans of its children
(Linux: PR_SET_CHILD_SUBREAPER), so that they can be found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

HEAD_BYTES = 256 * 1024  # of a command's output that is kept, from its start
TAIL_BYTES = 64 * 1024  # and from its end
POLL_S = 0.1
GRACE_S = 10.0  # for killed processes to go; one that hangs inside the driver may never do
_PR_SET_CHILD_SUBREAPER = 36


class Ending(NamedTuple):
    """How a command ended; returncode is None when it was killed for its time."""

    returncode: int | None
    seconds: float
    last_lines: str
    num_survivors: int


def run_limited(
    command: Sequence[str],
    *,
    limit_s: float,
    log: BinaryIO,
    environ: Mapping[str, str],
    folder: Path,
    on_tick: Callable[[], None] = lambda: None,
) -> Ending:
    """Run the command to its end or its limit; `on_tick` is called ten times a second."""
    adopt_orphans()
    not_ours = set(descendants(os.getpid()))
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output = _Output(process.stdout, log)
    try:
        while process.poll() is None and time.perf_counter() - started < limit_s:
            time.sleep(POLL_S)
            on_tick()
        returncode = process.poll()
    finally:
        with _signals_wait():
            num_survivors = _end_everything(process, not_ours)
    seconds = time.perf_counter() - started
    on_tick()
    return Ending(returncode, seconds, output.finish(), num_survivors)


def output_of(
    command: Sequence[str], *, limit_s: float, environ: Mapping[str, str], folder: Path
) -> tuple[int | None, str]:
    """(Exit status, None where its time was up; output, of a long one the head and the tail)."""
    with tempfile.TemporaryFile() as log:
        ending = run_limited(command, limit_s=limit_s, log=log, environ=environ, folder=folder)
        log.seek(0)
        return ending.returncode, log.read().decode(errors="replace")


def _end_everything(process: subprocess.Popen[bytes], not_ours: set[int]) -> int:
    """Kill the process, its group and all it left behind; returns how many outlive GRACE_S."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    until = time.perf_counter() + GRACE_S
    while time.perf_counter() < until:
        process.poll()
        alive = set(descendants(os.getpid())) - not_ours
        if process.returncode is not None and not alive:
            return 0
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if pid != process.pid:  # Popen reaps its own
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    return len(set(descendants(os.getpid())) - not_ours)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A second signal must not interrupt the killing; only the main thread may say so."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent has gone, where the system can do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, read from /proc; [] where there is none."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = stat.read_text(encoding="utf-8", errors="replace")
            parent = int(text.rpartition(")")[2].split()[1])  # a name may hold spaces and brackets
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = []
    queue = deque([pid])
    while queue:
        below = children.get(queue.popleft(), [])
        found += below
        queue += below
    return found


class _Output:
    """Copies a pipe into the log: HEAD_BYTES from its start and TAIL_BYTES from its end."""

    def __init__(self, pipe: BinaryIO, log: BinaryIO):
        self.pipe = pipe
        self.log = log
        self.num_bytes = 0
        self.tail = b""
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self.pipe.fileno(), 65536):
            with contextlib.suppress(OSError):  # a full disk must not stop the reading
                self.log.write(chunk[: max(0, HEAD_BYTES - self.num_bytes)])
                self.log.flush()
            self.num_bytes += len(chunk)
            self.tail = (self.tail + chunk)[-TAIL_BYTES:]

    def finish(self) -> str:
        """The last lines of the output, once it has ended."""
        self.thread.join(GRACE_S)
        left_out = self.num_bytes - HEAD_BYTES
        with contextlib.suppress(OSError):
            if left_out > 0:
                kept = min(left_out, TAIL_BYTES)
                self.log.write(f"\n[.. {left_out - kept} bytes left out ..]\n".encode())
                self.log.write(self.tail[-kept:])
            self.log.flush()
        return "\n".join(self.tail.decode(errors="replace").strip().splitlines()[-15:])
