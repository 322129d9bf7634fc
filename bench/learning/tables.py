"""The study's tables: prints them, or puts them into docs/learning.md between their marks.

    python -m bench.learning.tables [--write docs/learning.md]

Read TABLES, then the function of one. Accuracies are unassisted, held out, in per cent, mean over
seeds with the values of the seeds behind it; differences have 95 % intervals and are paired.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from bench.learning.analysis import (
    Axis,
    Estimate,
    at_cost,
    at_end,
    cost_until,
    difference,
    estimate,
    paired,
    right_alone_by_rescues,
    runs_of,
    shares,
    tutor_cost,
)
from bench.learning.plan import ARMS, COMPARED_AT, MAIN_ARMS, PRIMARY, RATES, STUDENTS, Stage
from bench.learning.results import Record, best_rates, rate_scores, read_all, run_of

LAST_BATCHES = slice(-4, None)
RESCUE_EDGES = (0, 1, 10, 30, 100, 300)
AXES: dict[Axis, str] = {"batches": "batches", "tokens": "sampled tokens", "cpu_s": "seconds"}
DENSITIES: dict[str, Stage] = {
    "sparse": "densities",
    "shipped": "main",
    "between": "densities",
    "dense": "densities",
}


def rates_table(records: Sequence[Record]) -> list[list[str]]:
    """Mean of the last two evaluations by learning rate; the chosen one in bold."""
    scores, best = rate_scores(records), best_rates(records)
    rows = [["arm", *(f"{lr:g}" for lr in RATES)]]
    for arm in ARMS:
        cells = [f"{100 * scores[arm][lr]:.1f}" if lr in scores[arm] else "-" for lr in RATES]
        if arm in best:
            chosen = RATES.index(best[arm])
            cells[chosen] = f"**{cells[chosen]}**"
        rows.append([ARMS[arm].title, *cells])
    return rows


def main_table(records: Sequence[Record]) -> list[list[str]]:
    """Every arm at the primary batch, at the tutor's tokens and seconds by then, and at its end."""
    rows = [
        [
            "arm",
            *(f"at equal {words}" for words in AXES.values()),
            "by seed, equal tokens",
            "at the end (batch)",
        ]
    ]
    tutor = runs_of(records, "main", "shipped", "tutor")
    for arm in ARMS:
        runs = runs_of(records, "main", "shipped", arm)
        if not runs or not tutor:
            continue
        by_axis = {
            axis: [at_cost(r, axis, tutor_cost(tutor, axis, PRIMARY)) for r in runs.values()]
            for axis in AXES
        }
        rows.append(
            [
                ARMS[arm].title,
                *(with_spread(values) for values in by_axis.values()),
                by_seed(by_axis["tokens"]),
                f"{with_spread([at_end(r) for r in runs.values()])} ({ARMS[arm].num_batches})",
            ]
        )
    return rows


def differences_table(records: Sequence[Record]) -> list[list[str]]:
    """The tutor less each other arm, at equal batches and at what the tutor had taken by then."""
    tutor = runs_of(records, "main", "shipped", "tutor")
    rows = [["tutor less", "at", *(f"equal {words}" for words in AXES.values())]]
    for arm in ARMS:
        others = runs_of(records, "main", "shipped", arm)
        if arm == "tutor" or not others:
            continue
        for batch in COMPARED_AT:
            cells = [
                interval(difference(tutor, others, axis, tutor_cost(tutor, axis, batch)))
                for axis in AXES
            ]
            rows.append([ARMS[arm].title, f"batch {batch}", *cells])
    return rows


def credit_table(records: Sequence[Record]) -> list[list[str]]:
    """Credit by decay, the 2 x 2: unassisted at the end, assisted in the last training batches."""
    names = {
        ("attempt", "decay"): "tutor",
        ("attempt", "no decay"): "undecayed",
        ("trajectory", "decay"): "trajectory",
        ("trajectory", "no decay"): "trajectory_undecayed",
    }
    rows = [
        [
            "credit by",
            "",
            f"unassisted, batch {PRIMARY}",
            "unassisted at the end",
            "assisted, last 4 batches",
        ]
    ]
    cells = {key: runs_of(records, "main", "shipped", arm) for key, arm in names.items()}
    for (credit, decay), runs in cells.items():
        if runs:
            rows.append(
                [
                    credit,
                    decay,
                    with_spread([at_cost(r, "batches", PRIMARY) for r in runs.values()]),
                    with_spread([at_end(r) for r in runs.values()]),
                    with_spread(shares(runs, "assisted", LAST_BATCHES)),
                ]
            )
    for credit in ("attempt", "trajectory"):
        with_decay, without = cells[credit, "decay"], cells[credit, "no decay"]
        if with_decay and without:
            rows.append(
                [
                    credit,
                    "decay less none",
                    interval(difference(with_decay, without, "batches", PRIMARY)),
                    interval(paired(with_decay, without, at_end)),
                    "",
                ]
            )
    return rows


def densities_table(records: Sequence[Record]) -> list[list[str]]:
    """The main arms by how often the student is right alone on what it holds wrong."""
    rows = [
        [
            "student",
            "arm",
            "start",
            f"batch {PRIMARY}",
            "equal tokens",
            "end",
            "tutor less it, equal tokens",
            "the same at the end",
        ]
    ]
    for student, stage in DENSITIES.items():
        tutor = runs_of(records, stage, student, "tutor")
        for arm in MAIN_ARMS:
            runs = runs_of(records, stage, student, arm)
            if not runs or not tutor:
                continue
            tokens = tutor_cost(tutor, "tokens", PRIMARY)
            is_tutor = arm == "tutor"
            rows.append(
                [
                    STUDENTS[student].title,
                    ARMS[arm].title,
                    percent(mean(at_cost(r, "batches", 0) for r in runs.values())),
                    with_spread([at_cost(r, "batches", PRIMARY) for r in runs.values()]),
                    with_spread([at_cost(r, "tokens", tokens) for r in runs.values()]),
                    with_spread([at_end(r) for r in runs.values()]),
                    "" if is_tutor else interval(difference(tutor, runs, "tokens", tokens)),
                    "" if is_tutor else interval(paired(tutor, runs, at_end)),
                ]
            )
    return rows


def phases_table(records: Sequence[Record]) -> list[list[str]]:
    """Training batches four by four: right alone, right in the end, wrong ones rescued."""
    rows = [["batches", "arm", "right alone", "right in the end", "rescued"]]
    for start in range(0, 28, 4):
        for arm in ("tutor", "sentence", "answer"):
            runs = runs_of(records, "main", "shipped", arm)
            if runs:
                block = slice(start, start + 4)
                cells = [
                    percent(mean(shares(runs, name, block)))
                    for name in ("unassisted", "assisted", "rescued")
                ]
                rows.append([f"{start + 1} to {start + 4}", ARMS[arm].title, *cells])
    return rows


def facts_table(records: Sequence[Record]) -> list[list[str]]:
    """Right alone after so many rescues of the same fact in the same run."""
    labels = [
        "none" if high == 1 else f"{low} to {high - 1}" for low, high in pairwise(RESCUE_EDGES)
    ] + [f"{RESCUE_EDGES[-1]} and more"]
    rows = [["rescues before", *labels]]
    for arm in ("tutor", "sentence", "answer"):
        runs = runs_of(records, "main", "shipped", arm)
        if runs:
            bins = right_alone_by_rescues(runs.values(), RESCUE_EDGES)
            rows.append(
                [ARMS[arm].title, *(f"{percent(share)} of {n}" if n else "-" for share, n in bins)]
            )
    return rows


def reach_table(records: Sequence[Record]) -> list[list[str]]:
    """What it took to 90 % unassisted."""
    rows = [["arm", "runs that reached 90 %", "batches", "sampled tokens", "seconds"]]
    for arm in ARMS:
        runs = runs_of(records, "main", "shipped", arm)
        if not runs:
            continue
        reached = [r for r in runs.values() if math.isfinite(cost_until(r, "batches", 0.9))]
        cells = []
        for axis in AXES:
            values = [cost_until(record, axis, 0.9) for record in reached]
            cells.append(f"{mean(values):,.0f}" if values else "-")
        rows.append([ARMS[arm].title, f"{len(reached)} of {len(runs)}", *cells])
    return rows


def runs_table(records: Sequence[Record]) -> list[list[str]]:
    """Every run that was made: how many, by stage and student, and how many of them failed."""
    made: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for record in records:
        run = run_of(record)
        made[run.stage, run.student] += 1
        failed[run.stage, run.student] += "error" in record
    rows = [["stage", "student", "runs made", "of them failed"]]
    return rows + [
        [stage, STUDENTS[student].title, str(number), str(failed[stage, student])]
        for (stage, student), number in made.items()
    ]


TABLES: dict[str, Callable[[Sequence[Record]], list[list[str]]]] = {
    "main": main_table,
    "differences": differences_table,
    "credit": credit_table,
    "densities": densities_table,
    "phases": phases_table,
    "facts": facts_table,
    "reach": reach_table,
    "rates": rates_table,
    "runs": runs_table,
}


def percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def by_seed(values: Iterable[float]) -> str:
    return " ".join(percent(value) for value in values)


def with_spread(values: Sequence[float]) -> str:
    """Mean and the half width of its 95 % interval."""
    center, low, *_ = estimate(values)
    return (
        percent(center) if math.isnan(low) else f"{100 * center:.1f} ± {100 * (center - low):.1f}"
    )


def interval(found: Estimate) -> str:
    """A difference in points: mean, its interval, and how many seeds are on the mean's side."""
    if math.isnan(found.mean):
        return "-"
    same_side = sum(value * found.mean > 0 for value in found.values)
    points = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return f"{points}, {same_side} of {len(found.values)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(text: str, records: Sequence[Record]) -> str:
    """The text with what stands between <!-- table NAME --> and <!-- end --> made anew."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{markdown(TABLES[match[2]](records))}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser("bench.learning.tables", description="The study's tables.")
    parser.add_argument("--write", type=Path, help="document to put them into, between their marks")
    path = parser.parse_args().write
    records = read_all()
    if path is None:
        for name, table in TABLES.items():
            print(
                f"{name}: {(table.__doc__ or '').splitlines()[0]}\n\n{markdown(table(records))}\n"
            )
    else:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main()
