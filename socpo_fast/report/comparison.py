"""Compares a run on the built-in task with recorded runs that had no teacher.

Read compare, then card. molar_mass_curves.json holds the recorded curves: means over the seeds of
docs/learning.md, at equal numbers of sampled tokens. bench/learning/figures.py writes that file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from socpo_fast.files import read_json
from socpo_fast.report.accuracy import sparkline

RECORDED = Path(__file__).parent / "molar_mass_curves.json"


class Curve(NamedTuple):
    """Unassisted accuracy on held-out questions, over the tokens sampled in training so far.

    low, high: minimum and maximum over the runs whose mean the curve is; empty for a single run.
    """

    title: str
    tokens: Sequence[float]
    accuracy: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def compare(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Returns this run's curve, then the recorded ones; [] where a comparison would be unfair.

    It is unfair with another student, teacher or task, or with other settings of the evaluation. It
    also needs an evaluation of the untrained student and at least one after it.
    """
    tokens = 0.0
    points: list[tuple[float, float]] = []
    for row in rows:
        # Rows are in the order of time, so `tokens` is what training had sampled by this row.
        rollout_tokens = (row.get("perf/rollout_tok_s") or 0.0) * (row.get("time/rollout_s") or 0.0)
        # Runs of older versions do not count them in total.
        tokens = row.get("perf/tokens_total") or tokens + rollout_tokens
        if row["kind"] == "eval" and row.get("success/unassisted") is not None:
            points.append((tokens, row["success/unassisted"]))
    recorded = read_json(RECORDED)
    is_comparable = all(
        settings.get(section, {}).get(key) == value
        for section, table in recorded["settings"].items()
        for key, value in table.items()
    )
    if len(points) < 2 or points[0][0] or not tokens or not is_comparable:
        return []
    return [
        Curve("this run", *zip(*points, strict=True)),
        *(Curve(**curve) for curve in recorded["curves"]),
    ]


def card(curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]]) -> str:
    """Draws the curves as a small table, with this run's training accuracy, for a terminal."""
    width = max(len(curve.title) for curve in curves)
    columns = numpy.linspace(0, curves[0].tokens[-1], 4).tolist()
    phases = {
        name: [row[key] for row in rows if row["kind"] == "batch" and row.get(key) is not None]
        for name, key in (("assisted", "success/assisted"), ("unassisted", "success/unassisted"))
    }
    lines = [
        "What the teacher bought: held-out questions right alone, at the first attempt, after so "
        "many sampled tokens",
        " " * width + "".join(f"{tokens / 1000:7.0f}k" for tokens in columns),
        *(
            f"{curve.title:{width}}"
            + "".join(f"{share:>8}" for share in _shares_at(columns, curve))
            for curve in curves
        ),
        "Training batches of this run: assisted answers come first, and unassisted ones follow",
        *(f"{name:{width}}  {sparkline(shares)}" for name, shares in phases.items()),
    ]
    return "\n".join(lines)


def _shares_at(columns: Sequence[float], curve: Curve) -> list[str]:
    """Interpolates a curve's accuracy at numbers of tokens; "-" beyond its last point."""
    shares = numpy.interp(columns, curve.tokens, curve.accuracy)
    return [
        f"{100 * share:.0f} %" if tokens <= curve.tokens[-1] else "-"
        for tokens, share in zip(columns, shares, strict=True)
    ]
