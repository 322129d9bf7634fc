"""Stage `learning`: the built-in task on the card, through the trainer, as a newcomer runs it.

It must end, do the same twice, begin with the answers that the CPU gives, and take guidance from a
local teacher. Whether it learns is not the question: three batches are too few.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from socpo_fast.config import load_config
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR
from socpo_fast.trainer import train
from tools.gpu_check.check import Check, Part, check_close
from tools.gpu_check.lines import ROOT

CONFIG = ROOT / "configs" / "molar_mass.toml"
NUM_BATCHES = 3
SMALL = {"rollout.questions_per_batch": 8, "train.questions_per_update": 4}
TINY = {"rollout.questions_per_batch": 2, "rollout.group_size": 2, "train.questions_per_update": 1}


def run(check: Check, folder: Path, name: str, device: str, **changes: Any) -> Path:
    """Train for a few batches; returns the run's folder."""
    overrides: dict[str, Any] = {
        "run.dir": str(folder),
        "run.name": name,
        "run.device": device,
        "run.live": False,
        "run.num_batches": 1 if check.tiny else NUM_BATCHES,
        "data.builtin_eval_questions": 2 if check.tiny else 32,
        "eval.every_updates": 0,
        "eval.samples": 1,
        "eval.assisted": False,
    }
    overrides |= TINY if check.tiny else SMALL
    train(load_config(CONFIG, overrides | changes))
    return folder / name


def metrics_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def rollouts_of(folder: Path, batch: int) -> list[dict[str, Any]]:
    text = (folder / "rollouts" / f"batch_{batch:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what may differ between two equal runs."""
    timed = ("time", "perf/rollout_tok_s", "perf/train_tok_s")
    return [{key: x for key, x in row.items() if not key.startswith(timed)} for row in rows]


def twice(check: Check) -> None:
    """Two runs on the card are equal; the first batch's rollouts are mostly the CPU's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = run(check, folder, "a", str(check.device))
        once = {"run.num_batches": 1, "data.eval": None}
        second = run(check, folder, "b", str(check.device), **once)
        evals, batches = metrics_of(first, "eval"), metrics_of(first, "batch")
        check.figure("learning.rollout_s", batches[-1]["time/rollout_s"])
        check.figure("learning.update_s", batches[-1]["time/update_s"])
        check.figure("learning.unassisted_start", evals[0]["success/unassisted"])
        check.figure("learning.unassisted_end", evals[-1]["success/unassisted"])
        check.figure("learning.guidance_rate", batches[0]["guidance/rate"])
        equal = all(
            untimed(metrics_of(second, kind)) == untimed(metrics_of(first, kind))[:count]
            for kind, count in (("batch", 1), ("update", len(metrics_of(second, "update"))))
        )
        check.figure("learning.repeats", float(equal))
        cpu = run(check, folder, "cpu", "cpu", **once)
        answers = [
            [[turn["text"] for turn in row["turns"]] for row in rollouts_of(run_folder, 1)]
            for run_folder in (first, cpu)
        ]
        num_equal = sum(a == b for a, b in zip(*answers, strict=True))
        check.figure("learning.equal_rollouts", num_equal / len(answers[0]))
        compare_first_updates(first, cpu)
        assert equal, "two runs with the same settings differ; compare their metrics.jsonl"


def compare_first_updates(ours: Path, theirs: Path) -> None:
    """The first gradient's norm on the card is the CPU's, if it was taken of the same rollouts."""
    if rollouts_of(ours, 1) != rollouts_of(theirs, 1):
        return
    norms = [metrics_of(folder, "update")[0]["policy/grad_norm"] for folder in (ours, theirs)]
    actual, truth = (torch.tensor([norm], dtype=torch.float64) for norm in norms)
    check_close("norm of the first gradient", actual, truth)


def local_teacher(check: Check) -> None:
    """One batch with a second engine as the teacher: the student's own folder."""
    changes = {
        "teacher.kind": "local",
        "teacher.path": str(STUDENT_DIR),
        "teacher.max_new_tokens": 32,
        "teacher.kv_cache_gib": 0.25,
        "teacher.system_prompt": "Help.",  # the built-in tokenizer has a token a letter
        "teacher.user_template": "{question} {student_answer}",
        "run.num_batches": 1,
        "data.eval": None,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = run(check, Path(name), "local", str(check.device), **changes)
        (batch,) = metrics_of(folder, "batch")
        rate = batch["guidance/rate"]
        check.figure("learning.guidance_rate", rate, of="local teacher")
        assert rate > 0, "the local teacher gave no guidance"


PARTS: dict[str, Part] = {"twice": twice, "local teacher": local_teacher}
