"""Draws curves as SVG text, for the report. Read draw; curves.svg is its jinja2 template.

Everything is drawn with plain shapes and text, so a browser shows it without any library.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Of a panel's plotted area, in the units of the SVG.
WIDTH = 340
HEIGHT = 170
COLOURS = ("#1f5fa8", "#d9730d", "#8fb8de", "#f2c39b")
MOST_POINTS = 1000  # of a line; the width of a panel shows no more
# Step between ticks for an axis that ends at up to so many times a power of ten, as its multiple.
STEPS = ((1, 0.2), (2, 0.5), (5, 1), (10, 2))


class Line(NamedTuple):
    """A curve, and an area to shade around it: from low to high at band_xs."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    band_xs: Sequence[float] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Panel(NamedTuple):
    """Curves over one pair of axes; a unit of "share" has the axis from 0 to 1."""

    title: str
    x_label: str
    unit: str
    lines: Sequence[Line]
    colours: Sequence[str] = COLOURS


def draw(panels: Sequence[Panel], *, columns: int, title: str) -> str:
    """Returns panels, `columns` in a row, as one <svg> element; title is for screen readers."""
    template = environment().from_string(
        Path(__file__).with_name("curves.svg").read_text(encoding="utf-8")
    )
    return template.render(
        panels=[_shapes(panel) for panel in panels],
        columns=columns,
        title=title,
        width=WIDTH,
        height=HEIGHT,
    )


def environment() -> Any:
    """Returns the jinja2 environment of the report's templates: texts are escaped."""
    # Imported late: training and `socpo eval` do not need it.
    from jinja2 import Environment, StrictUndefined

    return Environment(
        # StrictUndefined: a misspelt name in a template is an error, not an empty string.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shapes(panel: Panel) -> dict[str, Any]:
    """Returns a panel's texts, ticks and points, as the template places them."""
    x_ticks = _ticks(max((x for line in panel.lines for x in line.xs), default=1), least_step=1)
    is_share = panel.unit == "share"
    y_ticks = _ticks(max((y for line in panel.lines for y in line.ys if not is_share), default=1))

    # Points of a line, or around a band.
    def points(xs: Sequence[float], ys: Sequence[float]) -> str:
        every = -(-len(xs) // MOST_POINTS) or 1
        # Counted from the end, so that the last value is always there.
        pairs = list(zip(xs, ys, strict=False))[::-every]
        return " ".join(
            f"{WIDTH * x / x_ticks[-1]:.1f},{HEIGHT * (1 - y / y_ticks[-1]):.1f}" for x, y in pairs
        )

    return {
        "panel": panel,
        "x_ticks": [(tick, WIDTH * tick / x_ticks[-1]) for tick in x_ticks],
        "y_ticks": [(tick, HEIGHT * (1 - tick / y_ticks[-1])) for tick in y_ticks],
        "lines": [
            {
                "label": line.label,
                "colour": colour,
                "points": points(line.xs, line.ys),
                "band": points([*line.band_xs, *line.band_xs[::-1]], [*line.low, *line.high[::-1]]),
            }
            for line, colour in zip(panel.lines, panel.colours, strict=False)
            if line.xs
        ],
    }


def _ticks(end: float, least_step: float = 0) -> list[float]:
    """Returns round numbers from 0 to `end` or a little more; to 1 if `end` is not above 0."""
    end = end if end > 1e-9 else 1.0
    power = 10.0 ** math.floor(math.log10(end))
    step = max(power * next(step for most, step in STEPS if end <= power * most), least_step)
    return [step * count for count in range(math.ceil(end / step) + 1)]
