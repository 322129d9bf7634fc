"""Rows of a run's record, one JSON object a line.

A file of rows is replaced as a whole (replace_jsonl), or grows row by row: each is on the disk when
append_row returns. Only such a file may end in half a line, and read_jsonl leaves that out.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from socpo_fast.files import replace_file


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


def read_jsonl(path: str | Path, is_whole: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none when it is absent.

    One warning tells of torn lines, another one of rows that are not whole: both are left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    # Not splitlines, which would also cut at U+2028 inside a text.
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [row for line in lines if isinstance(row := _json_or_none(line), dict)]
    if num_torn := len(lines) - len(rows):
        warnings.warn(f"{path}: {num_torn} torn lines left out; a write was interrupted there", stacklevel=2)
    whole = [row for row in rows if is_whole(row)]
    if num_damaged := len(rows) - len(whole):
        warnings.warn(f"{path}: {num_damaged} damaged rows left out", stacklevel=2)
    return whole


def _json_or_none(line: bytes) -> Any:
    """What stands in a line; None where it is torn, nested without end, or no UTF-8."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
