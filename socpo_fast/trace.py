"""Records a timeline as a file that ui.perfetto.dev and chrome://tracing open.

    with recording(folder, batch, num_batches):          writes a file of the spans noted within
        note_span("student", "decode", since=start_s)

A run has these tracks: trainer (its phases), student and teacher (the steps of their engines, one
after the other, timed when the host sees them end), guidance (every request from sending to answer;
many overlap). Times are seconds of time.perf_counter. There is one recording at a time, on the
trainer's thread.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from socpo_fast.files import replace_file

# A module variable, so that the engine and the teachers need not carry a recorder around. None: no
# recording, and note_span does nothing.
_events: list[dict[str, Any]] | None = None


@contextmanager
def recording(folder: Path, batch: int, num_batches: int) -> Iterator[None]:
    """Records a `with` block to a file, if `batch` is one of the first num_batches batches."""
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
    """Records a span from `since` to now; overlaps: whether spans of this track may overlap."""
    if _events is None:
        return
    begin_us = 1e6 * since
    now_us = 1e6 * time.perf_counter()
    event: dict[str, Any] = {"pid": track, "tid": track, "cat": track, "name": name, "ts": begin_us}
    # "X" events of one track must nest. Spans that overlap are a pair of begin and end ("b", "e"),
    # matched by their id. The format counts in microseconds.
    if overlaps:
        event["id"] = len(_events)
        _events.append(event | {"ph": "b", "args": details})
        _events.append(event | {"ph": "e", "ts": now_us})
    else:
        _events.append(event | {"ph": "X", "dur": now_us - begin_us, "args": details})
