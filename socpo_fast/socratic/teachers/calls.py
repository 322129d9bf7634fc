"""Calls teachers from a thread without an event loop, and makes teachers of functions.

Read ask and result_of, then RuleTeacher. Teachers run on the event loop of the caller, if it has
one (arollouts). Else there are two background event loops, each in a thread of its own:

    socpo-teachers     all calls of teachers, since a pooled HTTP client lives on one loop; also the
                       time limits of these calls
    socpo-functions    the user's async functions; one that blocks this loop stops no time limit. It
                       keeps the blocked loop, and the next call gets a new one.
"""

import asyncio
import inspect
import os
import threading
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from dataclasses import replace
from typing import Any

from socpo_fast.socratic.plugin import describe_error, text_of
from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

RETRY_TEXT = (
    "Your answer is not correct. Read the question again, check every step and try once more."
)
TEACHERS = "socpo-teachers"  # the event loop of all calls of teachers
FUNCTIONS = "socpo-functions"  # the event loop of async functions
IMMEDIATE_WAIT_S = 0.1  # longest wait for an immediate teacher before other work goes on

Answer = Guidance | str | None
TeacherFunction = Callable[[GuidanceRequest], Answer | Awaitable[Answer]]


def ask(
    teacher: Teacher,
    request: GuidanceRequest,
    timeout_s: float,
    loop: asyncio.AbstractEventLoop | None = None,
) -> Future[Guidance | None]:
    """Starts a call of the teacher on a loop that another thread runs; None: the background one."""
    return asyncio.run_coroutine_threadsafe(
        teacher.guide_in_time(request, timeout_s), loop or _event_loop(TEACHERS)
    )


def wait_if_immediate(teacher: Teacher, calls: Iterable[Future[Guidance | None]]) -> None:
    """Waits on the spot for the last of the calls, if the teacher is immediate.

    An immediate teacher answers before anything else goes on, one call at a time, so that the order
    of calls is repeatable. If a call takes longer than IMMEDIATE_WAIT_S, the caller goes on, and
    makes the next calls without waiting for each. So calls that hang cost one time limit together,
    however many there are.
    """
    *earlier, last = calls
    if teacher.immediate and all(call.done() for call in earlier):
        wait([last], timeout=IMMEDIATE_WAIT_S)


def result_of(future: Future[Guidance | None], teacher: Teacher) -> Guidance | GuidanceFailed:
    """Returns the guidance of a call that is done, or the reason that there is none.

    Reasons are counted in teacher.failures; the first one of each kind is shown as a warning.
    """
    try:
        if guidance := future.result(timeout=0):
            return guidance
        failure = GuidanceFailed("none", "the teacher had nothing to say")
    except GuidanceFailed as error:
        failure = error
    except TimeoutError:
        failure = GuidanceFailed("timeout", "no answer within teacher.guidance_timeout_s")
    except (CancelledError, Exception) as error:  # noqa: BLE001 - ends only this rollout
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
    """A teacher that is a function of the request. It returns Guidance, text or None.

    Blank text is no guidance. A plain function runs on its own thread, and an async one on the
    caller's event loop, or else on a loop that only such functions share. So a function that never
    returns loses its own guidance to the time limit, and delays no other call, unless it blocks the
    caller's loop. Calls may overlap once one of them takes long.
    """

    def __init__(self, rule: TeacherFunction):
        self.rule = rule
        # An async function usually waits for something, such as a server.
        self.immediate = not inspect.iscoroutinefunction(rule)

    async def guide_in_time(
        self,
        request: GuidanceRequest,
        timeout_s: float | None,
    ) -> Guidance | None:
        async with asyncio.timeout(timeout_s):
            answer: object = await self._call(request) if self.immediate else self.rule(request)
            is_callers_loop = asyncio.get_running_loop() is not _loops.get((TEACHERS, os.getpid()))
            if inspect.isawaitable(answer) and is_callers_loop:
                # There Ctrl-C is the caller's, not the function's.
                answer = await self._finish(answer, (KeyboardInterrupt,))
            elif inspect.isawaitable(answer):
                try:
                    answer = await asyncio.wrap_future(background(self._finish(answer), FUNCTIONS))
                # Cancelled by the time limit: perhaps the function blocks the functions' loop.
                except asyncio.CancelledError:
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
        # Not guidance.text.strip(): the text may be of a subclass of str that overrides it.
        text = str.strip(guidance.text)
        return replace(guidance, text=text) if text else None

    def _call(self, request: GuidanceRequest) -> asyncio.Future[object]:
        """Runs the function on a new daemon thread. A pool could fill with functions that hang."""
        future: Future[object] = Future()
        # From here on the future cannot be cancelled, so the thread can always set its result.
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(self.rule(request))
            except BaseException as error:  # noqa: BLE001 - sys.exit is the function's error, too
                future.set_exception(GuidanceFailed("exception", describe_error(self.rule, error)))

        threading.Thread(target=run, name="socpo-function", daemon=True).start()
        return asyncio.wrap_future(future)

    async def _finish(
        self, answer: Awaitable[object], passed_on: tuple[type[BaseException], ...] = ()
    ) -> object:
        """Awaits an async function; its errors become GuidanceFailed, but for those passed on."""
        try:
            return await answer
        except asyncio.CancelledError:
            raise
        except passed_on:
            raise
        except BaseException as error:  # noqa: BLE001 - the function may raise anything
            raise GuidanceFailed("exception", describe_error(self.rule, error)) from None


def as_teacher(teacher: Teacher | TeacherFunction) -> Teacher:
    """Returns a Teacher as it is, and a function or an object with a guide() as a RuleTeacher.

    Function and guide() may be plain or async.

    Raises:
        TypeError: it is none of these.
    """
    # A subclass of Teacher may define guide() alone. Then guide_in_time would not work.
    if isinstance(teacher, Teacher) and type(teacher).guide_in_time is not Teacher.guide_in_time:
        return teacher
    guide = getattr(teacher, "guide", teacher)
    if not callable(guide):
        raise TypeError(
            f"teacher: must have guide(request) or be a function of it, got {teacher!r:.60}"
        )
    return RuleTeacher(guide)


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Returns a teacher that says the same sentence after every attempt.

    An ablation: it measures the gain of a second attempt without a diagnosis.
    """
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)


_loops: dict[tuple[str, int], asyncio.AbstractEventLoop] = {}  # key: name, process id
_lock = threading.Lock()


def background(coroutine: Coroutine[Any, Any, Any], name: str = TEACHERS) -> Future[Any]:
    """Runs a coroutine on the background event loop of that name, one for the whole process."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop(name))


async def replace_if_blocked(name: str) -> None:
    """Drops a loop that a function blocks, so that the next call makes a new one."""
    # A loop that is not blocked runs the probe at once.
    loop = _event_loop(name)
    probe = background(asyncio.sleep(0), name)
    await asyncio.wait([asyncio.wrap_future(probe)], timeout=0.2)
    if not probe.done() and _event_loop(name) is loop:
        del _loops[name, os.getpid()]


def _event_loop(name: str) -> asyncio.AbstractEventLoop:
    """Returns the loop of that name, and starts it if this process has none yet.

    The process id is part of the key: a fork has no threads of its parent, so it needs a new loop.
    """
    key = (name, os.getpid())
    with _lock:
        if key not in _loops:
            _loops[key] = asyncio.new_event_loop()
            threading.Thread(
                target=_run_forever, args=(_loops[key],), name=name, daemon=True
            ).start()
        return _loops[key]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """Runs a loop for good: sys.exit in a task ends run_forever, which is then called again."""
    while True:
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()
