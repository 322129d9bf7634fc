"""Draws the study's figures as SVG, and writes the curves that `make train` shows beside its own.

    python -m bench.learning.figures [--out docs/learning]

Each thin line is a run. The thick line is the mean over seeds, as far as all runs go. The same
records give the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.learning.analysis import Axis, check_alike, curve, runs_of, unassisted_by_rescues
from bench.learning.plan import ARMS, MAIN_ARMS, STUDENTS
from bench.learning.results import Record, read_all
from bench.learning.tables import DENSITIES, GUIDED_ARMS, RESCUE_EDGES
from socpo_fast.report.comparison import RECORDED

COLOURS = {"tutor": "#1f5fa8", "alone": "#c0392b", "sentence": "#d9730d", "grpo": "#7d5ba6"}
COLOURS |= {"undecayed": "#8fb8de", "trajectory": "#2e8b57", "trajectory_undecayed": "#9ccfb0"}
COLOURS |= {"answer": "#5b6675"}
AXIS_LABELS: dict[Axis, str] = {
    "batches": "batches",
    "tokens": "sampled tokens",
    "cpu_s": "seconds",
}
RECORDED_ARMS = ("alone", "sentence")
RECORDED_STEP = 10_000  # tokens between two points of a recorded curve
# The settings that a run must share with the recorded ones to be compared with them.
COMPARABLE: dict[str, dict[str, Any]] = {
    "student": {"path": "builtin"},
    "data": {"train": "builtin", "eval": "builtin", "grader": "exact"},
    "rollout": {"max_attempts": 2},
    "teacher": {"kind": "rule", "rule": "builtin"},
    "eval": {"temperature": 1.0, "top_p": 1.0},
}


def main() -> None:
    words = "Draw the study's figures and write the curves that `make train` shows."
    parser = argparse.ArgumentParser("bench.learning.figures", description=words)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/learning"), help="folder of the SVGs"
    )
    out = parser.parse_args().out
    records = read_all()
    check_alike(records)
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        save(draw(records), out / f"{name}.svg")
    RECORDED.write_text(json.dumps(recorded_curves(records), indent=1) + "\n", encoding="utf-8")


def curves_figure(records: Sequence[Record]) -> Figure:
    """Draws the main arms on the shipped student, over batches, tokens and seconds."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3, sharey=True), AXIS_LABELS, strict=True):
        for arm in MAIN_ARMS:
            draw_arm(axes, runs_of(records, "main", "shipped", arm), axis, arm)
        finish(axes, xlabel=AXIS_LABELS[axis], title="")
    return labelled(figure)


def phases_figure(records: Sequence[Record]) -> Figure:
    """Draws unassisted and assisted accuracy in training batches."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, len(GUIDED_ARMS), sharey=True)
    for axes, arm in zip(panels, GUIDED_ARMS, strict=True):
        runs = runs_of(records, "main", "shipped", arm)
        for name, style in (("assisted", "--"), ("unassisted", "-")):
            values = [record["batches"][name] for record in runs.values()]
            draw_runs(axes, [(range(1, len(v) + 1), v) for v in values], COLOURS[arm], name, style)
        finish(axes, xlabel="batches", title=ARMS[arm].title)
        if runs:
            axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("share of training rollouts")
    return figure


def credit_figure(records: Sequence[Record]) -> Figure:
    """Draws the arms of credit and decay: unassisted held out, and assisted in training."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for arm in ("tutor", "undecayed", "trajectory", "trajectory_undecayed"):
        runs = runs_of(records, "main", "shipped", arm)
        draw_arm(left, runs, "batches", arm)
        values = [record["batches"]["assisted"] for record in runs.values()]
        draw_runs(right, [(range(1, len(v) + 1), v) for v in values], COLOURS[arm], "", "--")
    finish(left, xlabel="batches", title="unassisted, held out")
    finish(right, xlabel="batches", title="assisted, training")
    return labelled(figure)


def densities_figure(records: Sequence[Record]) -> Figure:
    """Draws the main arms on each student."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, len(DENSITIES), sharey=True)
    for axes, (student, stage) in zip(panels, DENSITIES.items(), strict=True):
        for arm in MAIN_ARMS:
            draw_arm(axes, runs_of(records, stage, student, arm), "tokens", arm)
        finish(axes, xlabel="sampled tokens", title=STUDENTS[student].title)
    return labelled(figure)


def facts_figure(records: Sequence[Record]) -> Figure:
    """Draws how often a fact is right unassisted, over its earlier rescues."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm in GUIDED_ARMS:
        bins = unassisted_by_rescues(
            runs_of(records, "main", "shipped", arm).values(), RESCUE_EDGES
        )
        axes.plot([share for share, _ in bins], "o-", color=COLOURS[arm], label=ARMS[arm].title)
    axes.set_xticks(
        range(len(RESCUE_EDGES)), [f"{edge}+" if edge else "0" for edge in RESCUE_EDGES]
    )
    finish(axes, xlabel="rescues of the same fact before, in the same run", title="")
    axes.set_ylabel("right alone")
    axes.legend(frameon=False, fontsize=9)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "curves": curves_figure,
    "phases": phases_figure,
    "credit": credit_figure,
    "densities": densities_figure,
    "facts": facts_figure,
}


def draw_arm(axes: Axes, runs: Mapping[int, Record], axis: Axis, arm: str) -> None:
    """Draws an arm's held-out accuracy over its cost."""
    lines = [curve(record, axis) for record in runs.values()]
    draw_runs(axes, lines, COLOURS[arm], ARMS[arm].title, "-")


def draw_runs(
    axes: Axes,
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
    colour: str,
    label: str,
    style: str,
) -> None:
    """Draws each run as a thin line, and their mean over the costs that all of them reach."""
    if not lines:
        return
    # A mean over fewer runs beyond that would jump where a run ends.
    for xs, ys in lines:
        axes.plot(xs, ys, style, color=colour, linewidth=0.8, alpha=0.35)
    grid = np.linspace(max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines), 60)
    means = np.mean([np.interp(grid, xs, ys) for xs, ys in lines], axis=0)
    axes.plot(grid, means, style, color=colour, linewidth=2.4, label=label)


def finish(axes: Axes, *, xlabel: str, title: str) -> None:
    """Gives a panel its title, label and frame."""
    axes.set(xlabel=xlabel, ylim=(-0.02, 1.02), xlim=(0, None))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def labelled(figure: Figure) -> Figure:
    """Gives the first panel the legend and the label for all panels."""
    first = figure.axes[0]
    first.set_ylabel("unassisted accuracy, held out")
    if first.get_legend_handles_labels()[0]:
        first.legend(frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes an SVG with text as text."""
    # matplotlib would write the date and random ids; without them the same figure is the same file.
    with mpl.rc_context({"svg.hashsalt": "socpo_fast", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def recorded_curves(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the accuracy of the arms without a teacher, at equal sampled tokens.

    Each curve has mean, minimum and maximum over seeds. With them go the settings that a run must
    share to be compared (socpo_fast/report/comparison.py).
    """
    curves: list[dict[str, Any]] = []
    students: set[str] = set()
    for arm in RECORDED_ARMS:
        runs = list(runs_of(records, "main", "shipped", arm).values())
        if not runs:
            raise ValueError(f"learning: arm {arm} must have runs in results.jsonl, got none")
        last = min(curve(record, "tokens")[0][-1] for record in runs)
        grid = np.arange(0, last, RECORDED_STEP)
        values = np.array([np.interp(grid, *curve(record, "tokens")) for record in runs])
        columns = {"accuracy": values.mean(0), "low": values.min(0), "high": values.max(0)}
        curves.append(
            {"title": f"{ARMS[arm].title}, mean of {len(runs)} runs", "tokens": grid.tolist()}
            | {name: [round(share, 4) for share in column] for name, column in columns.items()}
        )
        students |= {record["student"] for record in runs}
    (student,) = students
    return {
        "source": "docs/learning.md",
        "student": student,
        "settings": COMPARABLE,
        "curves": curves,
    }


if __name__ == "__main__":
    main()
