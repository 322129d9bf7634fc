"""Ctrl-C at any line that is asked for: what it leaves behind is looked at afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENGINE = tuple(
    f"socpo_fast/engine/{name}.py" for name in ("engine", "scheduler", "sequence", "pages", "keys")
)
ROLLOUT = (*ENGINE, "socpo_fast/socratic/rollout.py", "socpo_fast/socratic/teachers/calls.py")


@contextmanager
def interrupted_at(line: int, files: tuple[str, ...] = ENGINE) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt before the line-th line of these files that this thread runs in the
    block.

    Yields a list that holds how many lines were run so far. Only once: what cleans up runs through.
    """
    num_lines = [0]

    def on_line(frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            num_lines[0] += 1
            if num_lines[0] == line:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: FrameType, _event: str, _arg: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(files) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield num_lines
    finally:
        sys.settrace(before)
