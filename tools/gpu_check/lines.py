"""Finds the line of the project that is running, or at which an error was raised."""

from __future__ import annotations

import functools
import sys
import traceback
from pathlib import Path
from typing import Any

from tools.gpu_check.revision import ROOT

OUR_FOLDERS = ("socpo_fast", "kernels", "bench", "tests", "tools")
# The modules of the fake card are left out: a reader wants to see the line that called them.
_NAMES = "dry_run fake_cuda fake_ops graph host_values launches memory recorder stand_ins"
FAKE_CARD = {f"tools/gpu_check/{name}.py" for name in _NAMES.split()}


def our_line() -> str:
    """Returns the innermost running line of the project's code, as file:line."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if line := _line(frame.f_code.co_filename, frame.f_lineno):
            return line
        frame = frame.f_back
    return "an unknown line"


def our_lines(error: BaseException, count: int = 1) -> str:
    """Returns the innermost lines of an error's traceback, the last first: a.py:1 < b.py:2."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [line for frame in frames if (line := _line(frame.filename, frame.lineno))]
    return " < ".join(lines[: -count - 1 : -1]) or "an unknown line"


@functools.cache
def _line(filename: str, number: int | None) -> str | None:
    """Returns the line if its file is the project's and not the fake card's; else None."""
    path = Path(filename)
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    is_ours = relative.parts[0] in OUR_FOLDERS and relative.as_posix() not in FAKE_CARD
    return f"{relative}:{number}" if is_ours else None
