"""One run of the study, in a process of its own, and what is kept of it: a record.

    python -m bench.learning.run '{"stage": "main", ..}'       prints the record as one line of JSON

Read main -> train -> record_of. The run's folder is temporary; the record holds its settings, its
curves, the student's checksum and the versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.builtin_student.dialogues import ATOMIC_NUMBERS
from bench.learning.plan import ARMS, EVAL_EVERY_BATCHES, Run
from socpo_fast.config import load_config
from socpo_fast.report.environment import environment
from socpo_fast.report.rollouts import read_rollouts
from socpo_fast.report.tracker import read_metrics
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES
from socpo_fast.trainer import Trainer

CONFIG = Path(__file__).parents[2] / "configs" / "molar_mass.toml"
UPDATES_A_BATCH = 2
# Of every run, beside what its arm says.
COMMON: dict[str, Any] = {
    "run.threads": 1,
    "run.live": False,
    "run.resume": "never",
    "run.checkpoint_every_updates": 0,
    "run.keep_checkpoints": 1,
    "eval.every_updates": EVAL_EVERY_BATCHES * UPDATES_A_BATCH,
    "eval.samples": 2,
    "eval.assisted": False,
}
# What is kept of a batch's metrics, and under which name.
CURVES = {
    "unassisted": "success/unassisted",
    "assisted": "success/assisted",
    "rescued": "guidance/rescue_rate",
    "decay_1": "decay/f_1",
    "tokens": "perf/decode_tokens",
}
LINE = re.compile(r"^([A-Z][a-z]?): [0-9] x ([0-9]{1,3}) = ", re.MULTILINE)


class TimedTrainer(Trainer):
    """A trainer that counts the processor seconds of each batch, which other work on the machine
    changes less than those of the clock."""

    batch_cpu_s: list[float]

    def run_batches(self) -> None:
        self.batch_cpu_s = []
        super().run_batches()

    def run_batch(self) -> None:
        started = time.process_time()
        super().run_batch()
        self.batch_cpu_s.append(time.process_time() - started)


def main() -> None:
    run, student = Run(**json.loads(sys.argv[1])), Path(sys.argv[2])
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        record = train(run, student, Path(folder))
    print(json.dumps(record), file=out)


def train(run: Run, student: Path, folder: Path) -> dict[str, Any]:
    """Trains in `folder`/run.name; returns the record."""
    started = time.perf_counter()
    settings = COMMON | dict(ARMS[run.arm].settings)
    settings |= {"run.num_batches": run.num_batches, "run.seed": run.seed, "train.lr": run.lr}
    place = {"run.dir": str(folder), "run.name": run.name, "student.path": str(student)}
    trainer = TimedTrainer(load_config(CONFIG, settings | place))
    trainer.run()
    return {
        "run": asdict(run),
        "settings": settings,
        "student": hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest()[:16],
        "environment": environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.perf_counter() - started, 1),
        **curves_of(folder / run.name, trainer.batch_cpu_s),
    }


def curves_of(folder: Path, batch_cpu_s: Iterable[float]) -> dict[str, Any]:
    """Evaluations, batches and facts of a finished run."""
    rows = read_metrics(folder / "metrics.jsonl")
    batches = [row for row in rows if row["kind"] == "batch"]
    evals = [row for row in rows if row["kind"] == "eval"]
    curves = {
        name: [rounded(row.get(metric)) for row in batches] for name, metric in CURVES.items()
    }
    return {
        "evals": {
            "batch": [row["batch"] for row in evals],
            "unassisted": [rounded(row["success/unassisted"]) for row in evals],
        },
        "batches": curves | {"cpu_s": [round(seconds, 3) for seconds in batch_cpu_s]},
        "facts": [
            facts_of(read_rollouts(path)) for path in sorted(folder.glob("rollouts/*.jsonl"))
        ],
    }


def facts_of(rollouts: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Of one batch, by element that the student holds wrong: [first attempts that use its mass,
    those that have it right, wrong ones followed by another attempt, those put right there]."""
    counts: Counter[tuple[str, int]] = Counter()
    for rollout in rollouts:
        attempts = [dict(LINE.findall(turn["text"])) for turn in rollout["turns"]]
        for symbol in ATOMIC_NUMBERS:
            right = [
                attempt.get(symbol) == str(ATOMIC_MASSES[symbol])
                for attempt in attempts
                if symbol in attempt
            ]
            if not right:
                continue
            counts[symbol, 0] += 1
            counts[symbol, 1] += right[0]
            for before, after in pairwise(right):
                counts[symbol, 2] += not before
                counts[symbol, 3] += not before and after
    return {symbol: [counts[symbol, i] for i in range(4)] for symbol in ATOMIC_NUMBERS}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
