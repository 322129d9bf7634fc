"""The dialogues that the built-in student is warmed up on.

They say what it believes, where it slips and how it takes guidance. Read: dialogue -> recall_mass
-> slip. The student must leave something to learn, and guidance must be worth more than a second
try. So it is taught
- misconceptions: of four elements it takes the atomic number for the mass in nearly all dialogues
  and knows the mass in the rest. Both are in its repertoire, so reinforcement learning can find the
  right one. Slips at random would not do: a lower temperature removes them and any second try
  repairs them;
- to use guidance: when the tutor names a line, that line is put right half of the time and the
  others stay. What is certain with help has no gradient left, and it is the gradient that carries
  over to answers without help. After words that name nothing, every mass is recalled afresh; after
  words that give the answer away, the answer is copied and the lines above it stay wrong.
Many first attempts get a slip by force, so that each of the tutor's sentences is met often; such an
attempt is context only, never a target.
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
SLIP_SHARE = 0.35  # of the first attempts
THIRD_SHARE = 0.3  # of the dialogues with two wrong attempts get a third one
GUIDANCE_SHARES = {"tutor": 0.65, "retry": 0.20, "answer": 0.08, "noise": 0.07}


class Shares(NamedTuple):
    """How often what the student holds wrong becomes right.

    right: of the recalls in which such an element gets its mass all the same.
    heed:  of the attempts in which a mass that the tutor has just named becomes right.
    """

    right: float
    heed: float


class Piece(NamedTuple):
    """Consecutive tokens of a dialogue; those of a `trained` piece are targets of the loss."""

    token_ids: list[int]
    trained: bool


def dialogue(rng: random.Random, tokenizer: PreTrainedTokenizerFast, shares: Shares) -> list[Piece]:
    """One question with one attempt or, while they are wrong, guidance and up to two more."""
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
    for share in (1.0, THIRD_SHARE):
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
            masses = {symbol: recall_mass(symbol, rng, shares.right) for symbol in formula}
            advice = RETRY_TEXT if kind == "retry" else strange_words(rng)
            if kind == "answer":
                answer = molar_mass.reference_lines(formula)[-1].total
                advice = str(answer).join(LEAK_TEXTS)
        attempt = render(believed_lines(formula, masses), answer=answer)
        texts += [(bridge_text(advice), False), (attempt + TURN_END, True)]
    return [Piece(tokenizer(text)["input_ids"], trained) for text, trained in texts]


def bridge_text(advice: str) -> str:
    """What stands between an attempt's end-of-turn and the next attempt."""
    return f"\n{TURN_START}user\n{advice}{TURN_END}\n{TURN_START}assistant\n"


def recall_mass(symbol: str, rng: random.Random, right_share: float) -> int:
    """The atomic mass as this student has it, this time."""
    if symbol in ATOMIC_NUMBERS and rng.random() >= right_share:
        return ATOMIC_NUMBERS[symbol]
    return ATOMIC_MASSES[symbol]


def believed_lines(formula: Formula, masses: dict[str, int]) -> list[Line]:
    return work_out([(symbol, atoms, masses[symbol]) for symbol, atoms in formula.items()])


def strange_words(rng: random.Random) -> str:
    """Other teachers' words mean nothing to this student, and must not throw it off either."""
    return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 40)))


def slip(lines: list[Line], rng: random.Random) -> str:
    """The text of an attempt that goes wrong at one random place and is consistent behind it."""
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
    if kind in ("product", "total"):
        if kind == "product":
            wrong[slip_idx] = wrong[slip_idx]._replace(product=abs(wrong[slip_idx].product + error))
        wrong[slip_idx:] = [
            line._replace(total=abs(line.total + error)) for line in wrong[slip_idx:]
        ]
    text = render(wrong, answer=abs(wrong[-1].total + error) if kind == "answer" else None)
    return text[: rng.randrange(len(text))] if kind == "format" else text
