"""Injects faults into real runs and prints which promises held; exit status 1 where one did not.

    python -m tools.faults            # ten minutes on two cores
    python -m tools.faults --short    # two minutes
    python -m tools.faults --part servers --seed 7

Read run.py for what every run is held to, then the parts. docs/reliability.md has the last table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tools.faults.folders import folders
from tools.faults.functions import functions
from tools.faults.kills import kills
from tools.faults.run import Faults, Promise
from tools.faults.servers import servers
from tools.faults.steadiness import steadiness

PARTS: dict[str, Callable[[Faults], list[Promise]]] = {
    "folders": folders,
    "functions": functions,
    "servers": servers,
    "kills": kills,
    "steadiness": steadiness,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts; prints each fault as it is injected, then the table, then one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=str(__doc__))
    parser.add_argument("--short", action="store_true", help="a sample of each part, in minutes")
    parser.add_argument("--part", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of moments, damages and samples")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="socpo_faults_") as folder:
        faults = Faults(Path(folder), args.seed, args.short)
        promises: list[Promise] = []
        for part in args.part or PARTS:
            print(f"{part}:", flush=True)
            promises += PARTS[part](faults)
    # Every run of every part was audited (Faults.audit); this promise sums up what that found.
    rewards = Promise(
        "No rollout is lost, none has a reward that its text and its batch do not give it",
        "tests/test_faults.py",
        injected=faults.num_rollouts,
        num_broken=faults.num_wrong,
        broken=["a rollout, see above"] * bool(faults.num_wrong),
        figure=f"{faults.num_rollouts} rollouts of {faults.num_runs} runs graded again",
    )
    promises.append(rewards)
    print("\n" + table(promises))
    for promise in promises:
        for line in dict.fromkeys(promise.broken):  # each message once, in order
            print(f"broken: {line}")
    record = {"seed": args.seed, "seconds": time.monotonic() - started}
    print(json.dumps(record | {"promises": [asdict(promise) for promise in promises]}))
    return 1 if any(promise.broken for promise in promises) else 0


def table(promises: list[Promise]) -> str:
    """Returns a Markdown table: promise, test, faults injected, held, figure."""
    lines = ["| promise | test | injected | held | figure |", "|---|---|---:|---:|---|"]
    for promise in promises:
        held = promise.injected - promise.num_broken
        cells = (promise.promise, f"`{promise.test}`", promise.injected, held, promise.figure)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
