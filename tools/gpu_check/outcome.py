"""Holds and prints the outcome of a dry run of one part of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

COLUMNS = ("part", "launches", "Triton", "host reads", "uploads", "figures", "peak GiB", "result")


@dataclass
class Outcome:
    """The outcome of one part."""

    stage: str
    part: str
    num_triton: int = 0
    num_torch: int = 0
    num_reads: int = 0
    num_uploads: int = 0
    num_figures: int = 0
    peak_gib: float = 0.0
    seconds: float = 0.0
    skips: list[str] = field(default_factory=list)  # skipped cases, or the whole part
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.stage}: {self.part}"

    @property
    def result(self) -> str:
        if self.faults:
            return f"{len(self.faults)} faults"
        # A skip named like the part means that all of the part was skipped.
        prefix = f"{self.part}: "
        if self.skips and self.skips[0].startswith(prefix):
            return f"skipped: {self.skips[0].removeprefix(prefix)}"
        return f"ok, {len(self.skips)} cases skipped" if self.skips else "ok"


def lines_of(outcome: Outcome) -> list[str]:
    """Returns one line, and one more for each case that was skipped."""
    counts = f"{outcome.num_triton + outcome.num_torch} launches ({outcome.num_triton} of Triton)"
    counts += f", {outcome.num_reads} host reads, {outcome.num_figures} figures"
    memory = f"{outcome.peak_gib:.2f} GiB, {outcome.seconds:.1f} s"
    first = f"{outcome.name}: {counts}, {memory}; {outcome.result}"
    cases = outcome.skips if outcome.result.startswith("ok") else []
    return [first, *(f"    skipped: {case}" for case in cases)]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Returns a Markdown table with one row for each part."""
    rows: list[tuple[object, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for o in outcomes:
        launches = o.num_triton + o.num_torch, o.num_triton
        counts = *launches, o.num_reads, o.num_uploads, o.num_figures
        rows.append((o.name, *counts, f"{o.peak_gib:.2f}", o.result))
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]
