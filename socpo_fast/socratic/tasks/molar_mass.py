"""Holds the built-in task: molar masses of small formulas, with prompts like SciKnowEval's.

Read the constants, then questions, work_out and render for the reference solution, then tutor.
Formulas are drawn at random and need not be real compounds. An attempt at "CH4":

    <reasoning>
    C: 1 x 12 = 12, sum 12      symbol: atoms x mass = product, sum total
    H: 4 x 1 = 4, sum 16
    </reasoning>
    <answer>
    16
    </answer>
"""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

from socpo_fast.ops._checks import check_rule
from socpo_fast.types import GuidanceRequest, Question

DATA_SOURCE = "builtin/molar_mass"
# The task's student: a warmed-up checkpoint, made by tools/builtin_student.
STUDENT_DIR = Path(__file__).parent / "molar_mass_student"

# Whole g/mol. With at most 4 elements and 4 atoms of each, no molar mass reaches 1000.
ATOMIC_MASSES = {
    "H": 1, "C": 12, "N": 14, "O": 16, "F": 19, "Na": 23, "Mg": 24, "Al": 27,
    "Si": 28, "P": 31, "S": 32, "Cl": 35, "K": 39, "Ca": 40, "Fe": 56, "Zn": 65,
}  # fmt: skip
MIN_ELEMENTS = 2
MAX_ELEMENTS = 4
MAX_ATOMS = 4
# Most questions of one call. Formulas are drawn until enough different ones are found, and the eval
# split has only about 50,000 of them.
MAX_QUESTIONS = 20_000

SYSTEM_TEXT = """
Given a chemical formula, please work out its molar mass in whole g/mol. \
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

Reason in one line per element, in the order of the formula: the count times the atomic mass, \
and the sum so far. \
For the answer, only output the molar mass. For example, for H2O the whole response is:
<reasoning>
H: 2 x 1 = 2, sum 2
O: 1 x 16 = 16, sum 18
</reasoning>
<answer>
18
</answer>
"""
# The formula stands between these two.
USER_TEXTS = (
    "What is the molar mass of ",
    " in g/mol?\nPlease reason step by step.",
)

# The tutor's sentences. Those in pairs have the symbol of an element in between. None of them has a
# number, so guidance cannot give the answer away.
LINE_TEXTS = ("There is a mistake in the line of ", ". Recheck ")
TERM_TEXTS = {
    "atoms": "how often it is in the formula.",
    "mass": "its atomic mass.",
    "product": "the product of count and mass.",
    "total": "the sum so far.",
}
MISSING_TEXTS = ("Recheck the elements of the formula: there the next line must be that of ", ".")
EXTRA_TEXTS = ("Recheck the elements of the formula: no line may follow that of ", ".")
ANSWER_TEXT = "The lines are right. Recheck the answer: it repeats the last sum."
FORMAT_TEXT = (
    "Keep to the format: one line per element in the reasoning block, then the answer block."
)

Formula = dict[str, int]  # atoms of each element, in the order in which the formula is written


class Line(NamedTuple):
    """One line of an attempt: `symbol: atoms x mass = product, sum total`."""

    symbol: str
    atoms: int
    mass: int
    product: int
    total: int


def format_formula(formula: Formula) -> str:
    """Returns a formula as text, such as "CH4"."""
    return "".join(symbol + (str(atoms) if atoms > 1 else "") for symbol, atoms in formula.items())


def parse_formula(question_text: str) -> Formula:
    """Returns the formula in a user message of this task; ValueError for any other text."""
    text_before, text_after = USER_TEXTS
    text = question_text.removeprefix(text_before).removesuffix(text_after)
    formula = {
        symbol: int(atoms or 1) for symbol, atoms in re.findall(r"([A-Z][a-z]?)([1-9]?)", text)
    }
    check_rule(
        "molar_mass",
        "question",
        question_text,
        len(formula) > 0
        and format_formula(formula).join(USER_TEXTS) == question_text
        and formula.keys() <= ATOMIC_MASSES.keys(),
        f"{text_before!r} + formula + {text_after!r}",
        "use this tutor with the built-in questions only",
    )
    return formula


def draw_formula(rng: random.Random) -> Formula:
    """Draws 2 to 4 elements with 1 to 4 atoms of each, in the order C, H, then by alphabet."""
    symbols = sorted(
        rng.sample(list(ATOMIC_MASSES), rng.randint(MIN_ELEMENTS, MAX_ELEMENTS)),
        key=lambda symbol: (symbol != "C", symbol != "H", symbol),
    )
    return {symbol: rng.randint(1, MAX_ATOMS) for symbol in symbols}


def split_of(formula: Formula) -> Literal["train", "eval"]:
    """Returns the split of a formula: one in ten is for evaluation.

    A hash decides, so the splits share no formula, whatever the seeds.
    """
    return (
        "eval"
        if hashlib.sha256(format_formula(formula).encode()).digest()[0] % 10 == 0
        else "train"
    )


def question_messages(formula: Formula) -> tuple[dict[str, str], ...]:
    """Returns the messages of a question."""
    return (
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": format_formula(formula).join(USER_TEXTS)},
    )


def questions(seed: int, n: int, split: Literal["train", "eval"] = "train") -> list[Question]:
    """Returns n different questions; the same arguments give the same ones on any machine.

    Args:
        seed:  any int. Within a split, different seeds draw from the same formulas.
        n:     in [0, 20000].
        split: "train" or "eval". They share no formula, whatever the seeds.

    Returns:
        Questions. ground_truth is the molar mass, such as "18"; each has a reference solution.

    Raises:
        ValueError: n or split breaks the rules above.
    """
    check_rule(
        "molar_mass.questions", "split", split, split in ("train", "eval"), "'train' or 'eval'"
    )
    check_rule(
        "molar_mass.questions",
        "n",
        n,
        0 <= n <= MAX_QUESTIONS,
        f"in [0, {MAX_QUESTIONS}]",
        "ask for fewer questions",
    )
    rng = random.Random(f"{split}/{seed}")
    drawn: dict[str, Formula] = {}
    while len(drawn) < n:
        formula = draw_formula(rng)
        if split_of(formula) == split:
            drawn.setdefault(format_formula(formula), formula)
    return [
        Question(
            question_idx=question_idx,
            messages=question_messages(formula),
            ground_truth=str(reference_lines(formula)[-1].total),
            data_source=DATA_SOURCE,
            reference_solution=render(reference_lines(formula)),
        )
        for question_idx, formula in enumerate(drawn.values())
    ]


def reference_lines(formula: Formula) -> list[Line]:
    """Returns the lines of the reference solution."""
    return work_out([(symbol, atoms, ATOMIC_MASSES[symbol]) for symbol, atoms in formula.items()])


def work_out(terms: Iterable[tuple[str, int, int]]) -> list[Line]:
    """Returns the lines that follow from (symbol, atoms, mass).

    Products and sums are right for these numbers, even if the numbers themselves are wrong.
    """
    total = 0
    return [
        Line(
            symbol,
            atoms,
            mass,
            product=atoms * mass,
            total=(total := total + atoms * mass),
        )
        for symbol, atoms, mass in terms
    ]


def render(lines: Sequence[Line], answer: int | None = None) -> str:
    """Returns the text of an attempt; None answers with the last sum."""
    reasoning = "".join(
        f"{line.symbol}: {line.atoms} x {line.mass} = {line.product}, sum {line.total}\n"
        for line in lines
    )
    stated_answer = lines[-1].total if answer is None else answer
    return f"<reasoning>\n{reasoning}</reasoning>\n<answer>\n{stated_answer}\n</answer>"


# Whole numbers below 1000, without leading zeros: the grader takes 018 for another text than 18.
_NUMBER = "(0|[1-9][0-9]{0,2})"
_ATTEMPT = re.compile(
    rf"\s*<reasoning>\n(.*?)\n</reasoning>\n<answer>\n{_NUMBER}\n</answer>\s*", re.DOTALL
)
_LINE = re.compile(rf"([A-Z][a-z]?): ([0-9]) x {_NUMBER} = {_NUMBER}, sum {_NUMBER}")


def tutor(request: GuidanceRequest) -> str | None:
    """Returns the guidance of the built-in teacher (kind "rule").

    It needs neither ground truth nor reference solution.
    """
    return diagnose(request.question, request.student_answer)


def diagnose(question_text: str, student_answer: str) -> str | None:
    """Names the first mistake of an attempt and what to recheck; None if there is no mistake.

    The text never holds a number. Products and sums are checked against the attempt's numbers, so a
    result that follows from an earlier mistake is no second mistake. Any text is an attempt; one
    that cannot be read gets guidance about the format.
    """
    formula = parse_formula(question_text)
    attempt = _ATTEMPT.fullmatch(student_answer)
    if attempt is None:
        return FORMAT_TEXT
    reasoning, answer = attempt.groups()
    # zip_longest: None as row is a missing line, None as expected a line too many.
    total = 0
    for row, expected in zip_longest(reasoning.split("\n"), formula):
        if row is None:
            return expected.join(MISSING_TEXTS)
        match = _LINE.fullmatch(row)
        if match is None:
            return FORMAT_TEXT
        if expected is None:
            return list(formula)[-1].join(EXTRA_TEXTS)
        symbol, atoms, *numbers = match.groups()
        line = Line(symbol, int(atoms), *map(int, numbers))
        if symbol != expected:
            return expected.join(MISSING_TEXTS)
        is_right = {
            "atoms": line.atoms == formula[symbol],
            "mass": line.mass == ATOMIC_MASSES[symbol],
            "product": line.product == line.atoms * line.mass,
            "total": line.total == total + line.product,
        }
        if wrong_terms := [term for term, holds in is_right.items() if not holds]:
            return line_advice(symbol, wrong_terms[0])
        total = line.total
    return None if answer == str(total) else ANSWER_TEXT


def line_advice(symbol: str, term: str) -> str:
    """Returns the guidance for a first mistake in the line of `symbol`.

    term: which number of the line is wrong, a key of TERM_TEXTS.
    """
    return symbol.join(LINE_TEXTS) + TERM_TEXTS[term]
