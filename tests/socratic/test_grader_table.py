"""Graders on the rows of tests/helpers/{grader,math}_table.py, and in linear time on any text."""

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socpo_fast.socratic.graders import (
    OPTION_LINE,
    CheckedGrader,
    answer_blocks,
    chosen_letter,
    last_formula,
    make_grader,
)
from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.socratic.thoughts import without_thoughts
from socpo_fast.types import Question
from tests.helpers import grader_table as table
from tests.helpers.math_table import MATH, MATH_MISSES


def question(ground_truth: str, text: str = "?") -> Question:
    return Question(
        question_idx=0,
        messages=({"role": "user", "content": text},),
        ground_truth=ground_truth,
        data_source="test",
    )


@pytest.fixture(scope="module")
def math() -> CheckedGrader:
    """One worker for all rows."""
    pytest.importorskip("math_verify")
    return make_grader("math")


@pytest.mark.parametrize(("answer", "truth", "is_correct"), MATH)
def test_math_rows(math: CheckedGrader, answer: str, truth: str, is_correct: bool) -> None:
    assert math(answer, question(truth)) is is_correct


@pytest.mark.parametrize(("answer", "truth", "is_correct"), MATH_MISSES)
def test_math_known_misses(math: CheckedGrader, answer: str, truth: str, is_correct: bool) -> None:
    assert math(answer, question(truth)) is not is_correct, "mended; move the row to MATH"


@pytest.mark.parametrize(("answer", "letter"), table.MCQ)
def test_mcq_rows(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter
    assert make_grader("mcq")(answer, question("B")) is (letter == "B")


@pytest.mark.parametrize(("answer", "letter"), table.MCQ_MISSES)
def test_mcq_known_misses(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) != letter, "mended; move the row to MCQ"


@pytest.mark.parametrize(
    ("grader", "answer", "truth", "is_correct"),
    [("exact", *row) for row in table.EXACT] + [("sciknoweval", *row) for row in table.SCIKNOWEVAL],
)
def test_exact_rows(grader: str, answer: str, truth: str, is_correct: bool) -> None:
    assert make_grader(grader)(answer, question(truth)) is is_correct


OLD_BLOCKS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "<", "a", "\n", "/"])).map("".join))
def test_answer_blocks_equal_the_pattern(text: str) -> None:
    assert answer_blocks(text) == OLD_BLOCKS.findall(text)


FILLERS = [
    *("\n", " ", "\t", "_", "*", "(", "$", "{", "\\", "~", "A", "A ", "A)", "A) \n", "1", "1,"),
    *("<answer>", "</answer>", "<think>", "</think>", "[THINK]", "\\boxed{", "\\boxed{}", "\\("),
    *("\\text{", "B or ", "answer ", "answer is ", "correct ", "option ", "choice: ", "so "),
    *("\u7b54\u6848", "not (", "e1", "1e1 ", "1 a/", "is correct ", "choose ", "- ", "x "),
]
OPTIONS = question("B", "Which?\nA) one\nB) two words\nC) 3")
READERS: dict[str, Callable[[str], object]] = {
    "chosen_letter": chosen_letter,
    "last_formula": last_formula,
    "without_thoughts": without_thoughts,
    "sciknoweval": lambda text: make_grader("sciknoweval")(text, OPTIONS),
    "exact": lambda text: make_grader("exact")(text, OPTIONS),
    "options": OPTION_LINE.findall,
    "leak of an option": lambda text: leaks_answer(text, OPTIONS),
    "leak of a value": lambda text: leaks_answer(text, question("4", "4?")),
    "leak of words": lambda text: leaks_answer(text, question("a b c")),
}


def fastest_s(read: Callable[[str], object], text: str) -> float:
    """Returns the shortest of three times."""
    times = []
    for _ in range(3):
        started = time.process_time()
        read(text)
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("name", READERS)
def test_ten_times_the_text_takes_ten_times(name: str) -> None:
    """A short time counts as 8 ms, so that noise is no failure; a square of 20,000 is seconds."""
    slow = []
    for filler in FILLERS:
        for opening in ("", "A) x" if name == "options" else "The answer is "):
            short, long = (opening + filler * (n // len(filler)) + "x" for n in (2_000, 20_000))
            if fastest_s(READERS[name], long) > 15 * max(fastest_s(READERS[name], short), 0.008):
                slow.append((opening, filler))
    assert not slow
