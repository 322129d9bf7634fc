"""What happened when, as a file that ui.perfetto.dev and chrome://tracing open.

    with recording(folder, batch, num_batches):    what note_span is told meanwhile, to a file
    note_span("student", "decode", since=start_s)

Tracks of a run: trainer (phases), student and teacher (steps of their engines, one after the other,
as the host sees them end), guidance (every request, from asked to answered; many at once). Times
are those of time.perf_counter, seconds. Only one recording at a time, on the trainer's thread.
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
def recording(folder: Path, batch: int, num_batches: int) -> Iterator[None]:
    """Records the first num_batches batches, each to a file that is written when its block ends."""
    global _events
    if batch > num_batches:
        yield
        return
    _events = []
    try:
        yield
    finally:
        content = json.dumps({"traceEvents": _events})
        _events = None
        replace_file(folder / f"trace_{batch:06}.json", content)


def note_span(
    track: str, name: str, *, since: float, overlaps: bool = False, **details: Any
) -> None:
    """Records a span from `since` to now; overlaps: whether spans of its track may overlap."""
    if _events is None:
        return
    begin_us = 1e6 * since
    now_us = 1e6 * time.perf_counter()
    event: dict[str, Any] = {"pid": track, "tid": track, "cat": track, "name": name, "ts": begin_us}
    if overlaps:
        event["id"] = len(_events)
        _events.append(event | {"ph": "b", "args": details})
        _events.append(event | {"ph": "e", "ts": now_us})
    else:
        _events.append(event | {"ph": "X", "dur": now_us - begin_us, "args": details})
