"""One run of the study, in a process of its own, and what is kept of it: a record.

    python -m bench.learning.run '{"stage": "main", ..}'       prints the record as one line of JSON

Read main -> train -> curves_of. The run's folder is temporary; the record holds what the run was
told beyond configs/molar_mass.toml, its curves, the student's checksum, the versions, and which
files of code differed from the revision.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
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

from bench.learning.plan import ARMS, EVAL_EVERY_BATCHES, Run
from socpo_fast.config import load_config
from socpo_fast.report.environment import environment
from socpo_fast.report.rollouts import read_rollouts
from socpo_fast.report.tracker import read_metrics
from socpo_fast.socratic.tasks.molar_mass import ATOMIC_MASSES
from socpo_fast.trainer import Trainer
from tools.builtin_student.dialogues import ATOMIC_NUMBERS

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
    run = Run(**json.loads(sys.argv[1]))
    student = Path(sys.argv[2])
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
        "uncommitted": uncommitted(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_s": round(time.perf_counter() - started, 1),
        **curves_of(folder / run.name, trainer.batch_cpu_s),
    }


def curves_of(folder: Path, batch_cpu_s: Iterable[float]) -> dict[str, Any]:
    """Reads evaluations, batches and facts of a finished run."""
    rows = read_metrics(folder / "metrics.jsonl")
    batches = [row for row in rows if row["kind"] == "batch"]
    evals = [row for row in rows if row["kind"] == "eval"]
    curves = {
        name: [rounded(row.get(metric)) for row in batches] for name, metric in CURVES.items()
    }
    rollouts = [read_rollouts(path) for path in sorted(folder.glob("rollouts/*.jsonl"))]
    return {
        "evals": {
            "batch": [row["batch"] for row in evals],
            "unassisted": [rounded(row["success/unassisted"]) for row in evals],
        },
        "batches": curves
        | {
            "tokens": [sampled_tokens(batch) for batch in rollouts],
            "cpu_s": [round(seconds, 3) for seconds in batch_cpu_s],
        },
        "facts": [facts_of(batch) for batch in rollouts],
    }


def sampled_tokens(rollouts: Iterable[Mapping[str, Any]]) -> int:
    """Counts the student's tokens of all attempts; prompts and guidance are not sampled."""
    return sum(turn["num_tokens"] for rollout in rollouts for turn in rollout["turns"])


def facts_of(rollouts: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Counts facts of one batch, by element that the student holds wrong.

    [first attempts that state its mass, those that have it right, attempts that have it wrong and
    are followed by one that states it, those of them after which it is right]
    """
    counts: Counter[tuple[str, int]] = Counter()
    for rollout in rollouts:
        attempts = [dict(LINE.findall(turn["text"])) for turn in rollout["turns"]]
        for symbol in ATOMIC_NUMBERS:
            mass = str(ATOMIC_MASSES[symbol])
            counts[symbol, 0] += symbol in attempts[0]
            counts[symbol, 1] += attempts[0].get(symbol) == mass
            for before, after in pairwise(attempts):
                is_repeated = before.get(symbol, mass) != mass and symbol in after
                counts[symbol, 2] += is_repeated
                counts[symbol, 3] += is_repeated and after[symbol] == mass
    return {symbol: [counts[symbol, i] for i in range(4)] for symbol in ATOMIC_NUMBERS}


def uncommitted() -> list[str]:
    """Lists files of code and settings that differ from the revision; [] outside a checkout."""
    words = ["git", "status", "--porcelain", "--", "*.py", "*.toml", "*.cpp", "*.h"]
    shown = subprocess.run(words, cwd=CONFIG.parent, capture_output=True, text=True, check=False)
    return [line[3:] for line in shown.stdout.splitlines()]


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


if __name__ == "__main__":
    main()
