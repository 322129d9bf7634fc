"""Files that survive a crash: the one way to write one here, and to read JSON back.

A file is replaced as a whole (replace_file), a folder appears as a whole (new_folder). Whatever the
machine does meanwhile, a reader meets the old state or the new one. A disk that is full or fails
ends the run in one line: RunFailed. What is half written has a name that is opened exclusively, so
that a link which stands there leads nothing elsewhere. Rows are appended by report/tracker.py.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPLACED = ".replaced"  # ends the second name of a folder that is about to go


class RunFailed(RuntimeError):
    """The machine or the numbers ended a run; said in one line, as the caller's mistakes are."""


class StopRequested(BaseException):
    """Raised where a run may stop, by a signal. No Exception, so that no handler takes it for one.

    was_raised: a function of the user's may have swallowed it; its caller raises it again then.
    """

    was_raised = False


def replace_file(path: Path, content: str | bytes) -> None:
    """Write beside and rename, so that a reader or a crash meets the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with named_failure(path):
        beside.unlink(missing_ok=True)  # of an earlier, killed process
        try:
            with beside.open("xb") as file:  # exclusive: never by way of a link
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)  # nothing there after the rename


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder; errors name the file."""
    if not path.is_file():
        raise ValueError(f"{path}: is missing; a Hugging Face folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested without end
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder to fill, which becomes `target` when the block ends without an error.

    It stands beside the target, so that a rename brings it there; before that every file in it is
    synced to disk. A target that is there already is replaced. After an error the target is what it
    was.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of an earlier, killed process with this id
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing there after the rename


def put_in_place(partial: Path, target: Path) -> None:
    """Rename, by way of a second name when the target is taken: at each moment one is whole.

    An empty target needs no second name, as a rename may land on an empty folder.
    """
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


def remove(path: Path) -> None:
    """Remove a folder with what is in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """A full or failing disk as one line that names the file; errors of writing name none."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"run: {path} could not be written ({error.strerror}); free disk space, start again"
        ) from error
