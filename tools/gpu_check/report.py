"""Prints results: one row for each figure, as text on the terminal and as a Markdown page."""

from __future__ import annotations

import math

from tools.gpu_check.results import Figure, Results, StageResult

HEADER = ("figure", "value", "limit", "of limit", "predicted", "goal", "verdict")


def number(value: float | None) -> str:
    """Formats a number with three significant digits, without an exponent if it is readable."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    # Counts are shown as they are.
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def row_of(figure: Figure) -> tuple[str, ...]:
    """Returns a figure's cells, in the order of HEADER."""
    share = "" if figure.share is None else f"{100 * figure.share:.0f} %"
    name = figure.key if not figure.of else f"{figure.key}: {figure.of}"
    return (
        name,
        f"{number(figure.value)} {figure.unit}".strip(),
        number(figure.limit),
        share,
        number(figure.predicted),
        number(figure.goal),
        figure.verdict,
    )


def figure_line(figure: Figure) -> str:
    """Returns one figure as a line, for printing while the stage runs."""
    name, value, limit, share, predicted, goal, verdict = row_of(figure)
    # A list times a bool keeps an entry or drops it.
    details = [f"limit {limit} ({share})"] * bool(limit)
    details += [f"predicted {predicted}"] * bool(predicted) + [f"goal {goal}"] * bool(goal)
    return f"{name}: {', '.join([value, *details])}  {verdict}".rstrip()


def outcome_line(stage: StageResult) -> str:
    """Returns how a stage ended, as a line."""
    seconds = f" in {stage.seconds:.0f} s" if stage.seconds else ""
    message = f": {stage.message.splitlines()[0]}" if stage.message else ""
    return f"{stage.name}: {stage.status}{seconds}{message}"


def to_text(results: Results) -> str:
    """Returns each stage's outcome, its failures in full, and an aligned table of all figures."""
    rows = [row_of(figure) for stage in results.stages.values() for figure in stage.figures]
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    ran = [stage for stage in results.stages.values() if stage.status != "not run"]
    lines = [line for stage in ran for line in _stage_lines(stage)]
    lines.append("")
    for row in [HEADER, *rows]:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def to_markdown(results: Results) -> str:
    """Returns the same as a Markdown page: machine, outcomes, failures, tables, notes."""
    lines = ["# gpu_check", ""]
    lines += [
        f"- {key}: {value}" for key, value in results.run.items() if key not in ("kind", "plan")
    ]
    lines += ["", "| stage | outcome | seconds | revision | |", "|---|---|---|---|---|"]
    for stage in results.stages.values():
        message = _escape(stage.message.splitlines()[0]) if stage.message else ""
        cells = stage.name, stage.status, f"{stage.seconds:.0f}", stage.revision, message
        lines.append(f"| {' | '.join(cells)} |")
    for stage in results.stages.values():
        if stage.status != "not run":
            lines += _markdown_stage(stage)
    return "\n".join(lines) + "\n"


def _stage_lines(stage: StageResult) -> list[str]:
    lines = [outcome_line(stage)]
    lines += [f"  FAILED {case['case']}: {case['message']}" for case in stage.failures]
    return lines + [f"  skipped {case['case']}: {case['message']}" for case in stage.skips]


def _markdown_stage(stage: StageResult) -> list[str]:
    lines = ["", f"## {stage.name}", ""]
    for case in stage.failures:
        lines += [f"Failed, {case['case']}:", "", *_block(case["message"]), ""]
    for case in stage.skips:
        lines += [f"Skipped, {case['case']}: {_escape(case['message'])}", ""]
    if stage.figures:
        lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
        lines += [f"| {' | '.join(map(_escape, row_of(figure)))} |" for figure in stage.figures]
    for note in stage.notes:
        lines += ["", *_block(note)]
    return lines


def _block(text: str) -> list[str]:
    """Returns text as a Markdown code block."""
    return [f"    {line}" for line in text.splitlines()]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
