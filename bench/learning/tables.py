"""Makes the study's tables: prints them, or writes them between their marks in docs/learning.md.

    python -m bench.learning.tables [--write docs/learning.md]

Read TABLES, then the function of one table; the first line of its docstring is the table's title in
the printed output. Accuracies are unassisted, held out, in per cent: means over seeds, ± half the
width of the 95 % interval. Differences are paired by seed, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from bench.learning.added import GOAL, again_table, slower_table
from bench.learning.analysis import (
    Axis,
    at_cost,
    check_alike,
    cost_until,
    difference,
    paired,
    rescued_share,
    runs_of,
    shares,
    tutor_cost,
    unassisted_by_rescues,
)
from bench.learning.cells import (
    Table,
    batches_cell,
    by_seed,
    interval,
    markdown,
    percent,
    with_spread,
)
from bench.learning.plan import ARMS, COMPARED_AT, MAIN_ARMS, PRIMARY, RATES, STUDENTS, Stage
from bench.learning.results import Record, at_end, best_rates, rate_scores, read_all, run_of

LAST_BATCHES = slice(-4, None)  # those since the evaluation before the last one
GUIDED_ARMS = ("tutor", "sentence", "answer")
RESCUE_EDGES = (0, 1, 10, 30, 100, 300)
AXES: dict[Axis, str] = {"batches": "batches", "tokens": "sampled tokens", "cpu_s": "seconds"}
DENSITIES: dict[str, Stage] = {"shipped": "main", "few": "densities", "many": "densities"}


def main_table(records: Sequence[Record]) -> Table:
    """Every arm at the primary batch, at the tutor's tokens and seconds by then, and at its end."""
    columns = [f"equal {words}" for words in AXES.values()]
    rows = [["arm", *columns, "the same tokens, by seed", "its end", "at batch"]]
    tutor = runs_of(records, "main", "shipped", "tutor")
    for arm in ARMS if tutor else ():
        runs = runs_of(records, "main", "shipped", arm).values()
        by_axis = {
            axis: [at_cost(r, axis, tutor_cost(tutor, axis, PRIMARY)) for r in runs]
            for axis in AXES
        }
        cells = [seconds_apart(arm, axis, with_spread(by_axis[axis])) for axis in AXES]
        end = with_spread([at_end(record) for record in runs])
        seeds = by_seed(by_axis["tokens"])
        rows.append([ARMS[arm].title, *cells, seeds, end, str(ARMS[arm].num_batches)])
    return rows


def differences_table(records: Sequence[Record]) -> Table:
    """The tutor less each other arm, at equal batches and at what the tutor had taken by then."""
    tutor = runs_of(records, "main", "shipped", "tutor")
    rows = [["tutor less", "at batch", *(f"equal {words}" for words in AXES.values())]]
    for arm in ARMS if tutor else ():
        arm_runs = runs_of(records, "main", "shipped", arm)
        for batch in COMPARED_AT if arm_runs and arm != "tutor" else ():
            by_axis = {
                axis: interval(difference(tutor, arm_runs, axis, tutor_cost(tutor, axis, batch)))
                for axis in AXES
            }
            cells = [seconds_apart(arm, axis, cell) for axis, cell in by_axis.items()]
            rows.append([ARMS[arm].title, str(batch), *cells])
    return rows


def reach_table(records: Sequence[Record]) -> Table:
    """What it took to 90 % unassisted: median over seeds, where most of them came so far."""
    rows = [["arm", f"runs that reached {GOAL:.0%}", *AXES.values(), "batches by seed"]]
    for arm in ARMS:
        runs = runs_of(records, "main", "shipped", arm).values()
        if not runs:
            continue
        costs_by_axis = {axis: [cost_until(r, axis, GOAL) for r in runs] for axis in AXES}
        num_reached = sum(cost < float("inf") for cost in costs_by_axis["batches"])
        # Runs that never got there cost inf, so the median is known if more than half of them did.
        is_known = 2 * num_reached > len(runs)
        cells = [
            seconds_apart(arm, axis, f"{median(costs):,.0f}" if is_known else "-")
            for axis, costs in costs_by_axis.items()
        ]
        reached = f"{num_reached} of {len(runs)}"
        rows.append([ARMS[arm].title, reached, *cells, batches_cell(costs_by_axis["batches"])])
    return rows


def credit_table(records: Sequence[Record]) -> Table:
    """Credit by decay, two by two: unassisted held out, and assisted in training at the end."""
    arms = {"attempt": ("tutor", "undecayed"), "trajectory": ("trajectory", "trajectory_undecayed")}
    columns = [f"unassisted, batch {PRIMARY}", "unassisted, batch 40", "assisted, batches 37 to 40"]
    rows = [["credit by", "decay", *columns]]
    # A 2 x 2 design: the difference within each kind of credit is the effect of decay.
    for credit, (decayed, undecayed) in arms.items():
        runs = [runs_of(records, "main", "shipped", arm) for arm in (decayed, undecayed)]
        for words, by_seed_ in zip(("yes", "no"), runs, strict=True):
            cells = [
                with_spread([at_cost(r, "batches", PRIMARY) for r in by_seed_.values()]),
                with_spread([at_end(r) for r in by_seed_.values()]),
                with_spread(shares(by_seed_, "assisted", LAST_BATCHES)),
            ]
            rows.append([credit, words, *cells])
        gains = [interval(difference(*runs, "batches", PRIMARY)), interval(paired(*runs, at_end))]
        rows.append([credit, "yes less no", *gains, ""])
    return rows


def densities_table(records: Sequence[Record]) -> Table:
    """The main arms by how often the student is right alone on what it holds wrong."""
    columns = ["start", f"batch {PRIMARY}", "equal tokens", "tutor less it, equal tokens"]
    rows = [["student", "arm", *columns, "its end", "at batch"]]
    for student, stage in DENSITIES.items():
        tutor = runs_of(records, stage, student, "tutor")
        for arm in MAIN_ARMS if tutor else ():
            runs = runs_of(records, stage, student, arm)
            tokens = tutor_cost(tutor, "tokens", PRIMARY)
            gain = "" if arm == "tutor" else interval(difference(tutor, runs, "tokens", tokens))
            cells = [
                with_spread([at_cost(r, "batches", 0) for r in runs.values()]),
                with_spread([at_cost(r, "batches", PRIMARY) for r in runs.values()]),
                with_spread([at_cost(r, "tokens", tokens) for r in runs.values()]),
                gain,
                with_spread([at_end(r) for r in runs.values()]),
            ]
            title = ARMS[arm].title
            length = str(ARMS[arm].num_batches)
            rows.append([STUDENTS[student].title, title, *cells, length])
    return rows


def phases_table(records: Sequence[Record]) -> Table:
    """Training batches four by four: right alone, right in the end, and of wrong ones rescued."""
    columns = [
        f"{ARMS[arm].title}: {column}"
        for arm in GUIDED_ARMS
        for column in ("alone", "in the end", "rescued")
    ]
    rows = [["batches", *columns]]
    for start in range(0, 28, 4):
        block = slice(start, start + 4)
        cells = []
        for arm in GUIDED_ARMS:
            runs = runs_of(records, "main", "shipped", arm)
            cells += [
                percent(mean(shares(runs, "unassisted", block))) if runs else "-",
                percent(mean(shares(runs, "assisted", block))) if runs else "-",
                percent(rescued_share(runs, block)),
            ]
        rows.append([f"{start + 1} to {start + 4}", *cells])
    return rows


def facts_table(records: Sequence[Record]) -> Table:
    """A mass right alone, by how often it has been put right after guidance before in that run."""
    labels = [
        "never" if high == 1 else f"{low} to {high - 1} times"
        for low, high in pairwise(RESCUE_EDGES)
    ]
    rows = [["put right before", *labels, f"{RESCUE_EDGES[-1]} times and more"]]
    for arm in GUIDED_ARMS:
        runs = runs_of(records, "main", "shipped", arm).values()
        bins = unassisted_by_rescues(runs, RESCUE_EDGES)
        rows.append([ARMS[arm].title, *(f"{percent(share)} of {n:,}" for share, n in bins)])
    return rows


def rates_table(records: Sequence[Record]) -> Table:
    """The mean of the last two evaluations by learning rate; the chosen one in bold."""
    scores = rate_scores(records)
    best = best_rates(records)
    rows = [["arm", *(f"{lr:g}" for lr in RATES)]]
    for arm in ARMS:
        cells = [percent(scores[arm][lr]) if lr in scores[arm] else "-" for lr in RATES]
        if arm in best:
            chosen = RATES.index(best[arm])
            cells[chosen] = f"**{cells[chosen]}**"
        rows.append([ARMS[arm].title, *cells])
    return rows


def runs_table(records: Sequence[Record]) -> Table:
    """Every run that was made: how many, by stage and student, and how many of them failed."""
    # Failed runs are listed as well, so that nothing is left out unseen.
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


TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    # In the order of docs/learning.md, whose marks have these names.
    "main": main_table,
    "differences": differences_table,
    "reach": reach_table,
    "again": again_table,
    "slower": slower_table,
    "phases": phases_table,
    "facts": facts_table,
    "credit": credit_table,
    "densities": densities_table,
    "rates": rates_table,
    "runs": runs_table,
}


def seconds_apart(arm: str, axis: Axis, cell: str) -> str:
    """Returns the cell, but "-" for the seconds of any arm that is not a main one.

    Other work ran on the machine beside these arms. It slowed them down by sharing caches and
    cores, and processor seconds do not correct for that.
    """
    return "-" if axis == "cpu_s" and arm not in MAIN_ARMS else cell


def with_tables(text: str, records: Sequence[Record]) -> str:
    """Replaces what stands between <!-- table NAME --> and <!-- end --> by new tables."""

    def made(match: re.Match[str]) -> str:
        return f"{match[1]}\n{markdown(TABLES[match[2]](records))}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser("bench.learning.tables", description="The study's tables.")
    parser.add_argument("--write", type=Path, help="document to put them into, between their marks")
    path = parser.parse_args().write
    records = read_all()
    check_alike(records)
    if path is None:
        for name, table in TABLES.items():
            print(
                f"{name}: {(table.__doc__ or '').splitlines()[0]}\n\n{markdown(table(records))}\n"
            )
    else:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main()
