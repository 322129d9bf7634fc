"""Files that survive a crash: the one way to write one here, and to read JSON and JSONL back.

A file is replaced as a whole (replace_file), a folder appears as a whole (new_folder), a row is on
the disk when append_row returns. Whatever the machine does meanwhile, a reader meets the old state
or the new one. Only a file that rows are appended to may end in half a line, and read_jsonl leaves
that out. A disk that is full or fails ends the run in one line: RunFailed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

REPLACED = ".replaced"  # ends the second name of a folder that is about to go


class RunFailed(RuntimeError):
    """The machine or the numbers ended a run; said in one line, as the caller's mistakes are."""


def replace_file(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader or a crash meets the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with named_failure(path):
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)  # nothing there after the rename


def replace_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one line of JSON a row."""
    replace_file(path, "".join(map(_json_line, rows)))


def append_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """Append a row to an open JSONL file; it is on the disk when this returns."""
    file.write(_json_line(row))
    file.flush()
    os.fsync(file.fileno())


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when it is absent. One warning tells of torn lines."""
    path = Path(path)
    if not path.is_file():
        return []
    rows, num_torn = [], 0
    # Not splitlines, which would also cut at U+2028 inside a text.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            num_torn += 1
    if num_torn:
        message = f"{path}: {num_torn} torn lines left out; a write was interrupted there"
        warnings.warn(message, stacklevel=2)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a Hugging Face folder; errors name the file."""
    if not path.is_file():
        raise ValueError(f"{path}: is missing; a Hugging Face folder has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
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
    is_taken = target.exists() and any(target.iterdir())
    if is_taken:
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    if is_taken:
        shutil.rmtree(replaced)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_run_folder(folder: Path) -> None:
    """Make a run's folder; one that cannot be written is refused now, not after the first batch."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        reason = f"must be a writable folder, got {error.strerror}; set run.dir"
        raise ValueError(f"run: {folder} {reason}") from None


@contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """A full or failing disk as one line that names the file; errors of writing name none."""
    try:
        yield
    except OSError as error:
        reason = f"could not be written ({error.strerror}); free disk space, start again"
        raise RunFailed(f"run: {path} {reason}") from error
