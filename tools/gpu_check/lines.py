"""Which line of the project is running, or was when something was raised."""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path
from typing import Any

from tools.gpu_check.revision import ROOT

OUR_FOLDERS = ("socpo_fast", "kernels", "bench", "tests", "tools")
# What makes the fake card is no line to look at: who called it is.
_NAMES = "dry_run fake_cuda fake_ops graph host_values launches memory recorder stand_ins"
FAKE_CARD = {f"tools/gpu_check/{name}.py" for name in _NAMES.split()}


def our_line() -> str:
    """The innermost line of the project's code that is running, as file:line."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if line := _line(frame.f_code.co_filename, frame.f_lineno):
            return line
        frame = frame.f_back
    return "an unknown line"


def our_lines(error: BaseException, count: int = 1) -> str:
    """The innermost lines that an error came through, its own first: file:line < file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [line for frame in frames if (line := _line(frame.filename, frame.lineno))]
    return " < ".join(lines[: -count - 1 : -1]) or "an unknown line"


@functools.cache
def _line(filename: str, number: int | None) -> str | None:
    """The line, if the file is the project's and not the fake card's."""
    path = Path(filename)
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    is_ours = relative.parts[0] in OUR_FOLDERS and relative.as_posix() not in FAKE_CARD
    return f"{relative}:{number}" if is_ours else None
