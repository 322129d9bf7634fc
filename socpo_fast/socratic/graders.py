"""Verdicts on attempts. Read Grader and GradedBy, then make_grader at the end, which lists them.

A grader is a function of text and question: it says whether the text is right, or how right it is.
It sees text only and never raises for what a model wrote: an answer that cannot be read is wrong.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from socpo_fast.files import StopRequested
from socpo_fast.registries import GRADERS
from socpo_fast.socratic import math_worker
from socpo_fast.socratic.plugin import (
    TookTooLong,
    blame,
    is_ours,
    load_function,
    text_of,
    time_limit,
)
from socpo_fast.types import Question

Verdict = bool | float | Mapping[str, float]
Grader = Callable[[str, Question], Verdict]
_ROUNDING = 1e-6  # parts that are meant to sum to 1 may miss it by so much


class Grade(NamedTuple):
    """What a grader's verdict amounts to; parts are those of a verdict that names some."""

    reward: float  # in [0, 1]
    is_correct: bool
    parts: dict[str, float]


@dataclass(frozen=True)
class GradedBy:
    """A grader under its name, held to what a verdict may be.

    Args:
        function:   text, question -> a bool, a number in [0, 1], or {part: number}, numbers >= 0
                    that sum to at most 1.
        name:       what errors call it.
        correct_at: in (0, 1]; the reward from which an attempt counts as correct.
        timeout_s:  > 0, for one verdict on the main thread; elsewhere none can be stopped.
    """

    function: Grader
    name: str
    correct_at: float = 1.0
    timeout_s: float = 60.0

    def __call__(self, text: str, question: Question) -> Verdict:
        return self.function(text, question)

    def grade(self, text: str, question: Question) -> Grade:
        """Returns the grade of an attempt.

        Raises:
            ValueError: the function returned anything else, took too long, or raised something; the
                message names the grader, the question, and the file and line that raised.
        """
        try:
            with time_limit(self.timeout_s):
                verdict: object = self.function(text, question)
            if StopRequested.was_raised:
                raise StopRequested
            parts = (
                {str(key): _number(part) for key, part in verdict.items()}
                if isinstance(verdict, Mapping)
                else {}
            )
            reward = math.fsum(parts.values()) if parts else _number(verdict)
        except BaseException as error:
            if is_ours(error):
                raise
            raise ValueError(
                f"grader: data.grader {self.name} must return a verdict on any text, within "
                f"grader.timeout_s {self.timeout_s:g}, got an error on question "
                f"{question.question_idx}: {blame(self.function, error)}"
            ) from error
        is_allowed = all(part >= 0 for part in parts.values()) and 0 <= reward <= 1 + _ROUNDING
        if not is_allowed:  # nan is not, and neither is what is no number
            if inspect.iscoroutine(verdict):
                verdict.close()
                raise ValueError(
                    f"grader: {self.name} must be a plain function, got an async one; await "
                    "inside of it"
                )
            raise ValueError(
                f"grader: {self.name} must return a bool, a number in [0, 1] or parts >= 0 that "
                "sum to at most 1, "
                f"got {text_of(verdict)}"
            )
        return Grade(min(reward, 1.0), reward >= self.correct_at, parts)


def as_grader(grader: Grader) -> GradedBy:
    """The grader itself, or a plain function under its own name."""
    if isinstance(grader, GradedBy):
        return grader
    return GradedBy(grader, getattr(grader, "__name__", type(grader).__name__))


def _number(value: object) -> float:
    """Bools and numbers of Python and numpy; nan for anything else."""
    is_number = isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


_STRICT_LETTER = re.compile(r"<answer>\r?\n([A-D])\r?\n</answer>")
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?", re.ASCII)

# An option letter standing alone. A and I are words too, so before a small letter they count in few
# places only.
OPTION_LETTER = r"(?:[B-HJ]|[AI](?!\s+(?!because\b|since\b|as\b|which\b)[a-z]))(?![\w'\u2019])"
_BOX = r"\\boxed\{\s*(?:\\(?:text|mathbf|mathrm)\{)?"
# possessive: a run of marks is read once
_MARKED = rf"[\s*_(\[$]*+(?:{_BOX})?+[\s*_(]*+({OPTION_LETTER})"
STATED_LETTER = (  # ways to name a letter as the answer
    re.compile(rf"{_BOX}\(?({OPTION_LETTER})"),
    re.compile(
        rf"\b(?i:answer|choice)\b[^.\n:]{{0,40}}?(?::|\b(?i:is)\b:?)"
        rf"[\s*_]*+(?i:(?:the )?(?:option|choice)\b)?+{_MARKED}"
    ),
    re.compile(
        rf"\b(?i:option|choice)\s+[*_(]*({OPTION_LETTER})[*_)]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best))"
    ),
)
_LINE_ALONE = re.compile(rf"^[ \t*_(\[]*({OPTION_LETTER})[ \t*_)\].:]*\r?$", re.MULTILINE)
_MENTIONS = (
    re.compile(rf"\(({OPTION_LETTER})\)"),
    re.compile(rf"^[ \t*_]*({OPTION_LETTER})[*_]*[):.]", re.MULTILINE),
)


OPTION_LINE = re.compile(
    r"^\s*\(?([A-J])[):.]\s+(.+?)\s*$", re.MULTILINE
)  # (letter, text) of a listed option
_LETTERS = {"sciknoweval": "ABCD", "mcq": "ABCDEFGHIJ"}


def check_ground_truth(grader: str, question: Question) -> None:
    """Refuse a ground_truth under which no answer could be right: no letter, or none of the options
    A, B, .. listed.

    Raises:
        ValueError: with the reason alone.
    """
    letters = _LETTERS.get(grader)
    if letters is None:
        return
    truth = question.ground_truth.strip()
    listed = "".join(sorted({letter for letter, _ in OPTION_LINE.findall(question.text)}))
    if len(listed) > 1 and letters.startswith(listed):  # otherwise it is no list of options
        letters = listed
    if (truth.upper() if grader == "mcq" else truth) not in tuple(letters):
        raise ValueError(
            f"ground_truth must be one of {', '.join(letters)} for grader {grader}, got "
            f"{truth[:40]!r}"
        )


def grade_sciknoweval(text: str, question: Question) -> bool:
    """The last strict block, <answer>, one of A-D and </answer> on a line each, names the right
    letter.
    """
    letters = _STRICT_LETTER.findall(text)
    return bool(letters) and letters[-1] == question.ground_truth.strip()


def grade_mcq(text: str, question: Question) -> bool:
    """The letter that `chosen_letter` finds is the right one."""
    return chosen_letter(text) == question.ground_truth.strip().upper()


def chosen_letter(text: str) -> str | None:
    r"""The option letter (A to J, in capitals) a free text settles on, or None.

    The first of these that names a letter, in its last place: an <answer> block; \boxed{B}; "the
    answer is B" or "Answer: B"; "option B is correct"; a line that is a letter alone. Failing all,
    "(B)" or a letter that opens lines ("B: 7.36 N"), if all of that kind are the same letter, so
    that a repeated list of options settles nothing.
    """
    for block in reversed(_ANSWER_BLOCK.findall(text)):
        content = block.strip()
        if found := re.match(_MARKED, content.upper() if len(content) == 1 else content):
            return found[1]
        # a block that is a sentence is read like one, as the last of the text
        text = f"{text}\n{content}"
    for pattern in (*STATED_LETTER, _LINE_ALONE):
        if letters := pattern.findall(text):
            return letters[-1]
    for pattern in _MENTIONS:
        if len(mentioned := set(pattern.findall(text))) == 1:
            return mentioned.pop()
    return None


def grade_exact(text: str, question: Question) -> bool:
    """The last <answer> block, or the whole text without one, is ground_truth but for white space
    around it.

    Two plain decimal numbers are compared as such, so 18.0 is 18.00. A number with leading zeros is
    a string: 018 is not 18, since it may be a code.
    """
    blocks = _ANSWER_BLOCK.findall(text)
    return same_value((blocks[-1] if blocks else text).strip(), question.ground_truth.strip())


def same_value(answer: str, truth: str) -> bool:
    """Equal as strings, or equal as plain decimal numbers."""
    are_numbers = _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(truth)
    return answer == truth or (are_numbers is not None and Decimal(answer) == Decimal(truth))


class MathGrader:
    """The last formula of the text equals ground_truth, by math-verify in a process that ends when
    it takes long.
    """

    _worker: subprocess.Popen[str] | None = None
    _process = 0  # whose worker it is

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()  # an answer belongs to the last question
        if find_spec("math_verify") is None:
            raise ValueError(
                "data.grader: math needs math-verify, which is not installed; pip install "
                "'.[math]' in a checkout"
            )

    def __call__(self, text: str, question: Question) -> bool:
        truth = question.ground_truth
        request = json.dumps([text, truth if "\\boxed" in truth else f"\\boxed{{{truth}}}"])
        with self._one_at_a_time:
            if self._worker is None or self._process != os.getpid():  # a fork starts its own
                self._process = os.getpid()
                self._worker = subprocess.Popen(
                    # With -P the worker's folder, which has modules of ours, is not on sys.path.
                    [sys.executable, "-P", math_worker.__file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                assert self._worker.stdout is not None
                if self._worker.stdout.readline() != "ready\n":
                    raise RuntimeError(
                        "data.grader: math-verify must be importable on its own; try `import "
                        "math_verify`"
                    )
            assert self._worker.stdin is not None and self._worker.stdout is not None
            verdict = ""
            try:
                with suppress(BrokenPipeError, TookTooLong):
                    self._worker.stdin.write(request + "\n")
                    self._worker.stdin.flush()
                    verdict = self._worker.stdout.readline()
            finally:
                # out of time or memory, or we are interrupted: a late verdict is not the next
                # answer's
                if not verdict:
                    self.close()
        return verdict == "1\n"

    def close(self) -> None:
        """End the worker; the next call starts another one."""
        worker, self._worker = self._worker, None
        if worker is not None and self._process == os.getpid():
            worker.kill()
            with suppress(BrokenPipeError), worker:  # closes the pipes and waits
                pass

    def __del__(self) -> None:
        self.close()


def make_grader(name: str, *, correct_at: float = 1.0, timeout_s: float = 60.0) -> GradedBy:
    """Returns the grader of a name in registries.GRADERS, or of a "module:function" with the
    signature of Grader.

    Raises:
        ValueError: an unknown name, math without the math-verify package, or correct_at not in (0,
                    1].
    """
    if not 0 < correct_at <= 1:
        raise ValueError(f"grader.correct_at must be in (0, 1], got {correct_at}")
    if name not in GRADERS and ":" not in name:
        raise ValueError(
            f"data.grader must be one of {', '.join(GRADERS)} or module:function, got {name!r}"
        )
    found: Any = load_function("data.grader", GRADERS.get(name, name))
    grader: Grader = found() if isinstance(found, type) and name in GRADERS else found
    return GradedBy(grader, name, correct_at, timeout_s)
