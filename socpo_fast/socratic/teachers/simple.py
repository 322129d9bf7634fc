"""Teachers without a language model: a Python function, and a fixed sentence (the ablation)."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace

from socpo_fast.socratic.plugin import blame, text_of
from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.socratic.teachers.calls import background, replace_if_blocked
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

RETRY_TEXT = "Your answer is not correct. Read the question again, check every step and try once more."
FUNCTIONS = "socpo-functions"  # the event loop of async functions

Answer = Guidance | str | None
TeacherFunction = Callable[[GuidanceRequest], Answer | Awaitable[Answer]]


class RuleTeacher(Teacher):
    """Says what a function of the request returns: Guidance, text or None; blank text is no guidance.

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
            raise GuidanceFailed("exception", f"{name} must return Guidance, str or None, got {text_of(answer)}")
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
        raise TypeError(f"teacher: must have guide(request) or be a function of it, got {teacher!r:.60}")
    return RuleTeacher(guide)


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Says the same sentence whatever the attempt: the gain of a second look without a diagnosis."""
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)
