"""Writes a run folder's report for people: report.html and curves.png. Read write_report.

The page is one file with everything inline and no script. Its content security policy lets the
browser load nothing, and jinja2 escapes whatever a model wrote, since a student may write HTML.
Where a file is missing or torn, its part of the page is left out.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from socpo_fast.config.text import to_text
from socpo_fast.files import replace_file
from socpo_fast.metrics import meaning_of
from socpo_fast.report.accuracy import accuracy_rows
from socpo_fast.report.comparison import Curve, card, compare
from socpo_fast.report.rollouts import read_rollouts
from socpo_fast.report.settings import read_settings
from socpo_fast.report.tracker import read_metrics

Rows = Sequence[dict[str, Any]]

_PAGE = Path(__file__).parent / "page.html"  # a jinja2 template

# (title, unit, {label: (kind of row, metric)}) of each panel, in order. The kind "train" stands for
# rows of batches and of updates.
PANELS: tuple[tuple[str, str, dict[str, tuple[str, str]]], ...] = (
    (
        "Accuracy",
        "share",
        {
            "unassisted, held out": ("eval", "success/unassisted"),
            "assisted, held out": ("eval", "success/assisted"),
            "unassisted, training": ("train", "success/unassisted"),
            "assisted, training": ("train", "success/assisted"),
        },
    ),
    (
        "Reward and decay",
        "reward",
        {"mean reward": ("train", "reward/mean"), "decay f_1": ("train", "decay/f_1")},
    ),
    (
        "Guidance",
        "share",
        {
            "rollouts guided": ("train", "guidance/rate"),
            "guided ones rescued": ("train", "guidance/rescue_rate"),
            "answer leaked": ("train", "guidance/leak_rate"),
        },
    ),
    ("Entropy", "nats", {"entropy": ("train", "policy/entropy")}),
    ("Gradient norm", "before clipping", {"gradient norm": ("train", "policy/grad_norm")}),
    (
        "Time",
        "seconds a batch",
        {"rollout": ("batch", "time/rollout_s"), "update": ("batch", "time/update_s")},
    ),
)
COLOURS = ("#1f5fa8", "#d9730d", "#8fb8de", "#f2c39b")


def write_report(run_folder: str | Path) -> Path:
    """Writes curves.png and report.html into a run folder; returns the page's path.

    Raises:
        ValueError: no such folder, or one without the files of a run.
    """
    folder = Path(run_folder).expanduser()
    if not any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "rollouts")):
        raise ValueError(
            f"report: {folder} must be a run folder, got none there; train first, or check the name"
        )
    rows = read_metrics(folder / "metrics.jsonl")
    curves = draw_curves(rows) if rows else b""
    if rows:
        replace_file(folder / "curves.png", curves)
    path = folder / "report.html"
    # A model or a file name may hold half a letter (a lone surrogate), which UTF-8 cannot store.
    replace_file(path, render(folder, rows, curves).encode("utf-8", "backslashreplace"))
    return path


def report_note(run_folder: Path) -> str:
    """Writes the report of a finished run; returns lines to print.

    On the built-in task the lines begin with the comparison of comparison.py. A failure becomes a
    line as well: a run that trained for hours must not end in an error because of its page.
    """
    try:
        path = write_report(run_folder)
        rows = read_metrics(run_folder / "metrics.jsonl")
        curves = compare(read_settings(run_folder), rows)
        return (card(curves, rows) + "\n" if curves else "") + f"report: {path}"
    except Exception as error:  # noqa: BLE001 - returned as a line to print
        return f"report: {run_folder / 'report.html'} was not written ({error})"


def render(folder: Path, rows: Rows, curves: bytes) -> str:
    """Renders the page as HTML."""
    # jinja2 and matplotlib are imported late: training and `socpo eval` do not need them.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        # StrictUndefined: a misspelt name in page.html is an error, not an empty string.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: "unknown" if share is None else f"{100 * share:.1f} %",
        "number": lambda value: "" if value is None else f"{value:.4g}",
        "text": to_text,
        "inline": lambda png: "data:image/png;base64," + base64.b64encode(png).decode(),
    }
    settings = read_settings(folder)
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        num_updates=max((row["update"] for row in rows), default=0),
        num_batches=max((row["batch"] for row in rows), default=0),
        headline=headline(rows),
        accuracy=accuracy_rows(next((row for row in reversed(rows) if row["kind"] == "eval"), {})),
        comparison=draw_comparison(compare(settings, rows)),
        curves=curves,
        changes=first_and_last(rows),
        times=time_split(rows),
        samples=sample_rollouts(folder),
        config=settings,
    )


def series(rows: Rows, source: str, name: str) -> tuple[list[int], list[float]]:
    """Returns (updates, values) of a metric, from the rows of one kind that have it.

    Args:
        source: "eval", "batch", "update", or "train" for batches and updates.
    """
    kinds = ("batch", "update") if source == "train" else (source,)
    chosen = [row for row in rows if row["kind"] in kinds and row.get(name) is not None]
    return [row["update"] for row in chosen], [row[name] for row in chosen]


def headline(rows: Rows) -> dict[str, Any]:
    """Returns accuracy at start and end: held out if there were evaluations, else in training."""
    source = "eval" if series(rows, "eval", "success/unassisted")[1] else "train"
    _, unassisted = series(rows, source, "success/unassisted")
    _, assisted = series(rows, source, "success/assisted")
    ends = (
        {"start": unassisted[0], "end": unassisted[-1]}
        if unassisted
        else {"start": None, "end": None}
    )
    return {
        "source": "held-out questions" if source == "eval" else "training batches",
        "helped_end": assisted[-1] if assisted else None,
        **ends,
    }


def first_and_last(rows: Rows) -> list[dict[str, Any]]:
    """Returns every metric of the run that METRICS explains, with its first and last value."""
    entries = []
    for kind in ("eval", "batch", "update"):
        for name in dict.fromkeys(name for row in rows if row["kind"] == kind for name in row):
            _, values = series(rows, kind, name)
            if values and (meaning := meaning_of(name)):
                entries.append(
                    {
                        "kind": kind,
                        "name": name,
                        "meaning": meaning,
                        "first": values[0],
                        "last": values[-1],
                    }
                )
    return entries


def time_split(rows: Rows) -> dict[str, float]:
    """Returns the total seconds of each phase, from the batch rows."""
    batches = [row for row in rows if row["kind"] == "batch"]
    totals = {
        phase: sum(row.get(f"time/{phase}_s") or 0.0 for row in batches)
        for phase in ("rollout", "update", "total")
    }
    other_s = totals["total"] - totals["rollout"] - totals["update"]
    return {"rollout": totals["rollout"], "update": totals["update"], "the rest": max(other_s, 0.0)}


def sample_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Returns one rollout of each outcome from the first, the middle and the last batch."""
    paths = sorted(folder.glob("rollouts/batch_*.jsonl"))
    chosen = sorted({0, len(paths) // 2, len(paths) - 1}) if paths else []
    samples = []
    for path in (paths[i] for i in chosen):
        by_outcome: dict[str, dict[str, Any]] = {}
        # setdefault keeps the first rollout of each outcome, so the same run gives the same page.
        for rollout in read_rollouts(path):
            by_outcome.setdefault(outcome(rollout), rollout)
        samples += [
            {"outcome": kind, **by_outcome[kind]} for kind in OUTCOMES if kind in by_outcome
        ]
    return samples


OUTCOMES = ("rescued by guidance", "never right", "right alone")


def outcome(rollout: dict[str, Any]) -> str:
    """Returns which of OUTCOMES a rollout had."""
    verdicts = [turn["is_correct"] for turn in rollout["turns"]]
    if not any(verdicts):
        return "never right"
    return "right alone" if verdicts[0] else "rescued by guidance"


def draw_curves(rows: Rows) -> bytes:
    """Draws PANELS over updates; returns a PNG file."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (title, unit, lines) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for colour, (label, (source, name)) in zip(COLOURS, lines.items(), strict=False):
            updates, values = series(rows, source, name)
            if values:
                axes.plot(
                    updates,
                    values,
                    label=label,
                    color=colour,
                    marker="o" if source == "eval" else ".",
                )
            (interval_updates, low), (_, high) = (
                series(rows, source, f"{name}{suffix}") for suffix in ("_low", "_high")
            )
            # Only evaluations have intervals.
            if low and len(low) == len(high):
                axes.fill_between(
                    interval_updates, low, high, color=colour, alpha=0.15, linewidth=0
                )
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set(xlabel="update", ylabel=unit)
    return _png(figure)


def draw_comparison(curves: Sequence[Curve]) -> bytes:
    """Draws this run's and the recorded curves over sampled tokens; returns a PNG file.

    b"" if there are no curves.
    """
    from matplotlib.figure import Figure

    if not curves:
        return b""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for colour, curve in zip((COLOURS[0], COLOURS[1], "#5b6675"), curves, strict=False):
        axes.plot(curve.tokens, curve.accuracy, label=curve.title, color=colour, marker=".")
        if curve.low:
            axes.fill_between(
                curve.tokens, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )
    axes.set(xlim=(0, curves[0].tokens[-1]), xlabel="tokens sampled in training", ylabel="share")
    return _png(figure)


def _png(figure: Any) -> bytes:
    """Gives all panels the same frame, scale and legend, and returns the figure as a PNG file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        # All shares on the same scale, so that panels and runs can be compared by eye.
        axes.set_ylim((-0.02, 1.02) if axes.get_ylabel() == "share" else (0, None))
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
