"""Small training runs of the built-in task, and the checks that each of them must pass.

A run takes seconds, so a campaign can make hundreds. Read Faults, then lost_or_misrewarded, which
every part calls on every run folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from socpo_fast.cli import main
from socpo_fast.config.text import to_text
from socpo_fast.report.rollouts import read_rollouts
from socpo_fast.report.tracker import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "molar_mass.toml"
SMALL: dict[str, Any] = {
    "run.num_batches": 2,
    "run.live": False,
    "data.builtin_train_questions": 64,
    "data.builtin_eval_questions": 4,
    "data.eval": "none",
    "rollout.questions_per_batch": 4,
    "rollout.group_size": 4,
    "train.questions_per_update": 2,
    "engine.kv_cache_gib": 0.05,
    "eval.samples": 1,
}
# A shell that starts a process in the background makes it ignore SIGINT, and children inherit that.
# So the child installs Python's usual handler before it runs.
PROGRAM = """
import signal, sys
from socpo_fast.cli import main
from socpo_fast.config.text import to_text
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""
# Metrics that differ between two runs which did the same: everything else must be equal.
TIMED = ("time/", "perf/rollout_tok_s", "perf/train_tok_s")


@dataclass
class Promise:
    """A line of the table: what is promised, which test checks it, and how often it held."""

    promise: str
    test: str
    injected: int = 0
    num_broken: int = 0
    broken: list[str] = field(default_factory=list)
    figure: str = ""

    def check(self, case: str, *faults: str | None) -> None:
        """Counts one injected fault; `faults` say what it broke, None where nothing broke."""
        self.injected += 1
        broken = [fault for fault in faults if fault]
        self.num_broken += bool(broken)
        self.broken += [f"{case}: {fault}" for fault in broken]
        print(f"  {'BROKEN' if broken else 'held':<7}{case}  {'; '.join(broken)}", flush=True)


@dataclass
class Faults:
    """A campaign: the folder of its runs, its random numbers, and whether it is the short one."""

    folder: Path
    seed: int
    short: bool
    num_rollouts: int = 0  # rollouts whose rewards were computed again
    num_wrong: int = 0  # of those, rollouts lost or with a wrong reward
    num_runs: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        """Returns the overrides of a run; the keyword section__key stands for section.key."""
        overrides = {key.replace("__", "."): value for key, value in changes.items()}
        return SMALL | {"run.dir": str(self.folder), "run.name": name} | overrides

    def train(self, name: str, **changes: Any) -> Outcome:
        """Runs `socpo train` in this process and returns its outcome."""
        self.num_runs += 1
        out = io.StringIO()
        err = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), told() as lines:
            code = main(self.words(name, **changes))
        return Outcome(code, out.getvalue(), err.getvalue() + "".join(lines))

    def start(self, name: str, **changes: Any) -> subprocess.Popen[str]:
        """Starts the same in a child process; the caller has to end it or wait for it."""
        self.num_runs += 1
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *self.words(name, **changes)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_and_see(self, name: str, **changes: Any) -> tuple[subprocess.Popen[str], IO[str]]:
        """Starts the same, returns when a batch is trained: (process, its further output)."""
        process = self.start(name, **changes)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train batch"):
                break
        return process, process.stdout

    def words(self, name: str, **changes: Any) -> list[str]:
        """Returns the command line of a run."""
        arguments = ["train", "--config", str(CONFIG)]
        for key, value in self.settings(name, **changes).items():
            arguments += [f"--{key}", to_text(value)]
        return arguments

    def audit(self, name: str, **changes: Any) -> str | None:
        """Returns what is lost or wrongly rewarded in a run's rollouts; None if nothing is."""
        settings = self.settings(name, **changes)
        folder = self.folder / name
        rows = read_metrics(folder / "metrics.jsonl")
        num_batches = max((row["batch"] for row in rows), default=0)
        wrong: list[str] = []
        for batch in range(1, num_batches + 1):
            rollouts = read_rollouts(folder / "rollouts" / f"batch_{batch:06d}.jsonl")
            num_expected = settings["rollout.questions_per_batch"] * settings["rollout.group_size"]
            faults = lost_or_misrewarded(rollouts, num_expected)
            self.num_rollouts += len(rollouts)
            self.num_wrong += len(faults)
            wrong += [f"batch {batch} {line}" for line in faults]
        return "; ".join(wrong[:3]) or None


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def must_end(self, code: int, *, saying: str = "") -> str | None:
        """Returns what is wrong with the outcome; None if code and text are right, no traceback."""
        if self.code != code:
            return f"exit code {self.code} instead of {code}: {self.err[-200:]!r}"
        # Whatever happens, a user sees a message and never a traceback.
        if "Traceback" in self.out + self.err:
            return "a traceback"
        if saying not in self.out + self.err:
            return f"never said {saying!r}, but {self.err[-200:]!r}"
        return None


@contextmanager
def told() -> Iterator[list[str]]:
    """Collects warnings as lines, each of them however often it was shown before."""
    lines: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: lines.append(f"warning: {message}\n")
        yield lines


def lost_or_misrewarded(rows: list[dict[str, Any]], num_expected: int) -> list[str]:
    """Grades and rewards a batch's rollouts again, from their texts; returns what is wrong.

    The reward of attempt n is its grade times f_n, with f_0 = 1 and f_n the mean reward of all
    attempts before the n-th (the schedule batch_mean). A rollout ends when an attempt is right,
    when no guidance came, or after the last attempt. So each attempt but the first follows
    guidance.
    """
    # Distinct pairs: a rollout that was written twice must not hide a lost one.
    num_rollouts = len({(row["question_idx"], row["rollout_idx"]) for row in rows})
    wrong = (
        [] if num_rollouts == num_expected else [f"has {num_rollouts} rollouts of {num_expected}"]
    )
    attempts: list[tuple[int, float, float, str]] = []
    for row in rows:
        place_name = f"question {row['question_idx']} rollout {row['rollout_idx']}"
        for idx, turn in enumerate(row["turns"]):
            grade = float(last_answer(turn["text"]) == row["ground_truth"])
            attempts.append((idx, grade, turn["reward"], f"{place_name} attempt {idx}"))
            guidance = turn["guidance"]
            is_shown = guidance is not None and guidance["was_shown"]
            is_last = idx == len(row["turns"]) - 1
            if not is_last and not is_shown:
                wrong.append(f"{place_name}: attempt {idx + 1} follows without guidance")
            if is_last and row["end_reason"] == "guidance_failed" and guidance is not None:
                wrong.append(f"{place_name}: ended for want of guidance, and has one")
    # factors[n] needs all rewards of earlier attempts, so it is built up one attempt at a time.
    factors = [1.0]
    for n in range(1, 1 + max((idx for idx, *_ in attempts), default=0)):
        earlier_rewards = [factors[idx] * grade for idx, grade, *_ in attempts if idx < n]
        factors.append(sum(earlier_rewards) / len(earlier_rewards))
    for idx, grade, reward, place_name in attempts:
        if abs(reward - factors[idx] * grade) > 1e-6:
            wrong.append(f"{place_name}: reward {reward} instead of {factors[idx] * grade}")
    return wrong


def last_answer(text: str) -> str:
    """Returns the text of the last <answer> block, as the built-in task defines an answer."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else text.strip()


def differences(folder: Path, straight: Path) -> str | None:
    """Returns where a disturbed run differs from a straight one; None if they are bitwise equal."""
    if untimed(folder) != untimed(straight):
        return "its metrics differ"
    if manifest(folder) != manifest(straight):
        return "its last checkpoint differs"
    for path in sorted((straight / "rollouts").iterdir()):
        if (folder / "rollouts" / path.name).read_bytes() != path.read_bytes():
            return f"its {path.name} differs"
    return None


def untimed(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics without those that depend on time."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def manifest(folder: Path) -> Any:
    """Returns the last checkpoint's name and its manifest, which has the hash of every file."""
    last = max((folder / "checkpoints").glob("update_*"))
    return last.name, json.loads((last / "manifest.json").read_text(encoding="utf-8"))


def batch_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "batch"]
