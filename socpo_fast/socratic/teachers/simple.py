"""Teachers without a language model: a Python function, and a fixed sentence (the ablation)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import cast

from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceRequest

RETRY_TEXT = "Your answer is not correct. Read the question again, check every step and try once more."


Answer = Guidance | str | None
TeacherFunction = Callable[[GuidanceRequest], Answer | Awaitable[Answer]]


@dataclass(frozen=True)
class RuleTeacher:
    """Says what a function of the request returns: Guidance, text or None; blank text is no guidance.

    A plain function runs on a thread of its own, so one that never returns is held to the time limit like any other
    teacher; an async one runs on the teachers' event loop. What it raises goes to the caller.
    """

    rule: TeacherFunction

    @property
    def immediate(self) -> bool:
        """An async function may wait for somebody else."""
        return not inspect.iscoroutinefunction(self.rule)

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        answer: object = await asyncio.to_thread(self.rule, request) if self.immediate else self.rule(request)
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is None:
            return None
        guidance = Guidance(text=answer) if isinstance(answer, str) else answer
        if not isinstance(guidance, Guidance):
            name = getattr(self.rule, "__name__", type(self.rule).__name__)
            raise TypeError(f"teacher: {name} must return Guidance, str or None, got {answer!r:.60}")
        text = guidance.text.strip()
        return replace(guidance, text=text) if text else None

    def step(self) -> bool:
        return False

    async def aclose(self) -> None:
        pass


def as_teacher(teacher: Teacher | TeacherFunction) -> Teacher:
    """The teacher itself, or a plain or async function as one.

    Raises:
        TypeError: it is neither.
    """
    if hasattr(teacher, "guide"):
        return cast(Teacher, teacher)
    if not callable(teacher):
        raise TypeError(f"teacher: must have guide(request) or be a function of it, got {teacher!r:.60}")
    return RuleTeacher(teacher)


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Says the same sentence whatever the attempt: the gain of a second look without a diagnosis."""
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)
