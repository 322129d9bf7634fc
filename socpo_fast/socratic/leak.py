"""Does guidance give the answer away? For the metric guidance/leak_rate; an estimate by surface form, no judge."""

from __future__ import annotations

import re

from socpo_fast.socratic.graders import OPTION_LETTER, STATED_LETTER, same_value
from socpo_fast.types import Question

_OPTION_LINE = re.compile(r"^\s*\(?([A-J])[):.]\s+(.+?)\s*$", re.MULTILINE)
_PICK = re.compile(
    r"\b(?i:choose|pick|select|mark|correct|right)(?i:\s+(?:is|the|option|choice|answer|one))*[\s:*_(\"]+"
    rf"({OPTION_LETTER})"
)
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w]|\.\d)", re.ASCII)


def leaks_answer(guidance_text: str, question: Question) -> bool:
    """Whether the guidance states the answer: its letter, the text of its option, or its value.

    A letter counts when it is named as the answer, not when an option is merely mentioned. The text of the right option
    counts unless the guidance repeats every option. A value counts wherever it stands on its own, unless the question
    gives that value itself; then only when called the answer.
    """
    truth = question.ground_truth.strip()
    options = dict(_OPTION_LINE.findall(question.text))
    if re.fullmatch(r"[A-J]", truth) and truth in options:
        if any(truth in pattern.findall(guidance_text) for pattern in (*STATED_LETTER, _PICK)):
            return True
        named = {letter for letter, text in options.items() if _stands_in(text, guidance_text)}
        return truth in named and len(named) < len(options)
    if not _stands_in(truth, guidance_text):
        return False
    return not _stands_in(truth, question.text) or _is_called_answer(truth, guidance_text)


def _stands_in(value: str, text: str) -> bool:
    """value occurs in text on word borders, whatever the case and spacing; numbers as numbers."""
    if any(same_value(number, value) for number in _NUMBER.findall(text)):
        return True
    words = r"\s+".join(re.escape(word) for word in value.split())
    return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def _is_called_answer(value: str, text: str) -> bool:
    return re.search(rf"\banswer\b[^.\n]{{0,20}}?(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None
