"""Runs a command with limits on time and output, and leaves none of its processes behind.

The command leads a process group of its own. When it ends or its time is up, the whole group is
killed. Then processes that have left the group are killed: this process adopts the orphans of its
children (Linux: PR_SET_CHILD_SUBREAPER), so it can find them. Read run_limited, _end_everything.
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

HEAD_BYTES = 256 * 1024  # of a command's output, from its start, go into the log
TAIL_BYTES = 64 * 1024  # and so many from its end
POLL_S = 0.1
GRACE_S = 10.0  # wait so long for killed processes; one that hangs in the driver may never go
_PR_SET_CHILD_SUBREAPER = 36


class Ending(NamedTuple):
    """How a command ended; returncode is None when it was killed because its time was up."""

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
    """Runs the command to its end or its limit; calls `on_tick` ten times a second."""
    adopt_orphans()
    other_pids = set(descendants(os.getpid()))
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A session of its own makes the command a group leader without a terminal: Ctrl-C reaches
        # us only.
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
            num_survivors = _end_everything(process, other_pids)
    seconds = time.perf_counter() - started
    on_tick()
    return Ending(returncode, seconds, output.finish(), num_survivors)


def output_of(
    command: Sequence[str], *, limit_s: float, environ: Mapping[str, str], folder: Path
) -> tuple[int | None, str]:
    """Returns (exit status, None if time was up; the output, or head and tail of a long one)."""
    with tempfile.TemporaryFile() as log:
        ending = run_limited(command, limit_s=limit_s, log=log, environ=environ, folder=folder)
        log.seek(0)
        return ending.returncode, log.read().decode(errors="replace")


def _end_everything(process: subprocess.Popen[bytes], other_pids: set[int]) -> int:
    """Kills the process, its group and its orphans; returns how many are alive after GRACE_S."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    deadline = time.perf_counter() + GRACE_S
    while time.perf_counter() < deadline:
        process.poll()
        alive = set(descendants(os.getpid())) - other_pids
        if process.returncode is not None and not alive:
            return 0
        # Processes that have left the group, such as daemons. Each round may find new children.
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if pid != process.pid:  # Popen reaps its own child; adopted orphans are ours to reap
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    return len(set(descendants(os.getpid())) - other_pids)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ignores signals meanwhile, so that none interrupts the killing (main thread only)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # Python lets only the main thread set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, where the system can do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Returns all processes below `pid`, read from /proc; [] on a system without it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            text = stat.read_text(encoding="utf-8", errors="replace")
            parent = int(
                text.rpartition(")")[2].split()[1]
            )  # after the name, which may hold spaces and ")"
            children.setdefault(parent, []).append(int(stat.parent.name))
    pids = []
    queue = deque([pid])
    while queue:
        child_pids = children.get(queue.popleft(), [])
        pids += child_pids
        queue += child_pids
    return pids


class _Output:
    """A thread that copies a pipe to the log: HEAD_BYTES of its start, TAIL_BYTES of its end."""

    def __init__(self, pipe: BinaryIO, log: BinaryIO):
        self.pipe = pipe
        self.log = log
        self.num_bytes = 0
        self.tail = b""
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self.pipe.fileno(), 65536):
            with contextlib.suppress(
                OSError
            ):  # with a full disk, go on reading: a full pipe would block the command
                self.log.write(chunk[: max(0, HEAD_BYTES - self.num_bytes)])
                self.log.flush()
            self.num_bytes += len(chunk)
            self.tail = (self.tail + chunk)[-TAIL_BYTES:]

    def finish(self) -> str:
        """Writes the tail to the log, and returns the last lines."""
        self.thread.join(GRACE_S)
        left_out = self.num_bytes - HEAD_BYTES
        with contextlib.suppress(OSError):
            if left_out > 0:
                # The tail may overlap with the head that is in the log already.
                kept = min(left_out, TAIL_BYTES)
                self.log.write(f"\n[.. {left_out - kept} bytes left out ..]\n".encode())
                self.log.write(self.tail[-kept:])
            self.log.flush()
        return "\n".join(self.tail.decode(errors="replace").strip().splitlines()[-15:])
