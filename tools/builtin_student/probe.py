"""How often the built-in student has a mass right: alone, after the tutor's word, after others'.

    python -m tools.builtin_student.probe [--student FOLDER]

The probability of the right mass, read off the student's own distribution at temperature 1 with the
right lines before it (teacher forcing), so that nothing is sampled and a share of one in a thousand
is known exactly. One row for each element that the student holds wrong: mean over formulas, least
and greatest.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from transformers import PreTrainedTokenizerFast

from socpo_fast.model import Decoder, load_student, packed_forward
from socpo_fast.ops import visible_until_of_sequences
from socpo_fast.socratic.bridge import load_tokenizer
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES, STUDENT_DIR, Formula, render
from socpo_fast.socratic.teachers.calls import RETRY_TEXT
from tools.builtin_student.dialogues import ATOMIC_NUMBERS, believed_lines, bridge_text
from tools.builtin_student.tokenizer import TURN_END

NUM_FORMULAS = 12


def right_shares(
    student: Decoder, tokenizer: PreTrainedTokenizerFast, symbol: str, seed: int = 0
) -> dict[str, list[float]]:
    """Returns the probability of `symbol`'s right mass for each formula, by what came before:
    "alone", "tutor" or "sentence" (the last two after an attempt that had it wrong)."""
    shares: dict[str, list[float]] = {"alone": [], "tutor": [], "sentence": []}
    for formula in formulas_with(symbol, random.Random(seed)):
        prompt = str(
            tokenizer.apply_chat_template(
                list(molar_mass.question_messages(formula)),
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        right = render(molar_mass.reference_lines(formula))
        before = right[: right.index(f"{symbol}: ")] + f"{symbol}: {formula[symbol]} x "
        mass = f"{ATOMIC_MASSES[symbol]} = "  # with what ends it: 23 is not the start of 230
        believed = ATOMIC_MASSES | ATOMIC_NUMBERS
        wrong = render(believed_lines(formula, {other: believed[other] for other in formula}))
        shares["alone"].append(probability(student, tokenizer, prompt + before, mass))
        for name, words in (
            ("tutor", molar_mass.line_advice(symbol, "mass")),
            ("sentence", RETRY_TEXT),
        ):
            context = prompt + wrong + TURN_END + bridge_text(words) + before
            shares[name].append(probability(student, tokenizer, context, mass))
    return shares


def formulas_with(symbol: str, rng: random.Random) -> Iterator[Formula]:
    """Draws formulas of `symbol` and one or two elements that the student has right."""
    known = [other for other in ATOMIC_MASSES if other not in ATOMIC_NUMBERS]
    for _ in range(NUM_FORMULAS):
        symbols = [symbol, *rng.sample(known, rng.randint(1, 2))]
        symbols.sort(key=lambda other: (other != "C", other != "H", other))
        yield {other: rng.randint(1, molar_mass.MAX_ATOMS) for other in symbols}


def probability(
    student: Decoder, tokenizer: PreTrainedTokenizerFast, context: str, text: str
) -> float:
    """Returns how likely the student goes on from `context` with `text`, at temperature 1."""
    context_ids = tokenizer(context)["input_ids"]
    text_ids = tokenizer(text)["input_ids"]
    token_ids = torch.tensor(context_ids + text_ids)
    length = len(token_ids)
    until = visible_until_of_sequences([length])
    with torch.no_grad():
        hidden = packed_forward(student, token_ids, torch.arange(length), until)
        logprobs = student.lm_head(hidden[len(context_ids) - 1 : -1]).double().log_softmax(-1)
    return math.exp(logprobs[torch.arange(len(text_ids)), text_ids].sum().item())


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Shares of the right masses, by what the student was told before."
    )
    parser.add_argument("--student", type=Path, default=STUDENT_DIR, help="default: the shipped")
    folder = parser.parse_args().student
    student = load_student(folder)
    tokenizer = load_tokenizer(folder)
    for symbol in ATOMIC_NUMBERS:
        shares = right_shares(student, tokenizer, symbol)
        cells = [
            f"{name} {mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
            for name, values in shares.items()
        ]
        print(f"{symbol:<2}  " + "   ".join(cells))


if __name__ == "__main__":
    main()
