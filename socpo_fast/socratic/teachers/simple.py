"""Teachers without a language model: a Python function, and a fixed sentence (the ablation)."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from socpo_fast.socratic.plugin import FunctionFailed, blame, call_in_thread, name_of
from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.socratic.teachers.calls import background, replace_loop
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest

RETRY_TEXT = "Your answer is not correct. Read the question again, check every step and try once more."
FUNCTIONS = "socpo-functions"  # the event loop of async functions
_BLOCKED_S = 0.2  # a loop that turns only after so long is blocked by somebody


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

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        try:
            answer: object = await self._answer(request)
        except FunctionFailed as error:
            raise GuidanceFailed("exception", str(error)) from error
        if answer is None:
            return None
        guidance = Guidance(text=answer) if isinstance(answer, str) else answer
        if not isinstance(guidance, Guidance):
            must = f"{name_of(self.rule)} must return Guidance, str or None"
            raise GuidanceFailed("exception", f"{must}, got {answer!r:.60}")
        text = guidance.text.strip()
        return replace(guidance, text=text) if text else None

    async def _answer(self, request: GuidanceRequest) -> object:
        if self.immediate:
            answer = await asyncio.wrap_future(call_in_thread(self.rule, request))
        else:
            await self._renew_blocked_loop()
            answer = self.rule(request)  # runs nothing yet
        if inspect.isawaitable(answer):
            return await asyncio.wrap_future(background(self._finish(answer), FUNCTIONS))
        return answer

    async def _renew_blocked_loop(self) -> None:
        """Wait for a turn of the loop; later calls get a new one when it does not come in time."""
        since = time.monotonic()
        try:
            await asyncio.wrap_future(background(asyncio.sleep(0), FUNCTIONS))
        except asyncio.CancelledError:
            if time.monotonic() - since > _BLOCKED_S:
                replace_loop(FUNCTIONS)
            raise

    async def _finish(self, answer: Awaitable[object]) -> object:
        try:
            return await answer
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # sys.exit in it is the function's, not ours
            raise FunctionFailed(blame(self.rule, error)) from None


def as_teacher(teacher: Teacher | TeacherFunction) -> Teacher:
    """The teacher itself; a plain or async function, or an object with such a guide(), as one.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(teacher, Teacher):
        return teacher
    guide = getattr(teacher, "guide", teacher)
    if not callable(guide):
        raise TypeError(
            f"teacher: must have guide(request) or be a function of it, got {teacher!r:.60}"
        )
    return RuleTeacher(guide)


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Says the same sentence whatever the attempt: the gain of a second look without a diagnosis."""
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)
