"""Calls to a teacher from a thread without an event loop: ask, then result_of once it is done.

All of them run on one background loop of the process, in the thread "socpo-teachers": a pooled HTTP
client lives on one loop.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from functools import cache
from typing import Any

from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceRequest


def ask(teacher: Teacher, request: GuidanceRequest, timeout_s: float) -> Future[Guidance | None]:
    """Start teacher.guide(request) on the background loop."""
    return background(asyncio.wait_for(teacher.guide(request), timeout_s))


def result_of(future: Future[Guidance | None]) -> Guidance | None:
    """What the teacher said; None, with a warning, when it raised, was cancelled or took too long."""
    try:
        return future.result(timeout=0)
    except CancelledError:
        warnings.warn("teacher: guide() was cancelled", stacklevel=3)
    except Exception as error:  # noqa: BLE001 - whatever a teacher raises costs its own rollout, and is told
        warnings.warn(f"teacher: guide() failed with {type(error).__name__}: {error}", stacklevel=3)
    return None


def background(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Run a coroutine on the process's one background event loop (a pooled HTTP client lives on one loop)."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    started = threading.Event()

    def run() -> None:
        loop.call_soon(started.set)
        loop.run_forever()

    threading.Thread(target=run, name="socpo-teachers", daemon=True).start()
    started.wait()
    return loop
