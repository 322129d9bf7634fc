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


def runs_of(records: Iterable[Record], stage: Stage, student: str, arm: str) -> dict[int, Record]:
    """The records of one arm's finished runs on one student, by seed."""
    chosen: dict[int, Record] = {}
    for record in finished(records).values():
        run = run_of(record)
        if (run.stage, run.student, run.arm) == (stage, student, arm):
            chosen[run.seed] = record
    return dict(sorted(chosen.items()))


def costs(record: Record, axis: Axis) -> list[float]:
    """What training had taken by the end of batch 0, 1, ..: batches, sampled tokens or seconds."""
    batches = record["batches"]
    each = [1] * len(batches["tokens"]) if axis == "batches" else batches[axis]
    return list(accumulate(each, initial=0))


def curve(record: Record, axis: Axis) -> tuple[list[float], list[float]]:
    """(costs, unassisted held-out accuracies) at the evaluations of a run."""
    by_batch = costs(record, axis)
    evals = record["evals"]
    return [by_batch[batch] for batch in evals["batch"]], list(evals["unassisted"])


def at_cost(record: Record, axis: Axis, cost: float) -> float:
    """Accuracy at a cost, on the line between the two evaluations around it.

    nan beyond the last one.
    """
    xs, ys = curve(record, axis)
    if not xs[0] <= cost <= xs[-1]:
        return math.nan
    after = max(bisect_left(xs, cost), 1)
    share = (cost - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def at_end(record: Record) -> float:
    """Mean of the last two evaluations."""
    return mean(record["evals"]["unassisted"][-2:])


def cost_until(record: Record, axis: Axis, accuracy: float) -> float:
    """What it took to reach an accuracy, by the same lines; inf where it was not reached."""
    xs, ys = curve(record, axis)
    for i, y in enumerate(ys):
        if y >= accuracy:
            if i == 0:
                return xs[0]
            share = (accuracy - ys[i - 1]) / (y - ys[i - 1])
            return xs[i - 1] + share * (xs[i] - xs[i - 1])
    return math.inf


def tutor_cost(tutor_runs: Mapping[int, Record], axis: Axis, batch: int) -> float:
    """What the tutor's runs had taken by the end of a batch, mean over seeds."""
    return mean(costs(record, axis)[batch] for record in tutor_runs.values())


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of Student's t; no width is known of one value."""
    center = mean(values)
    half = math.nan
    if len(values) > 1:
        half = T_QUANTILES[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return Estimate(center, center - half, center + half, tuple(values))


def difference(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], axis: Axis, cost: float
) -> Estimate:
    """Accuracy of `ours` less that of `theirs` at a cost, paired by the seeds that both have."""
    return paired(ours, theirs, lambda record: at_cost(record, axis, cost))


def paired(
    ours: Mapping[int, Record], theirs: Mapping[int, Record], value: Callable[[Record], float]
) -> Estimate:
    """A value of `ours` less that of `theirs`, paired by the seeds that both have."""
    seeds = [seed for seed in ours if seed in theirs]
    return estimate([value(ours[seed]) - value(theirs[seed]) for seed in seeds])


def shares(runs: Mapping[int, Record], name: str, batches: slice) -> list[float]:
    """A curve of training batches (unassisted, assisted, rescued), mean of a slice, by seed."""
    return [mean(record["batches"][name][batches]) for record in runs.values()]


def right_alone_by_rescues(runs: Iterable[Record], edges: Sequence[int]) -> list[tuple[float, int]]:
    """How often a fact is right alone after it has been rescued so often in the same run.

    A fact is one element's mass; a rescue is a wrong one that the next attempt puts right. Counts
    before a batch decide where its first attempts fall: in bin i if at least edges[i] and less than
    edges[i + 1] (the last bin has no end).

    Returns:
        (share of first attempts with the mass right, their number) for each bin; nan for none.
    """
    right, seen = [0] * len(edges), [0] * len(edges)
    for record in runs:
        rescues: dict[str, int] = {}
        for facts in record["facts"]:
            for symbol, (used, correct, _, rescued) in facts.items():
                i = max(bisect_left(edges, rescues.get(symbol, 0) + 1) - 1, 0)
                seen[i] += used
                right[i] += correct
                rescues[symbol] = rescues.get(symbol, 0) + rescued
    return [(r / n if n else math.nan, n) for r, n in zip(right, seen, strict=True)]
