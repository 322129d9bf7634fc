"""Calls to teachers from a thread without an event loop, and functions as teachers.

Read ask and result_of, then RuleTeacher. All calls run on one background loop of the process, in
the thread "socpo-teachers": a pooled HTTP client lives on one loop. Async functions of the user's
own have another loop, "socpo-functions", so that one that blocks it holds up nobody's clock; it is
left alone with that loop.
"""

import asyncio
import inspect
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from socpo_fast.socratic.plugin import blame, text_of
from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

RETRY_TEXT = (
    "Your answer is not correct. Read the question again, check every step and try once more."
)
FUNCTIONS = "socpo-functions"  # the event loop of async functions

Answer = Guidance | str | None
TeacherFunction = Callable[[GuidanceRequest], Answer | Awaitable[Answer]]


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
        warnings.warn(
            f"teacher: no guidance, {failure.kind}: {failure}; "
            f"more of these are counted in guidance/failed_{failure.kind}",
            stacklevel=3,
        )
    return failure


class RuleTeacher(Teacher):
    """Says what a function of the request returns: Guidance, text or None; blank text is no
    guidance.

    A plain function runs on a thread of its own and an async one on an event loop that only such
    functions have, so one that never returns costs its own guidance, by the time limit, and holds
    up nobody else. Calls may overlap once one of them takes long.
    """

    def __init__(self, rule: TeacherFunction):
        self.rule = rule
        # An async function may wait for somebody else.
        self.immediate = not inspect.iscoroutinefunction(rule)

    async def guide_in_time(
        self,
        request: GuidanceRequest,
        timeout_s: float | None,
    ) -> Guidance | None:
        async with asyncio.timeout(timeout_s):
            answer: object = await self._call(request) if self.immediate else self.rule(request)
            if inspect.isawaitable(answer):
                try:
                    answer = await asyncio.wrap_future(background(self._finish(answer), FUNCTIONS))
                except asyncio.CancelledError:  # out of time
                    background(replace_if_blocked(FUNCTIONS))
                    raise
        if answer is None:
            return None
        guidance = Guidance(text=answer) if isinstance(answer, str) else answer
        if not (isinstance(guidance, Guidance) and isinstance(guidance.text, str)):
            name = getattr(self.rule, "__name__", type(self.rule).__name__)
            raise GuidanceFailed(
                "exception", f"{name} must return Guidance, str or None, got {text_of(answer)}"
            )
        text = str.strip(guidance.text)  # the function of str, whatever class of text it is
        return replace(guidance, text=text) if text else None

    def _call(self, request: GuidanceRequest) -> asyncio.Future[object]:
        """The function's answer, from a daemon thread: there is no pool that could fill."""
        future: Future[object] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(self.rule(request))
            except BaseException as error:  # noqa: BLE001 - sys.exit too is its own
                future.set_exception(GuidanceFailed("exception", blame(self.rule, error)))

        threading.Thread(target=run, name="socpo-function", daemon=True).start()
        return asyncio.wrap_future(future)

    async def _finish(self, answer: Awaitable[object]) -> object:
        try:
            return await answer
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, its own
            raise GuidanceFailed("exception", blame(self.rule, error)) from None


def as_teacher(teacher: Teacher | TeacherFunction) -> Teacher:
    """The teacher itself; a plain or async function, or an object with such a guide(), as one.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(teacher, Teacher) and type(teacher).guide_in_time is not Teacher.guide_in_time:
        return teacher
    guide = getattr(teacher, "guide", teacher)
    if not callable(guide):
        raise TypeError(
            f"teacher: must have guide(request) or be a function of it, got {teacher!r:.60}"
        )
    return RuleTeacher(guide)


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Says one sentence whatever the attempt: the gain of a second look, without a diagnosis."""
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)


_loops: dict[tuple[str, int], asyncio.AbstractEventLoop] = {}  # by name and process
_lock = threading.Lock()


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
            threading.Thread(
                target=_run_forever, args=(_loops[key],), name=name, daemon=True
            ).start()
        return _loops[key]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:  # sys.exit in a task ends run_forever
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
