"""Locks a run's folder, so that one process at a time writes there. Read run_folder.

runs/NAME/  config.toml  metrics.jsonl  rollouts/batch_000001.jsonl  tb/  checkpoints/update_000010/
            report.html  curves.svg  eval.json  .lock
"""

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # names the process that writes to the folder; empty when there is none
FOLDERS = ("checkpoints", "rollouts", "tb")
FILES = (LOCK, "config.toml", "metrics.jsonl", "curves.svg", "eval.json", "report.html")


def check_is_run(folder: Path) -> None:
    """Refuses a folder without anything that a run or an evaluation leaves; names runs near it."""
    if is_run(folder):
        return
    runs = [
        str(path)
        for parent in (folder, folder / "runs", folder.parent)
        if parent.is_dir()
        for path in sorted(parent.iterdir())
    ]
    names = [name for name in dict.fromkeys(runs) if is_run(Path(name))]
    advice = f"runs are {', '.join(names[:5])}" if names else "socpo demo makes one"
    raise ValueError(f"report: {folder} must be a run folder, got none there; {advice}")


def is_run(folder: Path) -> bool:
    """Whether a folder holds metrics, rollouts or evaluations. Anybody may have a config.toml."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "rollouts", "eval.json"))


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Locks a run's folder for this process; creates it first, and removes it if it stays empty.

    The lock is an flock, so the kernel releases it when the process ends, even after a crash.

    Raises:
        ValueError: another process holds the lock, the folder is not writable, or one of the names
            that a run writes to is taken by a file instead of a folder, or the other way round.
            It is better to fail here than after the first batch.
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
            if lock in _locks:  # False in a forked child, which must not clean up
                _give_back(lock, folder, missing)
    finally:
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


_locks: set[int] = set()  # open locks of this process


def _give_back(lock: int, folder: Path, missing: list[Path]) -> None:
    """Empties the lock file; removes the folders that run_folder made if still unused."""
    with suppress(OSError):  # a full disk
        os.ftruncate(lock, 0)
    if missing and os.listdir(folder) == [LOCK]:
        (folder / LOCK).unlink()
        with suppress(OSError):  # another process has put a file there in the meantime
            for path in missing:
                path.rmdir()


def _open(folder: Path) -> int:
    """Opens the lock file of a folder; creates both where they are absent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ValueError(
            f"run: {folder} must be a writable folder, got {error.strerror}: {error.filename}; "
            "set run.dir"
        ) from None


def _close_in_fork() -> None:
    """Closes inherited locks: a forked child that lives on would keep the lock of an ended run."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_close_in_fork)


def _take(lock: int, folder: Path) -> None:
    """Locks the open file and writes this process's id and host into it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (folder / LOCK).exists() or not os.path.samestat(
            os.fstat(lock), os.stat(folder / LOCK)
        ):
            # Another process removed the file between our open and our flock, and may have made a
            # new one. Our lock is then on a deleted file and would protect nothing.
            raise BlockingIOError
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "unknown"
        raise ValueError(
            f"run: {folder} is in use by process {holder}; wait for its end, or set run.name"
        ) from None
    except OSError as error:  # some network disks do not support flock
        warnings.warn(f"run: {folder} could not be locked ({error.strerror})", stacklevel=5)
    with suppress(OSError):  # a full disk: the lock holds, but nobody can read who holds it
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
