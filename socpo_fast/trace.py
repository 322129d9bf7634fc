"""What happened when, as a file that ui.perfetto.dev and chrome://tracing open.

    with recording(path):        whatever note_span is told meanwhile ends up in the file
    note_span("student", "decode", since=start_s)

Tracks of a run: trainer (phases), student and teacher (steps of their engines, one after the other,
as the host sees them end), guidance (every request, from asked to answered; many at once). Times are
those of time.perf_counter, seconds. Only one recording at a time, on the trainer's thread.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from socpo_fast.files import replace_file

_events: list[dict[str, Any]] | None = None


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Records to a file, written when the block ends; None records nothing."""
    global _events
    if path is None:
        yield
        return
    _events = []
    try:
        yield
    finally:
        content, _events = json.dumps({"traceEvents": _events}), None
        replace_file(path, content)


def note_span(track: str, name: str, *, since: float, overlaps: bool = False, **details: Any) -> None:
    """Notes what ends now and began at `since`; overlaps: while others of its track are under way."""
    if _events is None:
        return
    now = time.perf_counter()
    common: dict[str, Any] = {"pid": track, "cat": track, "name": name}
    if overlaps:
        common["id"] = len(_events)
        _events.append(common | {"ph": "b", "ts": 1e6 * since, "args": details})
        _events.append(common | {"ph": "e", "ts": 1e6 * now})
    else:
        timing = {"ph": "X", "tid": track, "ts": 1e6 * since, "dur": 1e6 * (now - since)}
        _events.append(common | timing | {"args": details})
