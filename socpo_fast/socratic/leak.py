"""Detects guidance that gives the answer away, for guidance/leak_rate and teacher.on_leak.

This is an estimate by surface form: it compares texts and asks no judge model. Read leaks_answer
and mask_answer, then _answer_spans, which finds the statements for both.
"""

import re

from socpo_fast.socratic.graders import OPTION_LETTER, OPTION_LINE, STATED_LETTER, same_value
from socpo_fast.types import Question

# More ways to point at an option than graders.STATED_LETTER has: "pick (B)", "the right one is B".
_PICK = re.compile(
    r"\b(?i:choose|pick|select|mark|correct|right)"
    r"(?i:\s+(?:is|the|option|choice|answer|one))*[\s:*_(\"]+"
    rf"({OPTION_LETTER})"
)
# A whole number or plain decimal that is not a piece of a word or of a longer number.
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?![\w]|\.\d)", re.ASCII)


def leaks_answer(guidance_text: str, question: Question) -> bool:
    """Whether the guidance states the answer: its letter, the text of its option, or its value.

    A letter counts when it is named as the answer, not when an option is merely mentioned. The text
    of the right option counts unless the guidance repeats every option. A value counts wherever it
    stands as a word or number by itself. If the question already gives that value, it counts only
    where the guidance calls it the answer.
    """
    return bool(_answer_spans(guidance_text, question))


def mask_answer(guidance_text: str, question: Question) -> str:
    """Replaces every letter, option text or value that states the answer by "[...]"."""
    options = dict(OPTION_LINE.findall(question.text))
    stated = (
        question.ground_truth,
        options.get(question.ground_truth.strip().upper(), "a letter is a word"),
    )
    # An answer without a letter or digit, such as ".", is a part of the mask "[...]" itself. The
    # mask would then state the answer again without end, so such an answer is cut out instead.
    mask = "[...]" if all(any(char.isalnum() for char in value) for value in stated) else ""
    # The text that is left may state the answer anew, so search until nothing is found.
    while spans := sorted(_answer_spans(guidance_text, question), reverse=True):
        masked_from = len(guidance_text)
        # Go from the last span to the first, so that the offsets of the others stay valid. A span
        # that overlaps one just masked is skipped.
        for start, end in spans:
            if end <= masked_from:
                guidance_text = f"{guidance_text[:start]}{mask}{guidance_text[end:]}"
                masked_from = start
    return guidance_text


def _answer_spans(text: str, question: Question) -> list[tuple[int, int]]:
    """Returns (start, end) of every statement of the answer in the text."""
    truth = question.ground_truth.strip()
    options = dict(OPTION_LINE.findall(question.text))
    letter = truth.upper()  # as the mcq grader reads it
    if letter in options:
        letter_matches = [
            match for pattern in (*STATED_LETTER, _PICK) for match in pattern.finditer(text)
        ]
        # Guidance that repeats every option text gives nothing away.
        option_spans = {
            option: _spans_of(option_text, text) for option, option_text in options.items()
        }
        text_spans = [] if all(option_spans.values()) else option_spans[letter]
        return [
            match.span(1) for match in letter_matches if match[1].upper() == letter
        ] + text_spans
    value_spans = _spans_of(truth, text)
    # A value from the question is no secret; calling it the answer is.
    if value_spans and _spans_of(truth, question.text):
        called_answer = rf"\banswer\b[^.\n]{{0,20}}?(?<!\w)({re.escape(truth)})(?!\w)"
        return [match.span(1) for match in re.finditer(called_answer, text, re.IGNORECASE)]
    return value_spans


def _spans_of(value: str, text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of every occurrence of a value in the text, between word boundaries.

    Case and spacing do not matter. Numbers are compared as numbers: 18.0 is an occurrence of 18.
    """
    spans = [number.span() for number in _NUMBER.finditer(text) if same_value(number[0], value)]
    if words := r"\s+".join(re.escape(word) for word in value.split()):
        spans += [
            match.span() for match in re.finditer(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE)
        ]
    return spans
