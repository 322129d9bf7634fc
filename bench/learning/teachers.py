"""Defines a bad teacher for the study, to be set as teacher.rule."""

from __future__ import annotations

from socpo_fast.types import GuidanceRequest
from tools.builtin_student.tokenizer import LEAK_TEXTS


def give_answer(request: GuidanceRequest) -> str:
    """Gives the answer away, in a sentence that the student knows; needs teacher.reveal_answer."""
    assert request.ground_truth is not None, "set teacher.reveal_answer true"
    return request.ground_truth.join(LEAK_TEXTS)
