"""Makes the tables of the two stages added after the plan was run: fresh seeds, lower rates.

The first line of a table's docstring is its title in the printed output.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.learning.analysis import at_cost, cost_until, difference, runs_of, tutor_cost
from bench.learning.cells import Table, batches_cell, interval, with_spread
from bench.learning.plan import ARMS, MAIN_ARMS, PRIMARY, Stage
from bench.learning.results import Record, at_end, run_of

GOAL = 0.9


def again_table(records: Sequence[Record]) -> Table:
    """The tutor less each main arm at equal tokens, with the planned seeds and with fresh ones.

    The tokens are those of the planned five throughout: they were fixed before the fresh ones ran.
    """
    planned = {arm: runs_of(records, "main", "shipped", arm) for arm in MAIN_ARMS}
    fresh = {arm: runs_of(records, "again", "shipped", arm) for arm in MAIN_ARMS}
    rows = [["arm", "planned seeds", "fresh seeds", "all", f"runs that reached {GOAL:.0%}"]]
    if not fresh["tutor"]:
        return rows
    tokens = tutor_cost(planned["tutor"], "tokens", PRIMARY)
    for arm in MAIN_ARMS:
        all_runs = planned[arm] | fresh[arm]
        num_reached = sum(cost_until(r, "tokens", GOAL) < float("inf") for r in all_runs.values())
        cells = [
            interval(difference(tutors, arm_runs, "tokens", tokens))
            for tutors, arm_runs in (
                (planned["tutor"], planned[arm]),
                (fresh["tutor"], fresh[arm]),
                (planned["tutor"] | fresh["tutor"], all_runs),
            )
        ]
        cells = ["-"] * 3 if arm == "tutor" else cells
        rows.append([ARMS[arm].title, *cells, f"{num_reached} of {len(all_runs)}"])
    return rows


def slower_table(records: Sequence[Record]) -> Table:
    """Arms without a tutor at their own learning rates and at the tutor's."""
    tutor = runs_of(records, "main", "shipped", "tutor")
    columns = ["equal sampled tokens", "tutor less it", "its end", "at batch"]
    rows = [["arm", "learning rate", *columns, f"runs that reached {GOAL:.0%}", "batches by seed"]]
    stages: tuple[Stage, ...] = ("main", "slower")
    for arm in MAIN_ARMS[1:] if tutor else ():
        for stage in stages:
            runs = runs_of(records, stage, "shipped", arm)
            if not runs:
                continue
            tokens = tutor_cost(tutor, "tokens", PRIMARY)
            batches_to_goal = [cost_until(r, "batches", GOAL) for r in runs.values()]
            num_reached = sum(batches < float("inf") for batches in batches_to_goal)
            rates = {f"{run_of(record).lr:g}" for record in runs.values()}
            cells = [
                with_spread([at_cost(r, "tokens", tokens) for r in runs.values()]),
                interval(difference(tutor, runs, "tokens", tokens)),
                with_spread([at_end(r) for r in runs.values()]),
            ]
            reached = f"{num_reached} of {len(runs)}"
            row = [ARMS[arm].title, " ".join(rates), *cells, str(ARMS[arm].num_batches), reached]
            rows.append([*row, batches_cell(batches_to_goal)])
    return rows
