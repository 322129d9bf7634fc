"""Writes and reads the file of results: one JSON object a line, appended as soon as it is known.

    {"kind": "run", ..}      a run begins: machine, revision, plan
    {"kind": "begin", ..}    a stage begins; results of it from an earlier run no longer count
    {"kind": "figure", ..}   one number, with its limit, prediction and goal
    {"kind": "case", ..}     something that failed or was skipped, in words
    {"kind": "note", ..}     text worth keeping, such as the first rows of a profile
    {"kind": "stage", ..}    a stage has ended: passed, failed, killed or skipped

A line is written by one call in append mode, so processes that run at the same time cannot mix
their lines.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Better = Literal["less", "more"]
SURPRISE = 1.5  # a value off by more than this factor from its prediction is a surprise


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number.

    key names what is measured ("decode.step_ms"), `of` the case. limit is the best that the machine
    allows, predicted the expectation before the run, goal the project's aim: all in `unit`, None
    where there is none.
    """

    key: str
    of: str
    value: float
    unit: str
    better: Better = "less"
    limit: float | None = None
    predicted: float | None = None
    goal: float | None = None
    is_rehearsed: bool = False  # tiny and on a CPU: the value means nothing

    @property
    def share(self) -> float | None:
        """The share of the limit that was reached; 1 = all of it."""
        if self.limit is None or self.value == 0 or self.limit == 0:
            return None
        return self.limit / self.value if self.better == "less" else self.value / self.limit

    @property
    def verdict(self) -> str:
        """missed (short of the goal), surprise (far from the prediction), ok, or ""."""
        if self.is_rehearsed:
            return "rehearsed"
        if not math.isfinite(self.value):
            return "missed"
        if self.goal is not None:
            is_short = self.value > self.goal if self.better == "less" else self.value < self.goal
            if is_short:
                return "missed"
        if self.predicted is not None and _is_far(self.value, self.predicted):
            return "surprise"
        return "" if self.goal is None and self.predicted is None else "ok"


def _is_far(value: float, predicted: float) -> bool:
    if value <= 0 or predicted <= 0:
        return value != predicted
    return not 1 / SURPRISE <= value / predicted <= SURPRISE


@dataclass
class StageResult:
    """The latest outcome of one stage, with all that it has recorded."""

    name: str
    status: str = "not run"
    message: str = ""
    seconds: float = 0.0
    revision: str = ""
    figures: list[Figure] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)  # cases that failed
    skips: list[dict[str, Any]] = field(default_factory=list)  # cases that were skipped
    notes: list[str] = field(default_factory=list)


@dataclass
class Results:
    """The content of a results file: the last run's header and each stage's latest outcome."""

    run: dict[str, Any]
    stages: dict[str, StageResult]

    def unfinished(self) -> list[str]:
        """Returns the stages that have not passed: those that --failed runs again."""
        return [name for name, stage in self.stages.items() if stage.status != "passed"]

    def failed(self) -> list[str]:
        """Returns the stages that failed; not those cut by the deadline, which only lacked time."""
        return [name for name, stage in self.stages.items() if stage.status in ("failed", "killed")]

    def value_of(self, key: str, of: str | None = None) -> float | None:
        """Returns a figure's value: of this case, or of the first case."""
        for stage in self.stages.values():
            for figure in stage.figures:
                if figure.key == key and of in (None, figure.of):
                    return figure.value
        return None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one record; the operating system has the line when this returns."""
    line = (json.dumps(record) + "\n").encode()
    # O_APPEND makes one write atomic between processes; a buffered file could split it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        num_written = os.write(descriptor, line)
        if num_written < len(line):  # the disk is full: end the line, so that it spoils no other
            os.write(descriptor, b"\n")
    finally:
        os.close(descriptor)


def append_figure(path: Path, stage: str, figure: Figure) -> None:
    """Appends one figure, with its verdict."""
    append(path, {"kind": "figure", "stage": stage, **asdict(figure), "verdict": figure.verdict})


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of all complete lines; a machine that went away may have cut the last."""
    records = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def read_results(path: Path, names: Iterable[str]) -> Results:
    """Returns the state of every stage. Results of another device are dropped, never mixed."""
    run: dict[str, Any] = {}
    stages = {name: StageResult(name) for name in names}
    for record in read_records(path):
        if record["kind"] == "run":
            if record.get("device") != run.get("device"):
                stages = {name: StageResult(name) for name in stages}
            run = record
        elif record.get("stage") in stages:
            with contextlib.suppress(KeyError, TypeError):  # a record of another version
                _apply(record, stages)
    return Results(run, stages)


def _apply(record: dict[str, Any], stages: dict[str, StageResult]) -> None:
    """Adds one record to its stage."""
    name = record["stage"]
    kind = record["kind"]
    if kind == "begin":
        revision = record.get("revision", "")
        # The status of a stage that has begun and not ended: it stays if the process dies.
        stages[name] = StageResult(name, status="cut short", revision=revision)
        return
    stage = stages[name]
    if kind == "figure":
        names = Figure.__dataclass_fields__
        stage.figures.append(Figure(**{key: record[key] for key in names}))
    elif kind == "case":
        (stage.skips if record["status"] == "skipped" else stage.failures).append(record)
    elif kind == "note":
        stage.notes.append(record["text"])
    elif kind == "stage":
        stage.status = record["status"]
        stage.message = record["message"]
        stage.seconds = record["seconds"]
