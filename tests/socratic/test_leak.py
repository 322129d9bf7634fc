"""Guidance that gives the answer away, and what teacher.on_leak does about it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socpo_fast.report.summary import summarize
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.leak import leaks_answer, mask_answer
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import RuleTeacher
from socpo_fast.types import Question, Rollout
from tests.helpers.episodes import bridges, shown
from tests.helpers.scripted import BRIDGE, END, PARAMS, TOKENIZER, ScriptedEngine, encode

OPTIONS = "How much?\n\nA: 2.92\nB: 7.36\nC: two newtons\nD: 3.35\nPlease reason step by step."


def question_of(ground_truth: str, text: str = OPTIONS) -> Question:
    messages = ({"role": "user", "content": text},)
    return Question(
        question_idx=0, messages=messages, ground_truth=ground_truth, data_source="test"
    )


def leaks(guidance: str, ground_truth: str, text: str = OPTIONS) -> bool:
    return leaks_answer(guidance, question_of(ground_truth, text))


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
def test_leaks_of_multiple_choice(guidance: str, truth: str, leak: bool) -> None:
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
def test_leaks_of_a_value(guidance: str, leak: bool) -> None:
    assert leaks(guidance, "18.02", "Molar mass of H2O?") is leak


def test_value_of_the_question_leaks_only_as_answer() -> None:
    text = "How many of the 4 apples are red?"
    assert not leaks("Go through the 4 apples one by one.", "4", text)
    assert leaks("The answer is 4.", "4", text)


def test_a_letter_that_is_no_option_is_a_value() -> None:
    assert leaks("The element is C.", "C", "Which element has six protons?")


def test_a_small_letter_is_the_letter_too() -> None:
    assert leaks("The answer is B.", "b")  # the mcq grader accepts small letters


@pytest.mark.parametrize(
    ("guidance", "truth", "masked"),
    [
        ("The answer is B.", "B", "The answer is [...]."),
        ("Choose option B: 7.36 N, not 2.92.", "B", "Choose option [...]: [...] N, not 2.92."),
        ("It comes to Two  Newtons. two newtons!", "C", "It comes to [...]. [...]!"),
        (
            "Compare 2.92, 7.36, two newtons and 3.35.",
            "B",
            "Compare 2.92, 7.36, two newtons and 3.35.",
        ),
        ("Add 7.36 and 1.", "D", "Add 7.36 and 1."),
        ("Sum it: 18.020 g, so 18.02.", "18.02", "Sum it: [...] g, so [...]."),
        ("Use ... here", "...", "Use  here"),
    ],
)
def test_masking(guidance: str, truth: str, masked: str) -> None:
    assert mask_answer(guidance, question_of(truth)) == masked


def test_masking_leaves_what_the_question_gives() -> None:
    question = question_of("4", "How many of the 4 apples are red?")
    assert (
        mask_answer("Of 4 apples: the answer is 4.", question)
        == "Of 4 apples: the answer is [...]."
    )


@pytest.mark.parametrize("symbol", [".", "...", "[", "]", "*"])
def test_masking_an_option_without_a_word_ends(symbol: str) -> None:
    """If the mask "[...]" contained the answer that it covers, masking would never end."""
    question = question_of("A", f"Which is right?\nA) {symbol}\nB) word\nC) ;")
    for guidance in (f"Use {symbol} here", "The answer is A."):
        masked = mask_answer(guidance, question)
        assert not leaks_answer(masked, question)
        assert len(masked) < len(guidance)


PARTS = [
    "The answer is ",
    "option ",
    "B",
    "C",
    "7.36",
    "7.360",
    "two newtons",
    "(",
    ")",
    ". ",
    " is correct",
    "\n",
    "[...]",
]


@settings(max_examples=300, deadline=None)
@given(
    guidance=st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=9).map("".join),
    truth=st.sampled_from(["B", "C", "b", "7.36", "two newtons", "4", "...", "[", ".", "", "x"]),
    text=st.sampled_from([OPTIONS, "How many of the 4 apples? 7.36"]),
)
def test_masked_text_does_not_leak(guidance: str, truth: str, text: str) -> None:
    question = question_of(truth, text)
    masked = mask_answer(guidance, question)
    assert not leaks_answer(masked, question)
    assert (masked == guidance) == (not leaks_answer(guidance, question))


def roll(
    on_leak: str, *, guidance: str = "Sum again. The answer is B.", limit: int = 50
) -> tuple[Rollout, dict]:
    """Returns a rollout whose answers are wrong, and the metrics of its batch."""
    engine = ScriptedEngine({(0, 0): [[*encode("no"), END]] * 2})
    question = question_of("B")
    (rollout,) = socratic_rollouts(
        engine,
        TOKENIZER,
        [question],
        teacher=RuleTeacher(lambda _request: guidance),
        grader=lambda _text, _question: False,
        params=PARAMS,
        options=RolloutOptions(group_size=1, max_attempts=2, guidance_limit=limit, on_leak=on_leak),
    )
    assert not engine.pinned
    return rollout, summarize([rollout], [])


@pytest.mark.parametrize(
    ("on_leak", "expected", "reason"),
    [
        ("keep", ["Sum again. The answer is B."], "max_attempts"),
        ("mask", ["Sum again. The answer is [...]."], "max_attempts"),
        ("drop", [], "leaked"),
    ],
)
def test_on_leak(on_leak: str, expected: list[str], reason: str) -> None:
    rollout, metrics = roll(on_leak)
    assert (shown(rollout), rollout.end_reason) == (expected, reason)
    assert len(rollout.turns) == 1 + len(expected)
    assert bridges(rollout) == [BRIDGE.bridge_ids(text, ended=True) for text in expected]
    assert rollout.turns[0].guidance.raw_text == "Sum again. The answer is B.", "shown or not"
    assert metrics["guidance/leak_rate"] == 1.0, "leaks count whether shown or not"
    assert metrics["guidance/leaked"] == float(on_leak == "drop")
    assert metrics["guidance/failed"] == 0.0


@pytest.mark.parametrize("on_leak", ["keep", "mask", "drop"])
def test_guidance_that_leaks_nothing_is_shown(on_leak: str) -> None:
    rollout, metrics = roll(on_leak, guidance="Sum again.")
    assert (shown(rollout), rollout.end_reason) == (["Sum again."], "max_attempts")
    assert rollout.turns[0].guidance.raw_text == "Sum again."
    assert metrics["guidance/leak_rate"] == metrics["guidance/leaked"] == 0.0


def test_masked_text_is_checked_again_after_the_cut() -> None:
    """A text that names all four options does not leak one of them.

    The mask is longer than the letter, so it pushes the fourth option over the limit. The three
    that stay leak the answer, and it must be masked as well.
    """
    guidance = "The answer is B. Compare 2.92, 7.36, two newtons, 3.35"
    rollout, _ = roll("mask", guidance=guidance, limit=len(encode(guidance)))
    assert "two newtons" in shown(rollout)[0]
    assert "3.35" not in shown(rollout)[0]
    assert "7.36" not in shown(rollout)[0]


def test_masking_and_leaks_respect_the_limit() -> None:
    limit = len(encode("Sum again. The answer is B."))
    rollout, _ = roll("mask", limit=limit)
    assert shown(rollout)[0].startswith("Sum again. The answer is [.")
    assert len(encode(shown(rollout)[0])) <= limit
    rollout, metrics = roll("drop", limit=len(encode("Sum again.")))
    assert (shown(rollout), rollout.end_reason) == (["Sum again."], "max_attempts")
    assert metrics["guidance/leak_rate"] == 0.0
