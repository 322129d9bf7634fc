"""Raises Ctrl-C at any chosen line, so that tests can check what it leaves behind."""

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
    """Raises KeyboardInterrupt before the line-th executed line of these files.

    Only lines that this thread executes inside the block count. Yields a list with the number of
    lines executed so far. The interrupt comes only once, so code that cleans up runs undisturbed.
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

    old_trace = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield num_lines
    finally:
        sys.settrace(old_trace)
