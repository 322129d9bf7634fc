"""The built-in task: molar masses of small formulas, in the shape of SciKnowEval's prompts.

Read: the chemistry -> questions -> reference -> tutor. Formulas are drawn at random and need not be
real compounds.
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
STUDENT_DIR = (
    Path(__file__).parent / "molar_mass_student"
)  # the warmed-up checkpoint, made by tools/builtin_student

# Whole g/mol. With at most 4 elements and 4 atoms of each, no molar mass reaches 1000.
ATOMIC_MASSES = {
    "H": 1, "C": 12, "N": 14, "O": 16, "F": 19, "Na": 23, "Mg": 24, "Al": 27,
    "Si": 28, "P": 31, "S": 32, "Cl": 35, "K": 39, "Ca": 40, "Fe": 56, "Zn": 65,
}  # fmt: skip
MIN_ELEMENTS = 2
MAX_ELEMENTS = 4
MAX_ATOMS = 4
MAX_QUESTIONS = (
    20_000  # of one call; the eval split has about 50,000 formulas and none is drawn twice
)

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
USER_TEXTS = (
    "What is the molar mass of ",
    " in g/mol?\nPlease reason step by step.",
)  # around the formula

# The tutor's sentences, around the symbol of the element concerned. None holds a number.
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
    return "".join(symbol + (str(atoms) if atoms > 1 else "") for symbol, atoms in formula.items())


def parse_formula(question_text: str) -> Formula:
    """The formula in a user message of this task; ValueError for any other text."""
    before, after = USER_TEXTS
    text = question_text.removeprefix(before).removesuffix(after)
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
        f"{before!r} + formula + {after!r}",
        "use this tutor with the built-in questions only",
    )
    return formula


def draw_formula(rng: random.Random) -> Formula:
    """2 to 4 elements, 1 to 4 atoms of each; carbon comes first, then hydrogen, then the rest by
    alphabet.
    """
    symbols = sorted(
        rng.sample(list(ATOMIC_MASSES), rng.randint(MIN_ELEMENTS, MAX_ELEMENTS)),
        key=lambda symbol: (symbol != "C", symbol != "H", symbol),
    )
    return {symbol: rng.randint(1, MAX_ATOMS) for symbol in symbols}


def split_of(formula: Formula) -> Literal["train", "eval"]:
    """One formula in ten is for evaluation, by its hash, so whatever the seeds the splits share
    none.
    """
    return (
        "eval"
        if hashlib.sha256(format_formula(formula).encode()).digest()[0] % 10 == 0
        else "train"
    )


def question_messages(formula: Formula) -> tuple[dict[str, str], ...]:
    return (
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": format_formula(formula).join(USER_TEXTS)},
    )


def questions(seed: int, n: int, split: Literal["train", "eval"] = "train") -> list[Question]:
    """n different molar-mass questions; the same arguments give the same questions, on any machine.

    Args:
        seed:  any int. Of one split, different seeds draw from the same formulas.
        n:     in [0, 20000].
        split: "train" or "eval"; their formulas are disjoint whatever the seeds.

    Returns:
        Question with ground_truth the molar mass, such as "18", and the reference solution.

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
    return work_out([(symbol, atoms, ATOMIC_MASSES[symbol]) for symbol, atoms in formula.items()])


def work_out(terms: Iterable[tuple[str, int, int]]) -> list[Line]:
    """The lines that follow from (symbol, atoms, mass): products and sums are right even if those
    are not.
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
    """The text of an attempt; its answer is the last sum unless given."""
    body = "".join(
        f"{line.symbol}: {line.atoms} x {line.mass} = {line.product}, sum {line.total}\n"
        for line in lines
    )
    stated = lines[-1].total if answer is None else answer
    return f"<reasoning>\n{body}</reasoning>\n<answer>\n{stated}\n</answer>"


_NUMBER = "(0|[1-9][0-9]{0,2})"  # in one way only, as the grader compares texts
_ATTEMPT = re.compile(
    rf"\s*<reasoning>\n(.*?)\n</reasoning>\n<answer>\n{_NUMBER}\n</answer>\s*", re.DOTALL
)
_LINE = re.compile(rf"([A-Z][a-z]?): ([0-9]) x {_NUMBER} = {_NUMBER}, sum {_NUMBER}")


def tutor(request: GuidanceRequest) -> str | None:
    """The built-in teacher, for teacher kind "rule"; it needs neither ground truth nor reference
    solution.
    """
    return diagnose(request.question, request.student_answer)


def diagnose(question_text: str, student_answer: str) -> str | None:
    """Name the first mistake of an attempt and what to recheck there, never a number; None if there
    is no mistake.

    Products and sums are judged by the attempt's own numbers: what follows from an earlier mistake
    is not a second one. Any text is an attempt; one that cannot be read gets a word about the
    format.
    """
    formula = parse_formula(question_text)
    attempt = _ATTEMPT.fullmatch(student_answer)
    if attempt is None:
        return FORMAT_TEXT
    body, answer = attempt.groups()
    total = 0
    for row, expected in zip_longest(body.split("\n"), formula):
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
        if wrong := [term for term, right in is_right.items() if not right]:
            return line_advice(symbol, wrong[0])
        total = line.total
    return None if answer == str(total) else ANSWER_TEXT


def line_advice(symbol: str, term: str) -> str:
    """What the tutor says when `term` (a key of TERM_TEXTS) is the first mistake, in the line of
    `symbol`.
    """
    return symbol.join(LINE_TEXTS) + TERM_TEXTS[term]
