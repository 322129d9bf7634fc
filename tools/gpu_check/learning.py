"""Stage `learning`: the built-in task on the card, through the trainer, as a newcomer runs it.

It must end, do the same twice, begin with the answers that the CPU gives, and take guidance from a
local teacher; in bf16 as in fp32. Whether it learns is not the question: three batches are too few.
"""

from __future__ import annotations

import atexit
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from socpo_fast import load_student
from socpo_fast.config import load_config
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions
from socpo_fast.trainer import train
from tools.gpu_check.check import ROOT, Check, Part, check_close
from tools.gpu_check.training import mismatch_of

CONFIG = ROOT / "configs" / "molar_mass.toml"
NUM_BATCHES = 3
SMALL: dict[str, Any] = {"rollout.questions_per_batch": 8, "train.questions_per_update": 4}
# Without decay, as in so few questions no first attempt may be right, and help would earn nothing:
# updates would have no signal.
TINY: dict[str, Any] = {
    "rollout.questions_per_batch": 4,
    "rollout.group_size": 4,
    "train.questions_per_update": 2,
}
TINY |= {"reward.schedule": "none"}


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
    """Metrics without what may differ between two equal runs; the most memory is the process's."""
    timed = ("time", "perf/rollout_tok_s", "perf/train_tok_s", "perf/peak_memory_gib")
    return [{key: x for key, x in row.items() if not key.startswith(timed)} for row in rows]


@functools.cache
def in_dtype(check: Check, dtype: str) -> Path:
    """The folder of a run of all batches, its figures written down; made once for all parts."""
    holder = tempfile.TemporaryDirectory()
    atexit.register(holder.cleanup)
    folder = run(check, Path(holder.name), dtype, str(check.device), **{"student.dtype": dtype})
    evals = metrics_of(folder, "eval")
    batches = metrics_of(folder, "batch")
    check.figure("learning.rollout_s", batches[-1]["time/rollout_s"], of=dtype)
    check.figure("learning.update_s", batches[-1]["time/update_s"], of=dtype)
    check.figure("learning.unassisted_start", evals[0]["success/unassisted"], of=dtype)
    check.figure("learning.unassisted_end", evals[-1]["success/unassisted"], of=dtype)
    check.figure("learning.guidance_rate", batches[0]["guidance/rate"], of=dtype)
    return folder


def narrow(check: Check) -> str:
    """What a card trains in; a CPU refuses it."""
    return "bfloat16" if check.is_cuda else "float32"


def twice(check: Check) -> None:
    """Two runs on the card are equal; the first batch's rollouts are mostly the CPU's."""
    first = in_dtype(check, "float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once = {"run.num_batches": 1, "data.eval": None}
        second = run(check, folder, "b", str(check.device), **once)
        equal = repeats(first, second)
        check.figure("learning.repeats", float(equal), of="float32")
        cpu = run(check, folder, "cpu", "cpu", **once)
        check.figure("learning.equal_rollouts", share_equal(first, cpu), of="beside the CPU")
        compare_first_updates(first, cpu)
        assert equal, "two runs with the same settings differ; compare their metrics.jsonl"


def repeats(first: Path, second: Path) -> bool:
    """Whether all that the shorter run wrote of its batches is what the other wrote."""
    return all(
        untimed(metrics_of(second, kind)) == untimed(metrics_of(first, kind))[:count]
        for kind, count in (("batch", 1), ("update", len(metrics_of(second, "update"))))
    )


def share_equal(ours: Path, theirs: Path) -> float:
    """Of the first batch's rollouts, those with equal texts in all turns."""
    answers = [
        [[turn["text"] for turn in row["turns"]] for row in rollouts_of(folder, 1)]
        for folder in (ours, theirs)
    ]
    return sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])


def bf16_beside_fp32(check: Check) -> None:
    """The same batches in bf16: they end, they repeat, and each update's loss and gradient.

    Rollouts part at the first near tie that rounding decides, so updates are of other tokens: a
    difference says whether bf16 learns alike, not how large its rounding is (stage `training`).
    """
    wide = in_dtype(check, "float32")
    thin = in_dtype(check, narrow(check))
    check.figure("learning.equal_rollouts", share_equal(thin, wide), of="bf16 beside fp32")
    pairs = list(zip(*(metrics_of(folder, "update") for folder in (thin, wide)), strict=True))
    lines = ["update: loss and gradient norm in bf16, in fp32"]
    worst = dict.fromkeys(("policy/loss", "policy/grad_norm"), 0.0)
    for number, (ours, theirs) in enumerate(pairs, 1):
        values = [f"{row[key]:.4g}" for row in (ours, theirs) for key in worst]
        lines.append(f"{number}: {', '.join(values)}")
        loss = abs(ours["policy/loss"] - theirs["policy/loss"])
        norm = abs(ours["policy/grad_norm"] / max(theirs["policy/grad_norm"], 1e-30) - 1)
        worst = dict(zip(worst, map(max, worst.values(), (loss, norm)), strict=True))
        if number == 1:
            check.figure("learning.loss_difference", loss, of="first update")
            check.figure("learning.grad_norm_difference", norm, of="first update")
    check.figure("learning.loss_difference", worst["policy/loss"], of="worst update")
    check.figure("learning.grad_norm_difference", worst["policy/grad_norm"], of="worst update")
    check.note("\n".join(lines))
    rows = metrics_of(thin, "update")
    worst_nats = max(row["policy/sampler_mismatch_nats"] for row in rows)
    check.figure("learning.mismatch_max_nats", worst_nats, of="first group of each batch")
    with tempfile.TemporaryDirectory() as name:
        changes = {"student.dtype": narrow(check), "run.num_batches": 1, "data.eval": None}
        equal = repeats(thin, run(check, Path(name), "again", str(check.device), **changes))
    check.figure("learning.repeats", float(equal), of=narrow(check))
    assert equal, "two runs in bf16 differ; compare their metrics.jsonl"


def mismatch(check: Check) -> None:
    """The trainer's log-probs beside the sampler's, over answers to the task's own questions."""
    dtype = narrow(check)
    student = load_student(STUDENT_DIR, dtype=dtype, device=str(check.device))
    bridge = Bridge(load_tokenizer(STUDENT_DIR), guidance_limit=64)
    prompts = [bridge.prompt_ids(question.messages) for question in questions(0, 2)]
    differences = mismatch_of(student, prompts, 8 if check.tiny else 128)
    of = f"built-in student, {dtype}"
    check.figure("learning.mismatch_mean_nats", float(differences.mean()), of=of)
    check.figure("learning.mismatch_max_nats", float(differences.max()), of=of)


def old_logprobs(check: Check) -> None:
    """One batch in bf16 with each source of old log-probs: what it takes, how far ratios are off.

    Before the first update every ratio is 1 but for rounding: recomputed ones come from the same
    forward, the sampler's from other kernels.
    """
    dtype = narrow(check)
    with tempfile.TemporaryDirectory() as name:
        for choice in ("recompute", "sampler"):
            changes = {"student.dtype": dtype, "loss.old_logprobs": choice, "data.eval": None}
            changes |= {"run.num_batches": 1}
            folder = run(check, Path(name), choice, str(check.device), **changes)
            rows = metrics_of(folder, "update")
            # An update of groups that are all right or all wrong forwards nothing.
            first = next(row for row in rows if row["policy/ratio_mean"] is not None)
            of = f"{choice}, {dtype}"
            check.figure("learning.ratio_error", abs(first["policy/ratio_mean"] - 1), of=of)
            check.figure("learning.clip_fraction", first["policy/clip_fraction"], of=of)
            (batch,) = metrics_of(folder, "batch")
            check.figure("learning.update_s", batch["time/update_s"], of=of)


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
        "teacher.max_new_tokens": 128,  # cut within its reasoning it would be no guidance
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


PARTS: dict[str, Part] = {
    "twice": twice,
    "bf16 beside fp32": bf16_beside_fp32,
    "mismatch": mismatch,
    "old log-probs": old_logprobs,
    "local teacher": local_teacher,
}
