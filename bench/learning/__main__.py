"""Does the tutor teach? Trains the built-in student in every way of plan.py, with and without one.

    python -m bench.learning                 makes the runs that results.jsonl lacks: hours
    python -m bench.learning --list          what is planned, what is there
    python -m bench.learning.tables          what came out, as in docs/learning.md
    python -m bench.learning.figures         its figures, and the curves that `make train` shows

A process a core, a run at a time each. Stop it with Ctrl-C and start it again: finished runs are
kept, those under way are made anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

from bench.learning.plan import STUDENTS, Run, compared_runs, rate_runs
from bench.learning.results import Record, append_result, best_rates, finished, missing, read_all
from bench.learning.students import CACHE, student_folder
from socpo_fast.report.environment import num_cores


def main(argv: Sequence[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.learning", description=__doc__, formatter_class=form)
    parser.add_argument("--jobs", type=int, default=num_cores(), help="processes; default: cores")
    words = "begin no run after so many minutes"
    parser.add_argument("--minutes", type=float, default=float("inf"), help=words)
    parser.add_argument("--list", action="store_true", help="show the plan and make no run")
    words = "where students are kept that are not shipped"
    parser.add_argument("--students", type=Path, default=CACHE, help=words)
    args = parser.parse_args(argv)
    if args.list:
        print_plan()
        return
    torch.set_num_threads(1)  # students are bitwise repeatable only with the same number of threads
    students = {name: student_folder(name, args.students) for name in STUDENTS if name != "first"}
    deadline = time.monotonic() + 60 * args.minutes
    # Learning rates come from the recorded stage "rates". Its student no longer exists, so that
    # stage cannot be made again.
    runs = list(compared_runs(best_rates(read_all())))
    make(missing(runs, made()), args.jobs, students, deadline)
    print(f"{len(missing(runs, made()))} of {len(runs)} runs are still to be made")


def made() -> dict[str, Record]:
    """Returns the records of all finished runs, by name."""
    return finished(read_all())


def print_plan() -> None:
    """Prints every planned run and whether it has been made."""
    records = made()
    rates = best_rates(records.values())
    runs = [*rate_runs(), *compared_runs(rates)]
    for run in runs:
        print(f"{'there  ' if run.name in records else 'missing'}  {run.name}")
    print(json.dumps({"rates": rates, "missing": len(missing(runs, records)), "of": len(runs)}))


def make(runs: Sequence[Run], jobs: int, students: Mapping[str, Path], deadline: float) -> None:
    """Makes runs in order, `jobs` at a time, and appends their records as they end."""
    waiting = list(runs)
    done = 0
    under_way: dict[Future[Record], Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or under_way:
            while waiting and len(under_way) < jobs and time.monotonic() < deadline:
                run = waiting.pop(0)
                under_way[pool.submit(make_one, run, students[run.student])] = run
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                record = future.result()
                append_result(record)
                done += 1
                print(f"{done}/{len(runs)} {run.name}: {summary(record)}", flush=True)


def make_one(run: Run, student: Path) -> Record:
    """Makes one run in its own process; returns its record, or one with the error."""
    # Threads are set in the environment, as OpenMP reads it when the process starts.
    command = [sys.executable, "-m", "bench.learning.run", json.dumps(asdict(run)), str(student)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode == 0:
        return dict(json.loads(ended.stdout))
    last_lines = ended.stderr.strip().splitlines()[-5:]
    return {"run": asdict(run), "error": f"exit code {ended.returncode}: " + "; ".join(last_lines)}


def summary(record: Record) -> str:
    """Describes a record in one line."""
    if "error" in record:
        return str(record["error"])
    curve = " ".join(f"{100 * share:.0f}" for share in record["evals"]["unassisted"])
    num_tokens = sum(record["batches"]["tokens"])
    return f"unassisted {curve} %, {num_tokens / 1e3:.0f}k tokens, {record['wall_s']} s"


if __name__ == "__main__":
    main()
