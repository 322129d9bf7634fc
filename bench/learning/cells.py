"""Formats the cells of the study's tables: shares in per cent, means with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bench.learning.analysis import Estimate, estimate

Table = list[list[str]]
NOT_REACHED = "not reached"  # at least one run of the arm ended before that cost


def percent(share: float) -> str:
    """Writes a share in per cent; "-" for nan."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def by_seed(values: Iterable[float]) -> str:
    """Writes the shares of all seeds, one behind the other."""
    return " ".join(percent(value) for value in values)


def with_spread(values: Sequence[float]) -> str:
    """Writes a mean and half the width of its 95 % interval."""
    center, low, *_ = estimate(values)
    if math.isnan(center):
        return NOT_REACHED if values else "-"
    if math.isnan(low):
        return percent(center)
    return f"{100 * center:.1f} ± {100 * (center - low):.1f}"


def interval(found: Estimate) -> str:
    """Writes a difference in points: mean, interval, and how many seeds have the mean's sign."""
    if math.isnan(found.mean):
        return NOT_REACHED if found.values else "-"
    same_side = sum(value * found.mean > 0 for value in found.values)
    points = f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    return f"{points}, {same_side} of {len(found.values)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Writes rows as a Markdown table; the first one is its header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def batches_cell(taken: Sequence[float]) -> str:
    """Writes the batches it took, by seed; "-" for a run that never got there."""
    return " ".join(f"{batches:.0f}" if batches < float("inf") else "-" for batches in taken)
