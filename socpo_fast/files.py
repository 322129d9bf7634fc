"""Writes files and folders that survive a crash, and reads JSON.

A file is replaced in one step (replace_file), and a folder appears in one step (new_folder).
Whenever the machine stops, a reader sees either the old state or the new one. A full or failing
disk ends the run with a one-line error: RunFailed. Temporary files are opened exclusively, so that
a symbolic link of the same name cannot redirect the writing. locked lets one process at a time
change a file. The rows of metrics.jsonl are appended by report/tracker.py.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

REPLACED = ".replaced"  # ends the second name of a folder that is about to go


class RunFailed(RuntimeError):
    """The machine or the numbers ended a run. It is reported in one line, like a user's mistake."""


class StopRequested(BaseException):
    """Raised by a signal, where a run may stop.

    It is not an Exception, so that no handler of errors catches it. A function of the user may
    swallow it all the same. was_raised then tells the caller of that function to raise it again.
    """

    was_raised = False


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a temporary file and renames it: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with named_failure(path):
        temporary.unlink(missing_ok=True)  # left by an earlier, killed process
        try:
            with temporary.open("xb") as file:  # exclusive: never through a link
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)  # nothing there after the rename


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a Hugging Face folder; errors name the file."""
    if not path.is_file():
        raise ValueError(f"{path}: is missing; a Hugging Face folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder to fill, which becomes `target` if the block ends without an error.

    The folder is next to the target, so that a rename is enough. Every file in it is synced to disk
    first. An existing target is replaced. After an error the target is unchanged.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process that had the same id
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing there after the rename


def replace_folder(partial: Path, target: Path) -> None:
    """Renames `partial` to `target`; at every moment a complete folder exists under some name."""
    # A rename may replace an empty folder but not a full one. A full target is first renamed to
    # .replaced, so that it is still there if the machine stops before the second rename.
    replaced = target.with_name(target.name + REPLACED)
    is_empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
    is_taken = os.path.lexists(target) and not is_empty
    if is_taken:
        remove(replaced)
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    if is_taken:
        remove(replaced)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time into the block; the others wait.

    Some network disks do not support flock. There the block runs without a lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a folder with its content, or a link (not what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Turns an OSError into RunFailed with the file's name, which write errors do not contain."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"run: {path} could not be written ({error.strerror}); free disk space, start again"
        ) from error
