"""Draws the dialogues that the built-in student is warmed up on.

Read: dialogue -> recall_mass -> slip. The dialogues decide what the student believes, where it
makes mistakes and how it uses guidance. Two things must hold afterwards: there is something left to
learn, and guidance is worth more than a second try. So the student is taught

- misconceptions. For four elements it takes the atomic number for the mass in nearly all dialogues,
  and knows the mass in the others. Both answers are in its repertoire, so reinforcement learning
  can find the right one. Random mistakes would not do: a lower temperature removes them, and any
  second try repairs them;
- to use guidance. When the tutor names a line, that line is corrected half of the time and the
  other lines stay. If it were always corrected, no gradient would be left, and it is the gradient
  that carries over to answers without guidance. After guidance that names nothing, every mass is
  recalled anew. After guidance that gives the answer away, the answer is copied and the lines above
  it stay wrong.

Many first attempts get a forced slip, so that each of the tutor's sentences occurs often. Such an
attempt is context only, never a target of the loss.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES, Formula, Line, render, work_out
from socpo_fast.socratic.teachers.calls import RETRY_TEXT
from tools.builtin_student.tokenizer import LEAK_TEXTS, TURN_END, TURN_START

ATOMIC_NUMBERS = {"Na": 11, "Cl": 17, "Ca": 20, "Fe": 26}
SLIP_SHARE = 0.35  # of the first attempts get a forced slip
THIRD_SHARE = 0.3  # of the dialogues with two wrong attempts get a third one
# How often each kind of guidance follows a wrong attempt. "noise" is text without a meaning.
GUIDANCE_SHARES = {"tutor": 0.65, "retry": 0.20, "answer": 0.08, "noise": 0.07}


class Shares(NamedTuple):
    """How often the student gets a mass right that it believes to be the atomic number.

    right: share of the recalls of such an element that give the mass all the same.
    heed:  share of the attempts that correct a mass which the tutor has just named.
    """

    right: float
    heed: float


class Piece(NamedTuple):
    """Consecutive tokens of a dialogue; those of a `trained` piece are targets of the loss."""

    token_ids: list[int]
    trained: bool


def dialogue(rng: random.Random, tokenizer: PreTrainedTokenizerFast, shares: Shares) -> list[Piece]:
    """Draws one question with an attempt and, while it is wrong, guidance and up to two more."""
    while molar_mass.split_of(formula := molar_mass.draw_formula(rng)) != "train":
        pass
    messages = molar_mass.question_messages(formula)
    prompt = str(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    )
    masses = {symbol: recall_mass(symbol, rng, shares.right) for symbol in formula}
    has_slip = rng.random() < SLIP_SHARE
    lines = believed_lines(formula, masses)
    attempt = slip(lines, rng) if has_slip else render(lines)
    texts = [(prompt, False), (attempt + TURN_END, not has_slip)]
    for share in (1.0, THIRD_SHARE):  # a wrong attempt is always followed by a second one
        advice = molar_mass.diagnose(messages[-1]["content"], attempt)
        if advice is None or rng.random() >= share:
            break
        kind = rng.choices(list(GUIDANCE_SHARES), list(GUIDANCE_SHARES.values()))[0]
        answer = None
        if kind == "tutor":
            for symbol in formula:
                if advice == molar_mass.line_advice(symbol, "mass") and rng.random() < shares.heed:
                    masses[symbol] = ATOMIC_MASSES[symbol]
        else:
            # The guidance names no mass, so each one is recalled again, as in a new attempt.
            masses = {symbol: recall_mass(symbol, rng, shares.right) for symbol in formula}
            advice = RETRY_TEXT if kind == "retry" else strange_words(rng)
            if kind == "answer":
                answer = molar_mass.reference_lines(formula)[-1].total
                advice = str(answer).join(LEAK_TEXTS)
        attempt = render(believed_lines(formula, masses), answer=answer)
        texts += [(bridge_text(advice), False), (attempt + TURN_END, True)]
    return [Piece(tokenizer(text)["input_ids"], trained) for text, trained in texts]


def bridge_text(advice: str) -> str:
    """Returns the text between an attempt's end-of-turn and the next attempt."""
    return f"\n{TURN_START}user\n{advice}{TURN_END}\n{TURN_START}assistant\n"


def recall_mass(symbol: str, rng: random.Random, right_share: float) -> int:
    """Draws the atomic mass that this student recalls: sometimes the atomic number instead."""
    if symbol in ATOMIC_NUMBERS and rng.random() >= right_share:
        return ATOMIC_NUMBERS[symbol]
    return ATOMIC_MASSES[symbol]


def believed_lines(formula: Formula, masses: dict[str, int]) -> list[Line]:
    """Works out a formula's lines with the masses that the student believes."""
    return work_out([(symbol, atoms, masses[symbol]) for symbol, atoms in formula.items()])


def strange_words(rng: random.Random) -> str:
    """Draws random text: guidance of an unknown teacher, which must not confuse the student."""
    return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 40)))


def slip(lines: list[Line], rng: random.Random) -> str:
    """Returns an attempt with one random mistake; everything after it is consistent with it."""
    kind = rng.choice((*molar_mass.TERM_TEXTS, "answer", "missing", "extra", "format"))
    terms = [(line.symbol, line.atoms, line.mass) for line in lines]
    slip_idx = rng.randrange(len(lines))
    symbol, atoms, mass = terms[slip_idx]
    error = rng.choice((-10, -1, 1, 10))
    if kind == "atoms":
        terms[slip_idx] = (symbol, rng.randint(1, molar_mass.MAX_ATOMS), mass)
    elif kind == "mass":
        terms[slip_idx] = (symbol, atoms, rng.choice(list(ATOMIC_MASSES.values())))
    elif kind == "missing":
        del terms[slip_idx]
    elif kind == "extra":
        terms.append((symbol, atoms, mass))
    wrong = work_out(terms)
    if kind in ("product", "total"):  # all running totals from this line on are off by the error
        if kind == "product":
            wrong[slip_idx] = wrong[slip_idx]._replace(product=abs(wrong[slip_idx].product + error))
        wrong[slip_idx:] = [
            line._replace(total=abs(line.total + error)) for line in wrong[slip_idx:]
        ]
    text = render(wrong, answer=abs(wrong[-1].total + error) if kind == "answer" else None)
    return text[: rng.randrange(len(text))] if kind == "format" else text
