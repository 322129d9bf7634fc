"""Teachers without a language model: a Python function, and a fixed sentence (the ablation)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from socpo_fast.types import Guidance, GuidanceRequest

RETRY_TEXT = "Your answer is not correct. Read the question again, check every step and try once more."


@dataclass(frozen=True)
class RuleTeacher:
    """Says what rule(request) returns; None or blank text is no guidance. What rule raises goes to the caller.

    rule runs on a thread of its own, so one that never returns is held to the time limit like any other teacher.
    """

    rule: Callable[[GuidanceRequest], str | None]
    immediate: ClassVar[bool] = True

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        text = await asyncio.to_thread(self.rule, request)
        return Guidance(text=text.strip()) if text and text.strip() else None

    def step(self) -> bool:
        return False

    async def aclose(self) -> None:
        pass


def retry_teacher(text: str = RETRY_TEXT) -> RuleTeacher:
    """Says the same sentence whatever the attempt: the gain of a second look without a diagnosis."""
    if not text.strip():
        raise ValueError("teacher.retry_text must be text, got only white space")
    return RuleTeacher(lambda request: text)
