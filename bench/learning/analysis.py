"""Turns the study's records into numbers: accuracy at equal cost, paired differences, facts.

Read at_cost, then difference. Of the plan's arms only "tutor" is special here: its runs set the
tokens and seconds at which the other arms are compared.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import mean, stdev
from typing import Literal, NamedTuple

from bench.learning.plan import Stage
from bench.learning.results import Record, finished, run_of

Axis = Literal["batches", "tokens", "cpu_s"]
# 97.5 % quantiles of Student's t for 1, 2, .. degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean over seeds, the ends of its 95 % interval, and the values by seed."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def check_alike(records: Iterable[Record]) -> None:
    """Refuses records that must not be compared.

    Raises:
        ValueError: runs on one student of the plan had different weights.
    """
    weights: dict[tuple[str, str], set[str]] = {}
    for record in finished(records).values():
        run = run_of(record)
        weights.setdefault((run.stage, run.student), set()).add(record["student"])
    for (stage, student), checksums in weights.items():
        if len(checksums) > 1:
            raise ValueError(
                f"learning: all runs of stage {stage} on student {student} must have had the same "
                f"weights, got {sorted(checksums)}; make those of one machine only"
            )


def runs_of(records: Iterable[Record], stage: Stage, student: str, arm: str) -> dict[int, Record]:
    """Returns the records of one arm's finished runs on one student, by seed."""
    chosen: dict[int, Record] = {}
    for record in finished(records).values():
        run = run_of(record)
        if (run.stage, run.student, run.arm) == (stage, student, arm):
            chosen[run.seed] = record
    return dict(sorted(chosen.items()))


def costs(record: Record, axis: Axis) -> list[float]:
    """Returns what training had cost by the end of batch 0, 1, ..: batches, tokens or seconds."""
    batches = record["batches"]
    each = [1] * len(batches["tokens"]) if axis == "batches" else batches[axis]
    return list(accumulate(each, initial=0))


def curve(record: Record, axis: Axis) -> tuple[list[float], list[float]]:
    """Returns (costs, unassisted held-out accuracies) at a run's evaluations."""
    by_batch = costs(record, axis)
    evals = record["evals"]
    return [by_batch[batch] for batch in evals["batch"]], list(evals["unassisted"])


def at_cost(record: Record, axis: Axis, cost: float) -> float:
    """Interpolates the accuracy at a cost between two evaluations; nan beyond the last one."""
    xs, ys = curve(record, axis)
    if not xs[0] <= cost <= xs[-1]:
        return math.nan
    upper = max(bisect_left(xs, cost), 1)
    share = (cost - xs[upper - 1]) / (xs[upper] - xs[upper - 1])
    return ys[upper - 1] + share * (ys[upper] - ys[upper - 1])


def cost_until(record: Record, axis: Axis, accuracy: float) -> float:
    """Returns the cost of reaching an accuracy, interpolated alike; inf if a run never did."""
    xs, ys = curve(record, axis)
    for i, y in enumerate(ys):
        if y >= accuracy:
            if i == 0:
                return xs[0]
            share = (accuracy - ys[i - 1]) / (y - ys[i - 1])
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return math.inf


def tutor_cost(tutor_runs: Mapping[int, Record], axis: Axis, batch: int) -> float:
    """Returns what the tutor's runs had cost on average by the end of a batch."""
    return mean(costs(record, axis)[batch] for record in tutor_runs.values())


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean with its 95 % interval by Student's t; a single value has no interval.

    All nan if there are no values, or if any is nan. The mean over only those seeds that got so far
    would be a mean over the fast ones.
    """
    if not values or any(map(math.isnan, values)):
        return Estimate(math.nan, math.nan, math.nan, tuple(values))
    center = mean(values)
    half_width = math.nan
    if len(values) > 1:
        half_width = T_QUANTILES[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Estimate(center, center - half_width, center + half_width, tuple(values))


def difference(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], axis: Axis, cost: float
) -> Estimate:
    """Returns accuracy of `ours` less that of `theirs` at a cost, paired by common seeds."""
    return paired(ours, theirs, lambda record: at_cost(record, axis, cost))


def paired(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], value: Callable[[Record], float]
) -> Estimate:
    """Returns a value of `ours` less that of `theirs`, paired by common seeds."""
    # Runs with one seed see the same questions in the same order, so pairs vary less than runs.
    seeds = [seed for seed in ours if seed in theirs]
    return estimate([value(ours[seed]) - value(theirs[seed]) for seed in seeds])


def shares(runs: Mapping[int, Record], name: str, batches: slice) -> list[float]:
    """Returns the mean of a training curve over some batches, by seed."""
    return [mean(record["batches"][name][batches]) for record in runs.values()]


def rescued_share(runs: Mapping[int, Record], batches: slice) -> float:
    """Returns the share of rollouts that ended right among those whose first attempt was wrong.

    Every wrong first attempt counts, guided or not; nan if there is none.
    """
    if not runs:
        return math.nan
    unassisted, assisted = (
        mean(shares(runs, name, batches)) for name in ("unassisted", "assisted")
    )
    return (assisted - unassisted) / (1 - unassisted) if unassisted < 1 else math.nan


def unassisted_by_rescues(runs: Iterable[Record], edges: Sequence[int]) -> list[tuple[float, int]]:
    """Counts how often a fact is right unassisted, by how often it was rescued before in that run.

    A fact is one element's mass. It is rescued if one attempt has it wrong and the next one right.
    A first attempt falls into bin i if there were at least edges[i] and less than edges[i + 1]
    rescues in earlier batches (the last bin has no upper edge).

    Returns:
        For each bin: (share of first attempts with the mass right, their number); nan for none.
    """
    right = [0] * len(edges)
    seen = [0] * len(edges)
    for record in runs:
        rescues: dict[str, int] = {}
        for facts in record["facts"]:
            for symbol, (used, correct, _, rescued) in facts.items():
                i = max(bisect_left(edges, rescues.get(symbol, 0) + 1) - 1, 0)
                seen[i] += used
                right[i] += correct
                rescues[symbol] = rescues.get(symbol, 0) + rescued
    return [(r / n if n else math.nan, n) for r, n in zip(right, seen, strict=True)]
