"""Measures how often the built-in student has a mass right: unassisted and after guidance.

    python -m tools.builtin_student.probe [--student FOLDER]

The probability of the right mass comes from the student's own distribution at temperature 1, with
the right lines before it (teacher forcing). Nothing is sampled, so even a share of one in a
thousand is known exactly. Prints one row for each element whose mass the student believes wrong:
the mean over formulas, the least and the greatest. Read right_shares.
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
    """Returns the probability of a symbol's right mass for each formula, by what came before it.

    The keys are "alone" (first attempt), "tutor" and "sentence": a second attempt after a wrong one
    and guidance that names the mass, or one that only asks to try again.
    """
    shares: dict[str, list[float]] = {"alone": [], "tutor": [], "sentence": []}
    for formula in formulas_with(symbol, random.Random(seed)):
        prompt = str(
            tokenizer.apply_chat_template(
                list(molar_mass.question_messages(formula)),
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        right_answer = render(molar_mass.reference_lines(formula))
        answer_start = (
            right_answer[: right_answer.index(f"{symbol}: ")] + f"{symbol}: {formula[symbol]} x "
        )
        mass = f"{ATOMIC_MASSES[symbol]} = "  # with its end, so that 23 is not the start of 230
        # The masses as the student believes them: the atomic number for four elements.
        believed = ATOMIC_MASSES | ATOMIC_NUMBERS
        wrong_answer = render(
            believed_lines(formula, {other: believed[other] for other in formula})
        )
        shares["alone"].append(probability(student, tokenizer, prompt + answer_start, mass))
        for name, guidance in (
            ("tutor", molar_mass.line_advice(symbol, "mass")),
            ("sentence", RETRY_TEXT),
        ):
            context = prompt + wrong_answer + TURN_END + bridge_text(guidance) + answer_start
            shares[name].append(probability(student, tokenizer, context, mass))
    return shares


def formulas_with(symbol: str, rng: random.Random) -> Iterator[Formula]:
    """Draws formulas of `symbol` and one or two elements whose mass the student knows."""
    known = [other for other in ATOMIC_MASSES if other not in ATOMIC_NUMBERS]
    for _ in range(NUM_FORMULAS):
        symbols = [symbol, *rng.sample(known, rng.randint(1, 2))]
        # Carbon first, then hydrogen, then the alphabet: the order in which formulas are written.
        symbols.sort(key=lambda other: (other != "C", other != "H", other))
        yield {other: rng.randint(1, molar_mass.MAX_ATOMS) for other in symbols}


def probability(
    student: Decoder, tokenizer: PreTrainedTokenizerFast, context: str, text: str
) -> float:
    """Returns the probability that `text` follows `context`, at temperature 1."""
    context_ids = tokenizer(context)["input_ids"]
    text_ids = tokenizer(text)["input_ids"]
    token_ids = torch.tensor(context_ids + text_ids)
    length = len(token_ids)
    until = visible_until_of_sequences([length])
    with torch.no_grad():
        hidden = packed_forward(student, token_ids, torch.arange(length), until)
        # The hidden state at position t gives the distribution of token t + 1.
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
