"""Which guidance gives the answer away."""

import pytest

from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.types import Question

OPTIONS = "How much?\n\nA: 2.92\nB: 7.36\nC: two newtons\nD: 3.35\nPlease reason step by step."


def leaks(guidance: str, ground_truth: str, text: str = OPTIONS) -> bool:
    return leaks_answer(
        guidance,
        Question(
            question_idx=0,
            messages=({"role": "user", "content": text},),
            ground_truth=ground_truth,
            data_source="test",
        ),
    )


@pytest.mark.parametrize(
    ("guidance", "truth", "leak"),
    [
        ("The answer is B.", "B", True),
        ("Option B is correct.", "B", True),
        ("You should choose option B instead.", "B", True),
        ("The correct one is (B)", "B", True),
        ("<answer>\nB\n</answer> The answer: B", "B", True),
        ("Your sum should give 7.360 in the end.", "B", True),
        ("It comes to Two  Newtons.", "C", True),
        ("Rule out A, then the answer is not B.", "C", False),
        ("Look at option B again: which force acts?", "B", False),
        ("A force needs a direction. Choose A sign first.", "A", False),
        ("Compare 2.92, 7.36, two newtons and 3.35 by size.", "B", False),
        ("Is 17.36 plausible?", "B", False),
        ("Check the unit of the mass.", "B", False),
    ],
)
def test_multiple_choice(guidance: str, truth: str, leak: bool) -> None:
    assert leaks(guidance, truth) is leak


@pytest.mark.parametrize(
    ("guidance", "leak"),
    [
        ("The mass is 18.02.", True),
        ("The mass is 18.020 g.", True),
        ("The mass is 18.021.", False),
        ("Recheck the line of oxygen.", False),
    ],
)
def test_value(guidance: str, leak: bool) -> None:
    assert leaks(guidance, "18.02", "Molar mass of H2O?") is leak


def test_a_value_that_the_question_gives_must_be_called_the_answer() -> None:
    text = "How many of the 4 apples are red?"
    assert not leaks("Go through the 4 apples one by one.", "4", text)
    assert leaks("The answer is 4.", "4", text)


def test_a_letter_that_is_no_option_is_a_value() -> None:
    assert leaks("The element is C.", "C", "Which element has six protons?")
