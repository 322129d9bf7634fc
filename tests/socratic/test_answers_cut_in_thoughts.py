"""Thoughts are no answer, for any grader, whether they are closed or cut."""

from collections.abc import Iterator
from functools import cache

import pytest

from socpo_fast.socratic.graders import check_ground_truth, make_grader
from socpo_fast.socratic.thoughts import without_thoughts
from socpo_fast.types import Question

ANSWERS = {
    "mcq": "The answer is B.",
    "exact": "<answer>B</answer>",
    "math": "\\boxed{B}",
    "sciknoweval": "<answer>\nB\n</answer>",
}
MARKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ('<Thinking budget="low">', "</ THINKING >"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
]


def question_of(ground_truth: str) -> Question:
    return Question(
        question_idx=0,
        messages=({"role": "user", "content": "?"},),
        ground_truth=ground_truth,
        data_source="test",
    )


make_once = cache(make_grader)  # one worker for all answers in mathematics


@pytest.fixture(scope="module", autouse=True)
def graders_end_with_the_module() -> Iterator[None]:
    yield
    make_once.cache_clear()


def verdict(grader: str, text: str) -> bool:
    if grader == "math":
        pytest.importorskip("math_verify")
    return bool(make_once(grader)(text, question_of("B")))


@pytest.mark.parametrize("grader", ANSWERS)
def test_only_what_follows_the_thoughts_counts(grader: str) -> None:
    answer = ANSWERS[grader]
    wrong = answer.replace("B", "C")
    assert verdict(grader, answer)
    assert verdict(grader, f"<think>{wrong}</think>\n\n{answer}")
    assert verdict(grader, f"The prompt opened them: {wrong}</think>\n\n{answer}")
    assert not verdict(grader, f"<think>{answer}")
    assert not verdict(grader, f"<think>{answer}</think>")
    assert not verdict(grader, f"{answer}</think>\nIt is unclear.")
    assert not verdict(grader, f"<think>{answer}</think>{wrong}")


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_every_mark_of_thoughts(opening: str, closing: str) -> None:
    assert without_thoughts(f"a{opening}b{closing}c") == "ac"
    assert without_thoughts(f"b{closing}c") == "c"
    assert without_thoughts(f"a{opening}b") == ""
    assert without_thoughts(f"{opening}b{opening}b{closing}b{closing}c") == "c"
    assert without_thoughts("<reasoning>a</reasoning>c") == "<reasoning>a</reasoning>c"


@pytest.mark.parametrize("grader", ANSWERS)
def test_nothing_earns_nothing(grader: str) -> None:
    assert not any(verdict(grader, text) for text in ("", " \n", "<answer></answer>", "<think>"))


NO_FORMULA = ["", " ", "$$", "\\frac{1}{", "1}", "}{", "\\[\\]", "\\boxed{}", "\\boxed{4", "{}"]
NO_FORMULA += ["''", '"', "\\$", "\\!", "\\displaystyle", "$\\boxed{\\text{}}$", "\\text{ }"]


@pytest.mark.parametrize("truth", NO_FORMULA)
def test_a_broken_formula_is_a_bad_truth(truth: str) -> None:
    with pytest.raises(ValueError, match="ground_truth must be a formula with paired braces"):
        check_ground_truth("math", question_of(truth))


FORMULAS = ["\\{1,2\\}", "\\{\\}", "\\left\\{1\\right.", "$\\frac{1}{2}$", "(0,1]", "-5"]
FORMULAS += ["\\boxed{4}", "\\emptyset"]
# math-verify cannot read these as mathematics. It compares them as strings.
WORDS = ["no solution", "\\text{Monday}", "\\foo{3}", "\\frac{1}{0}", "x^", "3+", "?", "A"]


@pytest.mark.parametrize("truth", FORMULAS + WORDS)
def test_what_is_accepted_can_be_answered(truth: str) -> None:
    pytest.importorskip("math_verify")
    check_ground_truth("math", question_of(truth))
    answer = truth if "boxed" in truth else f"\\boxed{{{truth}}}"
    assert make_grader("math")(f"It is {answer}.", question_of(truth))


@pytest.mark.parametrize("grader", ["exact", "math"])
@pytest.mark.parametrize("truth", ["<answer>4</answer>", "<think>2 + 2</think>4", "4</think>"])
def test_a_truth_has_no_marks(grader: str, truth: str) -> None:
    """They are left out of every answer, so no answer would be equal to it."""
    with pytest.raises(ValueError, match="ground_truth must be the answer alone, without <answer>"):
        check_ground_truth(grader, question_of(truth))
    check_ground_truth("package:function", question_of(truth))
