"""Thoughts are no answer, for any grader, whether they are closed or cut."""

from collections.abc import Iterator
from functools import cache

import pytest

from socpo_fast.socratic.graders import check_ground_truth, make_grader, without_thoughts
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


@pytest.mark.parametrize("truth", [" ", "$$", "\\frac{1}{", "1}", "}{", "\\[\\]"])
def test_a_broken_formula_is_a_bad_truth(truth: str) -> None:
    with pytest.raises(ValueError, match="ground_truth must be a formula with paired braces"):
        check_ground_truth("math", question_of(truth))


@pytest.mark.parametrize(
    "truth", ["\\{1,2\\}", "\\left\\{1\\right.", "$\\frac{1}{2}$", "(0,1]", "-5"]
)
def test_a_formula_is_a_truth(truth: str) -> None:
    check_ground_truth("math", question_of(truth))
