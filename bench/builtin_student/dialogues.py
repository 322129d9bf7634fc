"""The dialogues that the built-in student is warmed up on.

They say what it believes, where it slips and how it takes guidance. Read: dialogue -> recall_mass
-> slip. The student must leave something to learn, and guidance must be worth more than a second
try. So it is taught
- misconceptions: of eight elements it takes the atomic number for the mass in most dialogues and
  knows the mass in the rest. Both are in its repertoire, so reinforcement learning can find the
  right one. Slips at random would not do: a lower temperature removes them and any second try
  repairs them;
- to use guidance: when the tutor names a line, that line is put right (most of the time) and the
  others stay; after words that name nothing, every mass is recalled afresh. Many first attempts get
  a slip by force, so that each of the tutor's sentences is met often; such an attempt is context
  only, never a target.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from bench.builtin_student.tokenizer import TURN_END, TURN_START
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES, Formula, Line, render, work_out
from socpo_fast.socratic.teachers.calls import RETRY_TEXT

ATOMIC_NUMBERS = {"Na": 11, "Mg": 12, "P": 15, "S": 16, "Cl": 17, "K": 19, "Ca": 20, "Fe": 26}
RIGHT_SHARE = 0.1  # of the recalls in which such an element gets its mass all the same
SLIP_SHARE = 0.35  # of the first attempts
HEED_SHARE = 0.85  # of the second attempts in which a mass that the tutor named becomes right
GUIDANCE_SHARES = {"tutor": 0.70, "retry": 0.22, "noise": 0.08}


class Piece(NamedTuple):
    """Consecutive tokens of a dialogue; those of a `trained` piece are targets of the loss."""

    token_ids: list[int]
    trained: bool


def dialogue(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[Piece]:
    """One question with one attempt or, when that is wrong, guidance and a second one."""
    while molar_mass.split_of(formula := molar_mass.draw_formula(rng)) != "train":
        pass
    messages = molar_mass.question_messages(formula)
    prompt = str(
        tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    )
    lines = believed_lines(formula, {symbol: recall_mass(symbol, rng) for symbol in formula})
    has_slip = rng.random() < SLIP_SHARE
    attempt = slip(lines, rng) if has_slip else render(lines)
    texts = [(prompt, False), (attempt + TURN_END, not has_slip)]
    advice = molar_mass.diagnose(messages[-1]["content"], attempt)
    if advice is not None:
        kind = rng.choices(list(GUIDANCE_SHARES), list(GUIDANCE_SHARES.values()))[0]
        if kind == "tutor":
            masses = {line.symbol: line.mass for line in lines}
            for symbol in formula:
                if advice == molar_mass.line_advice(symbol, "mass") and rng.random() < HEED_SHARE:
                    masses[symbol] = ATOMIC_MASSES[symbol]
        else:
            advice = RETRY_TEXT if kind == "retry" else strange_words(rng)
            masses = {symbol: recall_mass(symbol, rng) for symbol in formula}
        bridge = f"\n{TURN_START}user\n{advice}{TURN_END}\n{TURN_START}assistant\n"
        texts += [(bridge, False), (render(believed_lines(formula, masses)) + TURN_END, True)]
    return [Piece(tokenizer(text)["input_ids"], trained) for text, trained in texts]


def recall_mass(symbol: str, rng: random.Random) -> int:
    """The atomic mass as this student has it, this time."""
    if symbol in ATOMIC_NUMBERS and rng.random() >= RIGHT_SHARE:
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
