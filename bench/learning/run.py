"""Makes one run of the study in its own process and prints its record as one line of JSON.

    python -m bench.learning.run '{"stage": "main", ..}' STUDENT_FOLDER

Read main -> train -> curves_of. The run's folder is temporary. The record keeps the settings beyond
configs/molar_mass.toml, the curves, the student's checksum, the versions, and the code files that
differed from the git revision.
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
# Settings of every run, in addition to its arm's.
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
# The metrics of a batch that a record keeps, by the name in the record.
CURVES = {
    "unassisted": "success/unassisted",
    "assisted": "success/assisted",
    "rescued": "guidance/rescue_rate",
    "decay_1": "decay/f_1",
}
# A line of an answer, such as "Na: 2 x 23 = 46": element, count, mass.
LINE = re.compile(r"^([A-Z][a-z]?): [0-9] x ([0-9]{1,3}) = ", re.MULTILINE)


class TimedTrainer(Trainer):
    """A trainer that measures the processor seconds of each batch.

    Other processes on the machine change them less than they change the clock's seconds.
    """

    batch_cpu_s: list[float]

    # run_batch is one batch with its updates; evaluations are outside of it and do not count.
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
    # Whatever the trainer prints goes to stderr, so that stdout is the record and nothing else.
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        record = train(run, student, Path(folder))
    print(json.dumps(record), file=out)


def train(run: Run, student: Path, folder: Path) -> dict[str, Any]:
    """Trains in the folder `folder`/run.name; returns the record."""
    started = time.perf_counter()
    settings = COMMON | dict(ARMS[run.arm].settings)
    settings |= {"run.num_batches": run.num_batches, "run.seed": run.seed, "train.lr": run.lr}
    paths = {"run.dir": str(folder), "run.name": run.name, "student.path": str(student)}
    # Not in the record: paths of this machine.
    trainer = TimedTrainer(load_config(CONFIG, settings | paths))
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
    """Counts the facts of one batch, for each element whose mass the shipped student has wrong.

    Returns for each element four counts:
        0: first attempts that state its mass,
        1: those of them that have it right,
        2: attempts that have it wrong and whose next attempt states it again,
        3: those of them whose next attempt has it right (rescues).
    """
    counts: Counter[tuple[str, int]] = Counter()
    for rollout in rollouts:
        attempts = [dict(LINE.findall(turn["text"])) for turn in rollout["turns"]]
        for symbol in ATOMIC_NUMBERS:
            mass = str(ATOMIC_MASSES[symbol])
            counts[symbol, 0] += symbol in attempts[0]
            counts[symbol, 1] += attempts[0].get(symbol) == mass
            for attempt, next_attempt in pairwise(attempts):
                is_repeated = attempt.get(symbol, mass) != mass and symbol in next_attempt
                counts[symbol, 2] += is_repeated
                counts[symbol, 3] += is_repeated and next_attempt[symbol] == mass
    return {symbol: [counts[symbol, i] for i in range(4)] for symbol in ATOMIC_NUMBERS}


def uncommitted() -> list[str]:
    """Returns the files of code and settings that differ from the revision; [] without git."""
    command = ["git", "status", "--porcelain", "--", "*.py", "*.toml", "*.cpp", "*.h"]
    status = subprocess.run(command, cwd=CONFIG.parent, capture_output=True, text=True, check=False)
    return [line[3:] for line in status.stdout.splitlines()]


def rounded(value: float | None) -> float | None:
    """Rounds to five digits, to keep the records short."""
    return None if value is None else round(value, 5)


if __name__ == "__main__":
    main()
