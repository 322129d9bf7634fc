"""A teacher of the study that is no good one, for teacher.rule."""

from __future__ import annotations

from socpo_fast.types import GuidanceRequest
from tools.builtin_student.tokenizer import LEAK_TEXTS


def give_answer(request: GuidanceRequest) -> str:
    """Says the answer, in words that the student was warmed up on; needs teacher.reveal_answer."""
    assert request.ground_truth is not None, "set teacher.reveal_answer true"
    return request.ground_truth.join(LEAK_TEXTS)
