"""From the study's records to numbers: accuracy at equal cost, paired differences, facts.

Read at_cost, then difference. Nothing here knows the plan's arms but "tutor", whose runs set the
tokens and seconds at which others are compared.
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
# 97.5 % quantiles of Student's t, by degrees of freedom from 1 on.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean over seeds with the ends of its 95 % interval, and the values by seed."""

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
    """Picks the records of one arm's finished runs on one student, by seed."""
    chosen: dict[int, Record] = {}
    for record in finished(records).values():
        run = run_of(record)
        if (run.stage, run.student, run.arm) == (stage, student, arm):
            chosen[run.seed] = record
    return dict(sorted(chosen.items()))


def costs(record: Record, axis: Axis) -> list[float]:
    """Sums what training had taken by the end of batch 0, 1, ..: batches, tokens or seconds."""
    batches = record["batches"]
    each = [1] * len(batches["tokens"]) if axis == "batches" else batches[axis]
    return list(accumulate(each, initial=0))


def curve(record: Record, axis: Axis) -> tuple[list[float], list[float]]:
    """Returns (costs, unassisted held-out accuracies) at the evaluations of a run."""
    by_batch = costs(record, axis)
    evals = record["evals"]
    return [by_batch[batch] for batch in evals["batch"]], list(evals["unassisted"])


def at_cost(record: Record, axis: Axis, cost: float) -> float:
    """Reads the accuracy at a cost off the line between the two evaluations around it.

    nan beyond the last one.
    """
    xs, ys = curve(record, axis)
    if not xs[0] <= cost <= xs[-1]:
        return math.nan
    after = max(bisect_left(xs, cost), 1)
    share = (cost - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def cost_until(record: Record, axis: Axis, accuracy: float) -> float:
    """Returns what it took to reach an accuracy, by the same lines; inf where it never did."""
    xs, ys = curve(record, axis)
    for i, y in enumerate(ys):
        if y >= accuracy:
            if i == 0:
                return xs[0]
            share = (accuracy - ys[i - 1]) / (y - ys[i - 1])
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return math.inf


def tutor_cost(tutor_runs: Mapping[int, Record], axis: Axis, batch: int) -> float:
    """Averages what the tutor's runs had taken by the end of a batch."""
    return mean(costs(record, axis)[batch] for record in tutor_runs.values())


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean with its 95 % interval of Student's t; one value has no width.

    nan where there are no values, or where one is nan: a mean over the seeds that came so far would
    be one over the fast ones.
    """
    if not values or any(map(math.isnan, values)):
        return Estimate(math.nan, math.nan, math.nan, tuple(values))
    center = mean(values)
    half = math.nan
    if len(values) > 1:
        half = T_QUANTILES[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Estimate(center, center - half, center + half, tuple(values))


def difference(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], axis: Axis, cost: float
) -> Estimate:
    """Subtracts the accuracy of `theirs` at a cost from that of `ours`, paired by common seeds."""
    return paired(ours, theirs, lambda record: at_cost(record, axis, cost))


def paired(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], value: Callable[[Record], float]
) -> Estimate:
    """Subtracts a value of `theirs` from that of `ours`, paired by common seeds."""
    seeds = [seed for seed in ours if seed in theirs]
    return estimate([value(ours[seed]) - value(theirs[seed]) for seed in seeds])


def shares(runs: Mapping[int, Record], name: str, batches: slice) -> list[float]:
    """Averages a slice of a curve of training batches (unassisted, assisted), by seed."""
    return [mean(record["batches"][name][batches]) for record in runs.values()]


def rescued_share(runs: Mapping[int, Record], batches: slice) -> float:
    """Returns the share of rollouts that ended right of those that began wrong, over a slice.

    Every wrong first attempt counts, guided or not; nan where there is none.
    """
    if not runs:
        return math.nan
    alone, in_the_end = (mean(shares(runs, name, batches)) for name in ("unassisted", "assisted"))
    return (in_the_end - alone) / (1 - alone) if alone < 1 else math.nan


def right_alone_by_rescues(runs: Iterable[Record], edges: Sequence[int]) -> list[tuple[float, int]]:
    """Counts how often a fact is right alone after it has been rescued so often in the same run.

    A fact is one element's mass; a rescue is a wrong one that the next attempt puts right. Counts
    before a batch decide where its first attempts fall: in bin i if at least edges[i] and less than
    edges[i + 1] (the last bin has no end).

    Returns:
        (share of first attempts with the mass right, their number) for each bin; nan for none.
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
