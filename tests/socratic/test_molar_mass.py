"""The built-in task: its questions, the tutor on mistakes and on garbage, the shipped student."""

from __future__ import annotations

import random
import re
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from socpo_fast.model import load_student, packed_forward
from socpo_fast.ops import visible_until_of_sequences
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.graders import make_grader
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.tasks.molar_mass import render, work_out
from socpo_fast.socratic.teachers.calls import RETRY_TEXT
from socpo_fast.types import GuidanceRequest, RolloutKey
from tools.builtin_student import dialogues, probe, warm_up

FORMULA = {"H": 3, "Na": 1, "S": 2}
TERMS = [(symbol, atoms, molar_mass.ATOMIC_MASSES[symbol]) for symbol, atoms in FORMULA.items()]
QUESTION_TEXT = molar_mass.question_messages(FORMULA)[-1]["content"]


def ask(student_answer: str, question: str = QUESTION_TEXT) -> str | None:
    return molar_mass.diagnose(question, student_answer)


def test_questions_are_seeded_and_distinct() -> None:
    questions = molar_mass.questions(3, 500)
    assert questions == molar_mass.questions(3, 500)
    assert questions[:100] == molar_mass.questions(3, 100)
    assert questions != molar_mass.questions(4, 500)
    assert len({question.text for question in questions}) == 500
    assert [question.question_idx for question in questions] == list(range(500))


def test_splits_share_no_formula() -> None:
    train = {
        question.text for seed in range(3) for question in molar_mass.questions(seed, 3000, "train")
    }
    evaluation = {
        question.text for seed in range(3) for question in molar_mass.questions(seed, 1000, "eval")
    }
    assert train and evaluation and train.isdisjoint(evaluation)


@pytest.mark.parametrize(("n", "split"), [(-1, "train"), (20_001, "train"), (1, "test")])
def test_questions_refuse(n: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"molar_mass.questions: (n|split) must be"):
        molar_mass.questions(0, n, split)  # type: ignore[arg-type]


def test_reference_solution_is_graded_correct() -> None:
    grade = make_grader("exact")
    for question in molar_mass.questions(0, 200) + molar_mass.questions(0, 200, "eval"):
        assert question.reference_solution is not None
        assert grade(question.reference_solution, question)
        assert ask(question.reference_solution, question.text) is None
        mass = sum(
            molar_mass.ATOMIC_MASSES[symbol] * atoms
            for symbol, atoms in molar_mass.parse_formula(question.text).items()
        )
        assert int(question.ground_truth) == mass < 1000


def test_known_molar_mass() -> None:
    lines = work_out([("C", 2, 12), ("H", 6, 1), ("O", 1, 16)])  # ethanol, 46 g/mol
    assert render(lines) == (
        "<reasoning>\nC: 2 x 12 = 24, sum 24\nH: 6 x 1 = 6, sum 30\nO: 1 x 16 = 16, sum 46\n"
        "</reasoning>\n<answer>\n46\n</answer>"
    )


def planted(line_idx: int, **changes: int) -> str:
    """Returns the right attempt with one line changed, and later sums that follow from it."""
    lines = work_out(TERMS)
    shift = changes.get("total", lines[line_idx].total) - lines[line_idx].total
    lines[line_idx] = lines[line_idx]._replace(**changes)
    lines[line_idx + 1 :] = [
        line._replace(total=line.total + shift) for line in lines[line_idx + 1 :]
    ]
    return render(lines)


MISTAKES = {
    "atoms": (
        render(work_out([TERMS[0], ("Na", 2, 23), TERMS[2]])),
        molar_mass.line_advice("Na", "atoms"),
    ),
    "mass": (render(work_out([*TERMS[:2], ("S", 2, 16)])), molar_mass.line_advice("S", "mass")),
    "two masses": (
        render(work_out([TERMS[0], ("Na", 1, 11), ("S", 2, 16)])),
        molar_mass.line_advice("Na", "mass"),
    ),
    "product": (planted(2, product=65, total=91), molar_mass.line_advice("S", "product")),
    "total": (planted(1, total=27), molar_mass.line_advice("Na", "total")),
    "answer": (render(work_out(TERMS), answer=91), molar_mass.ANSWER_TEXT),
    "first missing": (render(work_out(TERMS[1:])), "H".join(molar_mass.MISSING_TEXTS)),
    "last missing": (render(work_out(TERMS[:2])), "S".join(molar_mass.MISSING_TEXTS)),
    "swapped": (
        render(work_out([TERMS[1], TERMS[0], TERMS[2]])),
        "H".join(molar_mass.MISSING_TEXTS),
    ),
    "extra": (render(work_out([*TERMS, ("O", 1, 16)])), "S".join(molar_mass.EXTRA_TEXTS)),
    "unreadable line": (render(work_out(TERMS)).replace(" x ", " * ", 1), molar_mass.FORMAT_TEXT),
    "cut": (render(work_out(TERMS))[:-12], molar_mass.FORMAT_TEXT),
    "two answers": (render(work_out(TERMS)) + "\n<answer>\n0\n</answer>", molar_mass.FORMAT_TEXT),
    "leading zero": (
        render(work_out(TERMS)).replace("<answer>\n", "<answer>\n0"),
        molar_mass.FORMAT_TEXT,
    ),
    "empty": ("", molar_mass.FORMAT_TEXT),
}


@pytest.mark.parametrize(("attempt", "advice"), MISTAKES.values(), ids=MISTAKES.keys())
def test_tutor_names_the_planted_mistake(attempt: str, advice: str) -> None:
    assert ask(attempt) == advice


def test_tutor_reads_question_and_answer() -> None:
    attempt, advice = MISTAKES["mass"]
    request = GuidanceRequest(
        question=QUESTION_TEXT, student_answer=attempt, ground_truth=None, reference_solution=None,
        key=RolloutKey(0, 0), rollout_idx=0, attempt_idx=0,
    )  # fmt: skip
    assert molar_mass.tutor(request) == advice


def test_tutor_says_no_number() -> None:
    rng = random.Random(0)
    advices = {advice for attempt, advice in MISTAKES.values()}
    for _ in range(500):
        formula = molar_mass.draw_formula(rng)
        lines = dialogues.believed_lines(
            formula, {symbol: dialogues.recall_mass(symbol, rng, 0.1) for symbol in formula}
        )
        advices.add(
            ask(dialogues.slip(lines, rng), molar_mass.question_messages(formula)[-1]["content"])
            or ""
        )
    assert len(advices) > 50
    assert not any(re.search(r"\d", advice) for advice in advices)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_tutor_reads_any_text(data: st.DataObject) -> None:
    """Garbage, alone or spliced into a right attempt, gets advice unless nothing changed."""
    right = render(work_out(TERMS))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(right))] * 2)))
    garbage = data.draw(
        st.text(max_size=40) | st.text("0123456789\n HNaSx=,:</>answer", max_size=40)
    )
    assert ask(garbage) == molar_mass.FORMAT_TEXT
    attempt = right[:start] + garbage + right[end:]
    advice = ask(attempt)
    assert (advice is None) == (attempt.strip() == right) and advice != ""


@pytest.mark.parametrize(
    "question",
    [
        "",
        "What is 1 + 1?",
        "H2O".join(molar_mass.USER_TEXTS) + " ",
        "X2".join(molar_mass.USER_TEXTS),
    ],
)
def test_tutor_refuses_other_questions(question: str) -> None:
    with pytest.raises(ValueError, match="molar_mass: question must be"):
        ask(render(work_out(TERMS)), question)


@pytest.mark.slow
def test_warm_up_is_seeded() -> None:
    """Two tiny warm-ups give the same weights, and only assistant tokens are targets."""
    first, tokenizer = warm_up.make_student(seed=5, num_updates=2, num_calibrating=4)
    second, _ = warm_up.make_student(seed=5, num_updates=2, num_calibrating=4)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    rng = random.Random(0)
    for _ in range(50):
        pieces = dialogues.dialogue(rng, tokenizer, warm_up.LEARNT)
        assert len(pieces) in (2, 4, 6) and not any(piece.trained for piece in pieces[::2])
        assert sum(len(piece.token_ids) for piece in pieces) < 350
        assert all(piece.token_ids[-1] == tokenizer.eos_token_id for piece in pieces[1::2])
        assert all(tokenizer.unk_token_id not in piece.token_ids for piece in pieces)


def test_shipped_student_is_right_only_after_the_tutor() -> None:
    """An atomic mass that it has wrong is right at most once in a thousand first attempts.

    After the tutor's advice it is right about half of the time; after a fixed sentence it is right
    as rarely as before.
    """
    student = load_student(molar_mass.STUDENT_DIR)
    tokenizer = load_tokenizer(molar_mass.STUDENT_DIR)
    for symbol in dialogues.ATOMIC_NUMBERS:
        shares = {
            name: mean(values)
            for name, values in probe.right_shares(student, tokenizer, symbol).items()
        }
        assert 0 < shares["alone"] <= 0.001, (symbol, shares)
        assert 0.4 <= shares["tutor"] <= 0.51, (symbol, shares)
        assert shares["sentence"] <= 0.001, (symbol, shares)


def test_shipped_student() -> None:
    """It is a complete Hugging Face folder, and transformers computes the same logits."""
    folder = molar_mass.STUDENT_DIR
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 10**6
    student = load_student(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        student.config.vocab_size == len(tokenizer)
        and student.config.architecture == "LlamaForCausalLM"
    )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    bridge = Bridge(tokenizer, guidance_limit=64)
    assert bridge.eos_ids == (tokenizer.eos_token_id,) and not bridge.notes
    question = molar_mass.questions(0, 1, "eval")[0]
    prompt_ids = bridge.prompt_ids(list(question.messages))
    assert len(prompt_ids) < 30 and tokenizer.unk_token_id not in prompt_ids
    assert len(tokenizer(RETRY_TEXT)["input_ids"]) == 1
    assert (
        tokenizer.decode(tokenizer(question.reference_solution)["input_ids"])
        == question.reference_solution
    )
    assert len(tokenizer("<|im_end|>", split_special_tokens=True)["input_ids"]) == len("<|im_end|>")

    token_ids = torch.tensor(prompt_ids)
    until = visible_until_of_sequences([len(prompt_ids)])
    hidden = packed_forward(student, token_ids, torch.arange(len(token_ids)), until)
    logits = student.lm_head(hidden)
    expected = AutoModelForCausalLM.from_pretrained(folder)(token_ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
