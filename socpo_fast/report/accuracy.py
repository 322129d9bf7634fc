"""Formats accuracy for people.

accuracy_rows gives one evaluation as rows for the HTML page, accuracy_text prints the same rows for
`socpo eval`, and sparkline draws many evaluations as a row of block characters.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

_NAMES = {"unassisted": "unassisted (avg@k)", "assisted": "assisted, with the teacher's help"}


def accuracy_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a row {"what", "share", "low", "high"} for every share that has an interval.

    Shares over all questions come first, then those of single data sources.
    """
    rows: list[dict[str, Any]] = []
    by_source: list[dict[str, Any]] = []
    for key, share in metrics.items():
        match = re.fullmatch(
            r"success/(unassisted|assisted|pass_at_(\d+))(?:/(.+))?", key, re.ASCII
        )
        # The suffix belongs behind the metric and in front of a source:
        # success/unassisted/math -> success/unassisted_low/math.
        low, high = (
            metrics.get(key.replace(match[1], match[1] + suffix, 1)) if match else None
            for suffix in ("_low", "_high")
        )
        if match and None not in (share, low, high):
            name = f"pass@{match[2]}, unassisted" if match[2] else _NAMES[match[1]]
            row = {
                "what": f"{match[3]}: {name}" if match[3] else name,
                "share": share,
                "low": low,
                "high": high,
            }
            (by_source if match[3] else rows).append(row)
    if failed := metrics.get("guidance/failed"):
        for row in rows + by_source:
            if row["what"].endswith(_NAMES["assisted"]):
                row["what"] += f" ({failed:.0f} without, as guidance failed)"
    return rows + by_source


def accuracy_text(metrics: Mapping[str, Any]) -> str:
    """Returns the table as plain text, one line a row."""
    rows = accuracy_rows(metrics)
    width = max([len(row["what"]) for row in rows], default=0)
    lines = [f"{'':{width}}   share   95 % interval, by question"]
    for row in rows:
        share, low, high = (100 * row[name] for name in ("share", "low", "high"))
        lines.append(f"{row['what']:{width}} {share:5.1f} %   {low:.1f} to {high:.1f} %")
    # Without any guidance the assisted share would be the unassisted one under another name, so
    # Scores.metrics leaves it out. A reader should see why the line is missing.
    if metrics.get("guidance/failed") and "success/assisted" not in metrics:
        lines.append(
            f"{_NAMES['assisted']}: not known, as all guidance failed: {failures_text(metrics)}"
        )
    return "\n".join(lines)


def failures_text(metrics: Mapping[str, Any]) -> str:
    """Returns how often guidance failed, by kind: "timeout 3, cut 1"."""
    prefix = "guidance/failed_"
    return ", ".join(
        f"{key.removeprefix(prefix)} {n:.0f}"
        for key, n in metrics.items()
        if key.startswith(prefix)
    )


def sparkline(shares: Iterable[float]) -> str:
    """Draws shares in [0, 1] as one block character each."""
    return "".join("▁▂▃▄▅▆▇█"[min(int(share * 8), 7)] for share in shares)
