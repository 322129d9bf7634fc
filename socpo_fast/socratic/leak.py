"""Does guidance give the answer away? For guidance/leak_rate and teacher.on_leak.

An estimate by surface form, no judge.
"""

import re

from socpo_fast.socratic.graders import OPTION_LETTER, OPTION_LINE, STATED_LETTER, same_value
from socpo_fast.types import Question

_PICK = re.compile(
    r"\b(?i:choose|pick|select|mark|correct|right)(?i:\s+(?:is|the|option|choice|answer|one))*[\s:*_(\"]+"
    rf"({OPTION_LETTER})"
)
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w]|\.\d)", re.ASCII)


def leaks_answer(guidance_text: str, question: Question) -> bool:
    """Whether the guidance states the answer: its letter, the text of its option, or its value.

    A letter counts when it is named as the answer, not when an option is merely mentioned. The text
    of the right option counts unless the guidance repeats every option. A value counts wherever it
    stands on its own, unless the question gives that value itself; then only when called the
    answer.
    """
    return bool(_answer_spans(guidance_text, question))


def mask_answer(guidance_text: str, question: Question) -> str:
    """The guidance with "[...]" in place of every letter, option text or value for which
    leaks_answer holds.
    """
    options = dict(OPTION_LINE.findall(question.text))
    stated = (
        question.ground_truth,
        options.get(question.ground_truth.strip().upper(), "a letter is a word"),
    )
    # the mask itself might state an answer without a word, such as ".", over and over
    mask = "[...]" if all(any(char.isalnum() for char in value) for value in stated) else ""
    while spans := sorted(_answer_spans(guidance_text, question), reverse=True):
        until = len(guidance_text)
        for (
            start,
            end,
        ) in spans:  # from the last to the first; one that reaches into a masked one is part of it
            if end <= until:
                guidance_text = f"{guidance_text[:start]}{mask}{guidance_text[end:]}"
                until = start
    return guidance_text


def _answer_spans(text: str, question: Question) -> list[tuple[int, int]]:
    """Where the answer is stated, from and to."""
    truth = question.ground_truth.strip()
    options = dict(OPTION_LINE.findall(question.text))
    letter = truth.upper()  # as the mcq grader reads it
    if letter in options:
        stated = [found for pattern in (*STATED_LETTER, _PICK) for found in pattern.finditer(text)]
        named = {option: _places(option_text, text) for option, option_text in options.items()}
        spelled_out = [] if all(named.values()) else named[letter]
        return [found.span(1) for found in stated if found[1] == letter] + spelled_out
    places = _places(truth, text)
    if places and _places(truth, question.text):
        called = rf"\banswer\b[^.\n]{{0,20}}?(?<!\w)({re.escape(truth)})(?!\w)"
        return [found.span(1) for found in re.finditer(called, text, re.IGNORECASE)]
    return places


def _places(value: str, text: str) -> list[tuple[int, int]]:
    """Where value occurs in text on word borders, whatever the case and spacing; numbers as
    numbers.
    """
    places = [number.span() for number in _NUMBER.finditer(text) if same_value(number[0], value)]
    if words := r"\s+".join(re.escape(word) for word in value.split()):
        places += [
            found.span() for found in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE)
        ]
    return places
