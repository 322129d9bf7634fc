"""Stores the study's records: one line of JSON a run, appended as runs end, read back by name.

results.jsonl has every run of the committed plan that ended, also those that failed; these have
"error" in place of curves.
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
    """Returns the records of finished runs by name; of a run made twice, the first one counts."""
    by_name: dict[str, Record] = {}
    for record in records:
        if "error" not in record:
            by_name.setdefault(run_of(record).name, record)
    return by_name


def append_result(record: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Appends a record on a line of its own, even if the file ends in half a line after a crash."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        if is_torn:
            file.write("\n")
        append_row(file, record)


def run_of(record: Mapping[str, Any]) -> Run:
    """Returns the run that a record is of."""
    return Run(**record["run"])


def missing(runs: Iterable[Run], records: Mapping[str, Record]) -> list[Run]:
    """Returns the runs that have no record yet."""
    return [run for run in runs if run.name not in records]


def at_end(record: Record) -> float:
    """Returns a run's accuracy at its end, the mean of the last two evaluations."""
    # The mean of two has half the variance of one.
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
    """Returns each arm's learning rate by the plan's rule, for arms whose rates were all tried."""
    # Among equal scores the lowest rate wins.
    return {
        arm: max(scores, key=lambda lr: (scores[lr], -lr))
        for arm, scores in rate_scores(records).items()
        if len(scores) == len(RATES)
    }
