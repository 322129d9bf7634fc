"""The study's records: one line of JSON a run, appended as runs end, read back by name.

results.jsonl lists every run that was ever begun with the committed plan and ended: those with
"error" in place of curves as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from bench.learning.plan import ARMS, RATES, Run
from socpo_fast.report.tracker import append_row, read_jsonl

RESULTS = Path(__file__).parent / "results.jsonl"
Record = dict[str, Any]


def read_all(path: Path = RESULTS) -> list[Record]:
    """Reads all records, in the order in which the runs ended."""
    return read_jsonl(path, lambda record: "run" in record)


def finished(records: Iterable[Record]) -> dict[str, Record]:
    """Keeps records of finished runs, by the run's name; of runs made twice, the first."""
    found: dict[str, Record] = {}
    for record in records:
        if "error" not in record:
            found.setdefault(run_of(record).name, record)
    return found


def append_result(record: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Adds a line, behind what a machine that went down may have left half written."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        if is_torn:
            file.write("\n")
        append_row(file, record)


def run_of(record: Mapping[str, Any]) -> Run:
    return Run(**record["run"])


def missing(runs: Iterable[Run], records: Mapping[str, Record]) -> list[Run]:
    return [run for run in runs if run.name not in records]


def at_end(record: Record) -> float:
    """Averages the last two evaluations."""
    return mean(record["evals"]["unassisted"][-2:])


def rate_scores(records: Iterable[Record]) -> dict[str, dict[float, float]]:
    """Returns what the plan compares rates by: arm -> rate -> mean of the last two evaluations."""
    scores: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    for record in finished(records).values():
        run = run_of(record)
        if run.stage == "rates":
            scores[run.arm][run.lr] = at_end(record)
    return scores


def best_rates(records: Iterable[Record]) -> dict[str, float]:
    """Chooses each arm's learning rate by the plan's rule (of equal ones the least), of arms for
    which all have been tried."""
    return {
        arm: max(scores, key=lambda lr: (scores[lr], -lr))
        for arm, scores in rate_scores(records).items()
        if len(scores) == len(RATES)
    }
