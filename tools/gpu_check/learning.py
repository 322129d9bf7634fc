"""Stage `learning`: trains the built-in task on the card, as a newcomer would run it.

A run must end, be repeatable, start with the answers that the CPU gives, and accept guidance from a
local teacher, in bf16 as well as in fp32. Three batches are too few to show whether it learns.
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
# Without decay of rewards. Among so few questions it can happen that no first attempt is right.
# With decay, attempts after guidance would then earn nothing, and updates would have no signal.
TINY: dict[str, Any] = {
    "rollout.questions_per_batch": 4,
    "rollout.group_size": 4,
    "train.questions_per_update": 2,
}
TINY |= {"reward.schedule": "none"}


def run(check: Check, folder: Path, name: str, device: str, **changes: Any) -> Path:
    """Trains for a few batches; returns the run's folder."""
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
    """Returns a run's metrics of one kind: batch, update or eval."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


def rollouts_of(folder: Path, batch: int) -> list[dict[str, Any]]:
    """Returns a run's recorded rollouts of one batch."""
    text = (folder / "rollouts" / f"batch_{batch:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns metrics without those that may differ between two equal runs."""
    # Peak memory is that of the process, which may have run something larger before.
    timed = ("time", "perf/rollout_tok_s", "perf/train_tok_s", "perf/peak_memory_gib")
    return [{key: x for key, x in row.items() if not key.startswith(timed)} for row in rows]


@functools.cache
def in_dtype(check: Check, dtype: str) -> Path:
    """Trains all batches in a dtype, once for all parts; records figures, returns the folder."""
    temporary = tempfile.TemporaryDirectory()
    # The folder must outlive this part: later parts compare with it.
    atexit.register(temporary.cleanup)
    folder = run(check, Path(temporary.name), dtype, str(check.device), **{"student.dtype": dtype})
    evals = metrics_of(folder, "eval")
    batches = metrics_of(folder, "batch")
    check.figure("learning.rollout_s", batches[-1]["time/rollout_s"], of=dtype)
    check.figure("learning.update_s", batches[-1]["time/update_s"], of=dtype)
    check.figure("learning.unassisted_start", evals[0]["success/unassisted"], of=dtype)
    check.figure("learning.unassisted_end", evals[-1]["success/unassisted"], of=dtype)
    check.figure("learning.guidance_rate", batches[0]["guidance/rate"], of=dtype)
    return folder


def narrow(check: Check) -> str:
    """Returns the dtype that a card trains in; a CPU refuses bf16."""
    return "bfloat16" if check.is_cuda else "float32"


def twice(check: Check) -> None:
    """Checks that two runs on the card are equal, and their first rollouts mostly the CPU's."""
    first = in_dtype(check, "float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # One batch is enough to see whether a run repeats.
        once = {"run.num_batches": 1, "data.eval": None}
        second = run(check, folder, "b", str(check.device), **once)
        equal = repeats(first, second)
        check.figure("learning.repeats", float(equal), of="float32")
        cpu = run(check, folder, "cpu", "cpu", **once)
        check.figure("learning.equal_rollouts", share_equal(first, cpu), of="beside the CPU")
        compare_first_updates(first, cpu)
        assert equal, "two runs with the same settings differ; compare their metrics.jsonl"


def repeats(first: Path, second: Path) -> bool:
    """Whether the metrics of the shorter second run are the first ones of the other."""
    return all(
        untimed(metrics_of(second, kind)) == untimed(metrics_of(first, kind))[:count]
        for kind, count in (("batch", 1), ("update", len(metrics_of(second, "update"))))
    )


def share_equal(ours: Path, theirs: Path) -> float:
    """Returns the share of the first batch's rollouts with equal texts in all turns."""
    answers = [
        [[turn["text"] for turn in row["turns"]] for row in rollouts_of(folder, 1)]
        for folder in (ours, theirs)
    ]
    return sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])


def bf16_beside_fp32(check: Check) -> None:
    """Trains the same batches in bf16 and compares each update's loss and gradient norm with fp32.

    Rollouts differ from the first near tie that rounding decides, so updates see other tokens. The
    differences show whether bf16 learns in the same way. How large its rounding is, stage
    `training` measures.
    """
    fp32_run = in_dtype(check, "float32")
    bf16_run = in_dtype(check, narrow(check))
    check.figure("learning.equal_rollouts", share_equal(bf16_run, fp32_run), of="bf16 beside fp32")
    pairs = list(
        zip(*(metrics_of(folder, "update") for folder in (bf16_run, fp32_run)), strict=True)
    )
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
    rows = metrics_of(bf16_run, "update")
    worst_nats = max(row["policy/sampler_mismatch_nats"] for row in rows)
    check.figure("learning.mismatch_max_nats", worst_nats, of="first group of each batch")
    with tempfile.TemporaryDirectory() as name:
        changes = {"student.dtype": narrow(check), "run.num_batches": 1, "data.eval": None}
        equal = repeats(bf16_run, run(check, Path(name), "again", str(check.device), **changes))
    check.figure("learning.repeats", float(equal), of=narrow(check))
    assert equal, "two runs in bf16 differ; compare their metrics.jsonl"


def mismatch(check: Check) -> None:
    """Compares the trainer's log-probs with the sampler's, on the task's own questions."""
    dtype = narrow(check)
    student = load_student(STUDENT_DIR, dtype=dtype, device=str(check.device))
    bridge = Bridge(load_tokenizer(STUDENT_DIR), guidance_limit=64)
    prompts = [bridge.prompt_ids(question.messages) for question in questions(0, 2)]
    differences = mismatch_of(student, prompts, 8 if check.tiny else 128)
    of = f"built-in student, {dtype}"
    check.figure("learning.mismatch_mean_nats", float(differences.mean()), of=of)
    check.figure("learning.mismatch_max_nats", float(differences.max()), of=of)


def old_logprobs(check: Check) -> None:
    """Trains a batch in bf16 with each source of old log-probs: update time, and error of ratios.

    Before the first update every ratio is 1 up to rounding. Recomputed log-probs come from the same
    forward as the new ones, the sampler's from other kernels.
    """
    dtype = narrow(check)
    with tempfile.TemporaryDirectory() as name:
        for choice in ("recompute", "sampler"):
            changes = {"student.dtype": dtype, "loss.old_logprobs": choice, "data.eval": None}
            changes |= {"run.num_batches": 1}
            folder = run(check, Path(name), choice, str(check.device), **changes)
            rows = metrics_of(folder, "update")
            # An update whose groups are all right or all wrong has no advantages and forwards
            # nothing.
            first = next(row for row in rows if row["policy/ratio_mean"] is not None)
            of = f"{choice}, {dtype}"
            check.figure("learning.ratio_error", abs(first["policy/ratio_mean"] - 1), of=of)
            check.figure("learning.clip_fraction", first["policy/clip_fraction"], of=of)
            (batch,) = metrics_of(folder, "batch")
            check.figure("learning.update_s", batch["time/update_s"], of=of)


def compare_first_updates(ours: Path, theirs: Path) -> None:
    """Checks the first gradient's norm against the CPU's, if both have the same rollouts."""
    # Gradients of different rollouts cannot be compared.
    if rollouts_of(ours, 1) != rollouts_of(theirs, 1):
        return
    norms = [metrics_of(folder, "update")[0]["policy/grad_norm"] for folder in (ours, theirs)]
    actual, truth = (torch.tensor([norm], dtype=torch.float64) for norm in norms)
    check_close("norm of the first gradient", actual, truth)


def local_teacher(check: Check) -> None:
    """Trains a batch with a local teacher: a second engine with the student's own weights."""
    changes = {
        "teacher.kind": "local",
        "teacher.path": str(STUDENT_DIR),
        "teacher.max_new_tokens": 128,  # an answer cut within its reasoning is no guidance
        "teacher.kv_cache_gib": 0.25,
        "teacher.system_prompt": "Help.",  # short: each letter is a token here
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
