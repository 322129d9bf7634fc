"""Grades attempts. Read Grader and CheckedGrader, then make_grader at the end, which looks them up.

A grader is a plain or async function of text and question: it says whether the text is right, or
how right it is.
It sees text only and never raises because of what a model wrote: an answer that cannot be read is
wrong.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
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
    describe_error,
    load_function,
    stops_the_run,
    text_of,
    time_limit,
)
from socpo_fast.socratic.teachers.calls import background, replace_if_blocked
from socpo_fast.socratic.thoughts import without_thoughts
from socpo_fast.types import Question

Verdict = bool | float | Mapping[str, float]
Grader = Callable[[str, Question], Verdict | Awaitable[Verdict]]
# The event loop of async graders. A teacher that blocks that of the other functions must not stop
# a grader.
LOOP = "socpo-graders"
_ROUNDING = 1e-6  # tolerance for parts that are meant to sum to 1


class Grade(NamedTuple):
    """A checked verdict. `parts` is empty unless the grader names the parts of its reward."""

    reward: float  # in [0, 1]
    is_correct: bool
    parts: dict[str, float]


@dataclass(frozen=True)
class CheckedGrader:
    """A grader with its name, whose verdicts are checked.

    Args:
        function:   text, question -> a bool, a number in [0, 1], or {part: number}, numbers >= 0
                    that sum to at most 1. It may be async, and then runs on an event loop of
                    another thread, for one attempt at a time.
        name:       the name in error messages.
        correct_at: in (0, 1]; the reward from which an attempt counts as correct.
        timeout_s:  > 0; time limit of one verdict. It holds on the main thread only: on others a
                    function cannot be stopped.
    """

    function: Grader
    name: str
    correct_at: float = 1.0
    timeout_s: float = 60.0

    def __call__(self, text: str, question: Question) -> Verdict | Awaitable[Verdict]:
        return self.function(text, question)

    def grade(self, text: str, question: Question) -> Grade:
        """Returns the grade of an attempt.

        Raises:
            ValueError: the function returned something else, took too long, or raised an error. The
                message names the grader, the question, and the file and line that raised.
        """
        try:
            with time_limit(self.timeout_s):
                verdict: object = self.function(text, question)
                if inspect.isawaitable(verdict):
                    verdict = _wait_for(verdict)
            # The function may have swallowed the signal that should stop the run.
            if StopRequested.was_raised:
                raise StopRequested
            parts = (
                {str(key): _number(part) for key, part in verdict.items()}
                if isinstance(verdict, Mapping)
                else {}
            )
            reward = math.fsum(parts.values()) if parts else _number(verdict)
        # TookTooLong and SystemExit are no Exception.
        except BaseException as error:
            if stops_the_run(error):
                raise
            raise ValueError(
                f"grader: data.grader {self.name} must return a verdict on any text, within "
                f"grader.timeout_s {self.timeout_s:g}, got an error on question "
                f"{question.question_idx}: {describe_error(self.function, error)}"
            ) from error
        is_allowed = all(part >= 0 for part in parts.values()) and 0 <= reward <= 1 + _ROUNDING
        # The reward of anything but a number is nan, and comparisons with nan are False.
        if not is_allowed:
            raise ValueError(
                f"grader: {self.name} must return a bool, a number in [0, 1] or parts >= 0 that "
                "sum to at most 1, "
                f"got {text_of(verdict)}"
            )
        return Grade(min(reward, 1.0), reward >= self.correct_at, parts)


def as_grader(grader: Grader) -> CheckedGrader:
    """Returns a CheckedGrader as it is; wraps a plain function under its own name."""
    if isinstance(grader, CheckedGrader):
        return grader
    return CheckedGrader(grader, getattr(grader, "__name__", type(grader).__name__))


def _wait_for(verdict: Awaitable[object]) -> object:
    """Returns the verdict of an async grader, from whatever thread it is called."""

    async def finish() -> object:
        return await verdict

    future = background(finish(), LOOP)
    try:
        return future.result()
    finally:
        # A time limit or a signal may have ended the waiting. Perhaps the grader blocks its loop.
        if future.cancel():
            background(replace_if_blocked(LOOP))


def _number(value: object) -> float:
    """Returns a bool or number of Python or numpy as a float, and nan for anything else."""
    is_number = isinstance(value, bool | int | float | np.bool_ | np.integer | np.floating)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


_STRICT_LETTER = re.compile(r"<answer>\r?\n([A-D])\r?\n</answer>")
_NUMBER = re.compile(r"[+-]?(?:0|[1-9]\d*)(?:\.\d+)?", re.ASCII)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# What math-verify reads as nothing. A backslash before a brace is none of it: \{\} is a set.
_NO_FORMULA = re.compile(
    r"(?:\\(?:boxed|fbox|text|displaystyle|ldots)(?![a-zA-Z])|\\(?:[^{}a-zA-Z]|$)|[\s$()\[\]{}'\"])*+"
)
# A separator of thousands, which math-verify would take for a product: 1\,234.
_THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,!: ]|~)(?=\d{3}(?!\d))")
# A power of ten, 1.6e-19, in which it would take e for a factor.
_POWER_OF_TEN = re.compile(r"(?<=\d)[eE]([+-]?\d{1,4})(?![\w.])", re.ASCII)
# A word or the mark of a formula: such an answer is read as prose, any other one as a formula.
_PROSE = re.compile(
    r"\\text|(?<![\\a-zA-Z])[A-Za-z]{3,}|(?<!\S)[a-z]{2}(?!\S)|\d\s[A-Za-z]+/[a-z]|\$|\\\(|\\\[|\n|\*\*"
)

# An option letter that is a word by itself. A and I are English words, too: before another word in
# lower case they count only if that is "because", "since", "as" or "which".
_LETTER = r"(?:[B-HJ]|[AI](?!\s+(?!because\b|since\b|as\b|which\b)[a-z]))(?![\w'\u2019])"
# A letter that is joined to another one, as in "B or C", is no choice.
OPTION_LETTER = _LETTER + r"(?![)*_.]{0,3}\s+(?:or|and)\s+[*_(]{0,3}[A-H]\b(?!\s+is\b))"
# A small letter counts only if a bracket or the line ends behind it: "(b)", "Answer: b".
_ANY_LETTER = rf"{OPTION_LETTER}|[a-j](?=[.*_]*+(?:[)}}\]$]|\\[)\]])|[ \t.*_]*+(?:[\r\n]|\Z))"
# The quantifiers are possessive (*+), so that a long run of marks is read only once.
_STYLED = r"(?:[\s*_(\[{$]|\\[(\[]|\\(?:text|math)(?:bf|rm|it|sf|tt)?\{|\\[,;! ])*+"
_BOX = r"\\(?:boxed|fbox)\s*+\{"
_OPTION = r"(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter)\b)?+"
# A letter with marks of Markdown or LaTeX before it: "**(B)", "\boxed{\text{B}}", "Option B".
_MARKED = rf"{_STYLED}(?:{_BOX})?+{_STYLED}{_OPTION}{_STYLED}({_ANY_LETTER})"
_IS_CORRECT = r"(?i:is\s+(?:the\s+)?(?:correct|right|best))"
STATED_LETTER = (  # ways to name a letter as the answer
    re.compile(rf"{_BOX}{_STYLED}{_OPTION}{_STYLED}({_ANY_LETTER})"),
    re.compile(
        r"(?:\b(?i:answer|choice|(?:correct|right|best)\s+(?:option|one|letter))\b"
        rf"[^.\n:\uff1a]{{0,40}}?(?:[:\uff1a]|\b(?i:is)\b:?)|\u7b54\u6848[\u662f\u4e3a:\uff1a]+)"
        rf"{_MARKED}"
    ),
    re.compile(rf"\b(?i:option|choice)\s+[*_(]*([A-J])\b[*_)]*\s+{_IS_CORRECT}"),
    # Only where a sentence begins: "Statement B is correct" names no option.
    re.compile(
        r"(?:^|[.!?]\s|\b(?i:so|thus|hence|therefore),?\s)"
        rf"[*_(]*([A-HJ])\b[*_)]*\s+{_IS_CORRECT}",
        re.MULTILINE,
    ),
)
# A line with nothing but the letter.
_LINE_ALONE = re.compile(rf"^[ \t*_(\[]*({OPTION_LETTER})[ \t*_)\].:]*\r?$", re.MULTILINE)
# Weak signs: "(B)" anywhere, and a letter that opens a line, as in a list of options.
_MENTIONS = (
    re.compile(rf"(?<!not )(?<!Not )(?<!n't )(?<!not be )\(({_LETTER})\)"),
    re.compile(rf"^[ \t*_]*({_LETTER})[*_]*[):.]", re.MULTILINE),
)


# An option of a question, "B) text"; the groups are letter and text.
OPTION_LINE = re.compile(r"^[^\S\n]*+\(?([A-J])[):.]\s++(.+)$", re.MULTILINE)
_LETTERS = {"sciknoweval": "ABCD", "mcq": "ABCDEFGHIJ"}


def check_ground_truth(grader: str, question: Question) -> None:
    """Refuses a ground_truth under which no answer could be right.

    For graders of multiple choice it must be a letter, and one of the options that the question
    lists, if it lists any. For exact and math it must not have marks of thoughts or answers, which
    are never read as a part of an answer. For math it must be a formula whose braces are paired.
    There is no need to parse it: an answer in the same words is right even if math-verify cannot
    read them as mathematics.

    Raises:
        ValueError: the ground_truth is refused. The caller adds which row it is.
    """
    truth = question.ground_truth.strip()
    if grader in ("exact", "math") and (without_thoughts(truth) != truth or answer_blocks(truth)):
        raise ValueError(
            "ground_truth must be the answer alone, without <answer> or marks of thoughts, got "
            f"{truth[:40]!r}"
        )
    if grader == "math" and (
        _NO_FORMULA.fullmatch(truth) or _closing_brace(f"{truth}}}", 0) != len(truth)
    ):
        raise ValueError(
            f"ground_truth must be a formula with paired braces for grader math, got {truth[:40]!r}"
        )
    letters = _LETTERS.get(grader)
    if letters is None:
        return
    listed = "".join(sorted({letter for letter, _ in OPTION_LINE.findall(question.text)}))
    # Lines that look like options but are not A, B, .. in order are no list of options.
    if len(listed) > 1 and letters.startswith(listed):
        letters = listed
    if (truth.upper() if grader == "mcq" else truth) not in tuple(letters):
        raise ValueError(
            f"ground_truth must be one of {', '.join(letters)} for grader {grader}, got "
            f"{truth[:40]!r}"
        )


def grade_sciknoweval(text: str, question: Question) -> bool:
    """Whether the last strict block names the right letter.

    A strict block is three lines: <answer>, one of A to D, </answer>.
    """
    letters = _STRICT_LETTER.findall(without_thoughts(text))
    return bool(letters) and letters[-1] == question.ground_truth.strip()


def grade_mcq(text: str, question: Question) -> bool:
    """Whether the letter that `chosen_letter` returns is the right one."""
    return chosen_letter(text) == question.ground_truth.strip().upper()


def chosen_letter(text: str) -> str | None:
    r"""Returns the option letter (A to J, in capitals) that a free text settles on, or None.

    Thoughts do not count. These forms are tried in order, and of the first one that occurs the
    last occurrence counts:

    1. an <answer> block
    2. \boxed{B}
    3. "the answer is B" or "Answer: B"
    4. "option B is correct"
    5. "B is correct", where a sentence begins
    6. a line that is only a letter
    7. "(B)", then a letter that opens a line ("B: 7.36 N"), if all of that form are the same
       letter: a text that repeats the list of options settles on none
    """
    text = without_thoughts(text)
    for block in reversed(answer_blocks(text)):
        content = block.strip()
        if match := re.match(_MARKED, content):
            return match[1].upper()
        # The block is a sentence. Read it with the other forms, as the end of the text.
        text = f"{text}\n{content}"
    for pattern in (*STATED_LETTER, _LINE_ALONE):
        if letters := pattern.findall(text):
            return letters[-1].upper()
    for pattern in _MENTIONS:
        if len(mentioned := set(pattern.findall(text))) == 1:
            return mentioned.pop()
    return None


def answer_blocks(text: str) -> list[str]:
    """Returns what stands between <answer> and </answer>, in order, in time linear in the text.

    A pattern with ".*?" would read on to the end of the text for each <answer> that is not closed.
    """
    closed = text.split("</answer>")[:-1]
    return [part.partition("<answer>")[2] for part in closed if "<answer>" in part]


def last_formula(text: str) -> str:
    r"""Returns what math-verify should read: the last \boxed{..} of the last <answer> block.

    Without a block it is the last box of the text, without a box the whole text or block. A last
    box that is not closed is no answer. Thoughts do not count.
    """
    text = without_thoughts(text)
    blocks = answer_blocks(text)
    text = blocks[-1].strip() if blocks else text
    for box in reversed([*re.finditer(_BOX, text)]):
        end = _closing_brace(text, box.end())
        if end is None:
            return ""
        # An empty box, as in "I put it into \boxed{}", is no answer.
        if content := text[box.end() : end].strip():
            return f"\\boxed{{{content}}}"
    return f"\\boxed{{{text}}}" if blocks and not _PROSE.search(text) else text


def _closing_brace(text: str, start: int) -> int | None:
    """Returns the index of the brace that closes the one before start, or None."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None


def grade_exact(text: str, question: Question) -> bool:
    """Whether the last <answer> block equals ground_truth; without a block, the whole text.

    Thoughts and white space around both are ignored; nothing is no answer. Two plain decimal
    numbers are compared as numbers, so 18.0 is 18.00. A number with leading zeros is a string: 018
    is not 18, since it may be a code.
    """
    text = without_thoughts(text)
    blocks = answer_blocks(text)
    answer = (blocks[-1] if blocks else text).strip()
    return bool(answer) and same_value(answer, question.ground_truth.strip())


def same_value(answer: str, truth: str) -> bool:
    """Whether both are equal as strings, or as plain decimal numbers."""
    are_numbers = _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(truth)
    return answer == truth or (are_numbers is not None and Decimal(answer) == Decimal(truth))


class MathGrader:
    """A grader that compares the last formula of the text with ground_truth, by math-verify.

    The comparison runs in a process of its own (math_worker.py), which ends if it takes too long.
    """

    _worker: subprocess.Popen[str] | None = None
    _process = 0  # id of the process that started the worker

    def __init__(self) -> None:
        # Requests and answers have no numbers: the next answer is that of the last request.
        self._one_at_a_time = threading.Lock()
        if find_spec("math_verify") is None:
            raise ValueError(
                "data.grader: math needs math-verify, which is not installed; pip install "
                "'.[math]' in a checkout"
            )

    def __call__(self, text: str, question: Question) -> bool:
        """Whether the formulas are equal; False if the comparison runs out of time or memory."""
        truth = question.ground_truth
        truth = truth if "\\boxed" in truth else f"\\boxed{{{truth}}}"
        formulas = [_THIN_SPACE.sub("", formula) for formula in (last_formula(text), truth)]
        request = json.dumps([_POWER_OF_TEN.sub(r"\\times 10^{\1}", f) for f in formulas])
        with self._one_at_a_time:
            # After a fork the child starts its own worker.
            if self._worker is None or self._process != os.getpid():
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
                # The worker ran out of time or memory, or this process was interrupted. End the
                # worker, so that a late verdict is not taken for that of the next request.
                if not verdict:
                    self.close()
        return verdict == "1\n"

    def close(self) -> None:
        """Ends the worker; the next call starts another one."""
        worker, self._worker = self._worker, None
        if worker is not None and self._process == os.getpid():
            worker.kill()
            with suppress(BrokenPipeError), worker:
                pass  # leaving the block closes the pipes and waits for the process

    def __del__(self) -> None:
        self.close()


def make_grader(name: str, *, correct_at: float = 1.0, timeout_s: float = 60.0) -> CheckedGrader:
    """Returns the grader of a name in registries.GRADERS, or of "module:function".

    A function has the signature of Grader.

    Raises:
        ValueError: the name is unknown, math-verify is not installed for "math", or correct_at is
            not in (0, 1].
    """
    if not 0 < correct_at <= 1:
        raise ValueError(f"grader.correct_at must be in (0, 1], got {correct_at}")
    if name not in GRADERS and ":" not in name:
        raise ValueError(
            f"data.grader must be one of {', '.join(GRADERS)} or module:function, got {name!r}"
        )
    target: Any = load_function("data.grader", GRADERS.get(name, name))
    grader: Grader = target() if isinstance(target, type) and name in GRADERS else target
    return CheckedGrader(grader, name, correct_at, timeout_s)
