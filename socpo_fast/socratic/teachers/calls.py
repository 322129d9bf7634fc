"""Calls to a teacher from a thread without an event loop: ask, then result_of once it is done.

All of them run on one background loop of the process, in the thread "socpo-teachers": a pooled HTTP
client lives on one loop. Async functions of the user's own have another loop, "socpo-functions", so
that one that blocks it holds up nobody's clock; it is left alone with that loop.
"""

import asyncio
import os
import threading
import warnings
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

_loops: dict[tuple[str, int], asyncio.AbstractEventLoop] = {}  # by name and process
_lock = threading.Lock()


def ask(teacher: Teacher, request: GuidanceRequest, timeout_s: float) -> Future[Guidance | None]:
    """Start teacher.guide(request) on the background loop."""
    return background(teacher.guide_in_time(request, timeout_s))


def result_of(future: Future[Guidance | None], teacher: Teacher) -> Guidance | GuidanceFailed:
    """What the teacher said, or why it said nothing: counted, and told the first time."""
    try:
        if guidance := future.result(timeout=0):
            return guidance
        failure = GuidanceFailed("none", "the teacher had nothing to say")
    except GuidanceFailed as error:
        failure = error
    except TimeoutError:
        failure = GuidanceFailed("timeout", "no answer within teacher.guidance_timeout_s")
    except (CancelledError, Exception) as error:  # noqa: BLE001 - costs its own rollout
        failure = GuidanceFailed("exception", f"the teacher raised {type(error).__name__}: {error}")
    teacher.failures[failure.kind] += 1
    if teacher.failures[failure.kind] == 1:
        more = f"more of these are counted in guidance/failed_{failure.kind}"
        warnings.warn(f"teacher: no guidance, {failure.kind}: {failure}; {more}", stacklevel=3)
    return failure


def background(coroutine: Coroutine[Any, Any, Any], name: str = "socpo-teachers") -> Future[Any]:
    """Run a coroutine on the process's one background event loop of that name."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop(name))


async def replace_if_blocked(name: str) -> None:
    """Leave a loop to the function that blocks it; whoever comes next has a new one."""
    loop = _event_loop(name)
    probe = background(asyncio.sleep(0), name)
    await asyncio.wait([asyncio.wrap_future(probe)], timeout=0.2)
    if not probe.done() and _event_loop(name) is loop:
        del _loops[name, os.getpid()]


def _event_loop(name: str) -> asyncio.AbstractEventLoop:
    """A fork has none of its parent's threads, so it makes a loop of its own."""
    key = (name, os.getpid())
    with _lock:
        if key not in _loops:
            _loops[key] = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=(_loops[key],), name=name, daemon=True).start()
        return _loops[key]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:  # sys.exit in a task ends run_forever
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
