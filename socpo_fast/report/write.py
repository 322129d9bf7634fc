"""Writes a run folder's report for people: report.html and curves.svg. Read write_report.

The page is one file with everything inline and no script. Its content security policy lets the
browser load nothing, and jinja2 escapes whatever a model wrote, since a student may write HTML.
Where a file is missing or torn, its part of the page is left out.
"""

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from socpo_fast.config.text import to_text
from socpo_fast.files import replace_file
from socpo_fast.metrics import meaning_of
from socpo_fast.report.accuracy import accuracy_rows
from socpo_fast.report.comparison import Curve, card, compare
from socpo_fast.report.curves import COLOURS, Line, Panel, draw, environment
from socpo_fast.report.evaluations import read_evaluations
from socpo_fast.report.folder import check_is_run
from socpo_fast.report.rollouts import ROLLOUT_METRICS, batch_files, read_rollouts
from socpo_fast.report.settings import read_settings
from socpo_fast.report.tracker import read_metrics

Rows = Sequence[dict[str, Any]]

MAX_EVALUATIONS = 20  # of `socpo eval` that the page shows, the newest ones
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
COMPARED = (*COLOURS[:2], "#5b6675")  # this run and the recorded ones


def write_report(run_folder: str | Path) -> Path:
    """Writes curves.svg and report.html into a run folder; returns the page's path.

    Raises:
        ValueError: no such folder, or one without the files of a run.
    """
    folder = Path(run_folder).expanduser()
    check_is_run(folder)
    # `socpo rollout` keeps its metrics beside its rollouts.
    rows = read_metrics(folder / "metrics.jsonl") or read_metrics(folder / ROLLOUT_METRICS)
    curves = draw_curves(rows) if rows else ""
    if rows:
        # A file of its own names the language, which HTML knows.
        named = curves.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        replace_file(folder / "curves.svg", named)
    path = folder / "report.html"
    # A model or a file name may hold half a letter (a lone surrogate), which UTF-8 cannot store.
    replace_file(path, render(folder, rows, curves).encode("utf-8", "backslashreplace"))
    return path


def report_note(run_folder: Path) -> str:
    """Writes the report of a finished run; returns lines to print, "" if it failed.

    On the built-in task the lines begin with the comparison of comparison.py. A failure becomes a
    warning: a run that trained for hours must not end in an error because of its page.
    """
    try:
        path = write_report(run_folder)
        rows = read_metrics(run_folder / "metrics.jsonl")
        curves = compare(read_settings(run_folder), rows)
        return (card(curves, rows) + "\n" if curves else "") + f"report: {path}"
    except Exception as error:  # noqa: BLE001 - told in a warning
        path = run_folder / "report.html"
        warnings.warn(f"report: {path} was not written ({error})", stacklevel=2)
        return ""


def render(folder: Path, rows: Rows, curves: str) -> str:
    """Renders the page as HTML."""
    templates = environment()
    templates.filters |= {
        "percent": lambda share: "unknown" if share is None else f"{100 * share:.1f} %",
        "number": lambda value: "" if value is None else f"{value:.4g}",
        "text": to_text,
    }
    settings = read_settings(folder)
    return templates.from_string(_PAGE.read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        num_updates=max((row["update"] for row in rows), default=0),
        num_batches=max((row["batch"] for row in rows), default=0),
        headline=headline(rows),
        accuracy=accuracy_rows(next((row for row in reversed(rows) if row["kind"] == "eval"), {})),
        evaluations=[
            {**entry, "rows": accuracy_rows(entry["metrics"])}
            for entry in newest_evaluations(folder)
        ],
        comparison=draw_comparison(compare(settings, rows)),
        curves=curves,
        changes=first_and_last(rows),
        times=time_split(rows),
        samples=sample_rollouts(folder),
        config=settings,
    )


def newest_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the last evaluations of eval.json; warns if the file holds something else."""
    try:
        return read_evaluations(folder)[-MAX_EVALUATIONS:]
    except ValueError as error:
        warnings.warn(f"report: evaluations are left out ({error})", stacklevel=4)
        return []


def series(
    rows: Rows, source: str, name: str, axis: str = "update"
) -> tuple[list[int], list[float]]:
    """Returns (updates, values) of a metric, from the rows of one kind that have it.

    Args:
        source: "eval", "batch", "update", or "train" for batches and updates.
        axis:   "update", or "batch" for the numbers of batches instead of updates.
    """
    kinds = ("batch", "update") if source == "train" else (source,)
    chosen = [row for row in rows if row["kind"] in kinds and row.get(name) is not None]
    return [row[axis] for row in chosen], [row[name] for row in chosen]


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
        "assisted_end": assisted[-1] if assisted else None,
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
    paths = batch_files(folder)
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


def draw_curves(rows: Rows) -> str:
    """Draws PANELS as SVG: over updates, or over batches where no update was made."""
    axis = "update" if any(row["update"] for row in rows) else "batch"
    panels = []
    for title, unit, metrics in PANELS:
        lines = []
        for label, (source, name) in metrics.items():
            # Only evaluations have intervals.
            (band_xs, low), (_, high) = (
                series(rows, source, f"{name}{end}", axis) for end in ("_low", "_high")
            )
            lines.append(Line(label, *series(rows, source, name, axis), band_xs, low, high))
        panels.append(Panel(title, axis, unit, lines))
    title = f"Accuracy, reward, guidance, entropy, gradient norm and time over {axis}s"
    return draw(panels, columns=3, title=title)


def draw_comparison(curves: Sequence[Curve]) -> str:
    """Draws this run's and the recorded curves over sampled tokens as SVG; "" if there are none."""
    lines = []
    for title, tokens, accuracy, low, high in curves:
        # Recorded curves are longer than a short run, and shown as far as this one went.
        num_points = bisect_right(tokens, curves[0].tokens[-1])
        xs, ys, low, high = (values[:num_points] for values in (tokens, accuracy, low, high))
        lines.append(Line(title, xs, ys, xs if low else (), low, high))
    panel = Panel("", "tokens sampled in training", "share", lines, COMPARED)
    title = "Unassisted accuracy over sampled tokens: this run, and recorded ones without a teacher"
    return draw([panel], columns=1, title=title) if curves else ""
