"""A run's folder: what stands in it, and that one process at a time writes there.

runs/NAME/  config.toml  metrics.jsonl  rollouts/batch_000001.jsonl  tb/  checkpoints/update_000010/
            report.html  curves.png  .lock
"""

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # holds the process that writes there, and is empty otherwise
FOLDERS = ("checkpoints", "rollouts", "tb")
FILES = (LOCK, "config.toml", "metrics.jsonl", "curves.png", "report.html")


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """A run's folder for this process alone; made where it is absent, gone if it stays empty.

    The lock is the kernel's and ends with the process, however that ends.

    Raises:
        ValueError: another process has it, it cannot be written, or what stands under one of the
            names that a run writes to is of another kind. Better now than after the first batch.
    """
    for name in (*FOLDERS, *FILES):
        path = folder / name
        kind = "folder" if name in FOLDERS else "file"
        is_right = path.is_dir() if kind == "folder" else path.is_file() or path.is_symlink()
        if os.path.lexists(path) and not is_right:
            raise ValueError(
                f"run: {path} must be a {kind}, got something else; move it, or set run.name"
            )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _open(folder)
    _locks.add(lock)
    try:
        _take(lock, folder)
        try:
            yield
        finally:
            if lock in _locks:  # not in a fork
                _give_back(lock, folder, missing)
    finally:
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


_locks: set[int] = set()  # open locks of this process


def _give_back(lock: int, folder: Path, missing: list[Path]) -> None:
    """Nobody's any more; the folders that were missing go if nothing but the lock is in them."""
    with suppress(OSError):  # a full disk
        os.ftruncate(lock, 0)
    if missing and os.listdir(folder) == [LOCK]:
        (folder / LOCK).unlink()
        with suppress(OSError):  # somebody else has put something there
            for path in missing:
                path.rmdir()


def _open(folder: Path) -> int:
    """The open lock file of a folder, both made where they are absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ValueError(
            f"run: {folder} must be a writable folder, got {error.strerror}: {error.filename}; "
            "set run.dir"
        ) from None


def _close_in_fork() -> None:
    """A fork that lives on would hold the lock of a run that has ended."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_in_fork)


def _take(lock: int, folder: Path) -> None:
    """Lock the open file, and write into it whose it is."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (folder / LOCK).exists() or not os.path.samestat(
            os.fstat(lock), os.stat(folder / LOCK)
        ):
            # removed in between by a start that was refused, and perhaps made anew
            raise BlockingIOError
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "unknown"
        raise ValueError(
            f"run: {folder} is in use by process {holder}; wait for its end, or set run.name"
        ) from None
    except OSError as error:  # not every network disk can
        warnings.warn(f"run: {folder} could not be locked ({error.strerror})", stacklevel=5)
    with suppress(OSError):  # a full disk: who holds it cannot be told then
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
