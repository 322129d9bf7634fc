"""Stage `batch`: one whole batch of a student with random weights, beside its plan.

Rollouts with a rule as the teacher, credit, and the batch's updates, as a trainer makes them. The
time of each phase stands beside the least that its bytes and FLOPs take (report/batch_time.py), the
most memory beside what was planned (report/memory_plan.py). Answers go on to their limit, so
lengths are known beforehand; a verdict is drawn from the text of an answer, and half are right.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from socpo_fast.config import load_config
from socpo_fast.engine import Engine
from socpo_fast.report.batch_time import batch_seconds
from socpo_fast.report.cards import CARDS, GIB, card_of
from socpo_fast.report.memory_plan import CONTEXT_BYTES, Plan, make_plan
from socpo_fast.report.plan import plan_table
from socpo_fast.session import credit_options, rollout_options
from socpo_fast.socratic.bridge import Bridge, load_tokenizer
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR, questions
from socpo_fast.train.optimizer import gradient_bytes
from socpo_fast.train.update import Updater
from socpo_fast.types import Question, Rollout, SamplingParams
from tools.gpu_check.check import Check, Part
from tools.gpu_check.groups import GroupShape, make_rollouts
from tools.gpu_check.models import CONFIGS, make_model

GUIDANCE = "Look again at the first step, and count the atoms of each element."
SETTINGS: dict[str, Any] = {"data.eval": None, "train.lr": 1e-6}
# Half of the usual questions with short answers: enough to keep a card busy, and soon over.
WHOLE: dict[str, Any] = {"rollout.questions_per_batch": 16, "rollout.max_new_tokens": 256}
# Updates as large as the plan lets them be.
LARGE: dict[str, Any] = {"rollout.questions_per_batch": 4, "train.questions_per_update": 4}
# Two groups fill a microbatch of 16,384 tokens.
GROUP = GroupShape(300, 590, 130)
TINY_GROUP = GroupShape(12, 4, 3, rollouts=2)
TINY: dict[str, Any] = {
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 8,
    "rollout.guidance_limit": 100,
    "data.max_prompt_tokens": 64,
    "train.questions_per_update": 1,
    "engine.max_running": 4,
    "engine.kv_cache_gib": 0.01,
}
MAX_OFF = 0.1  # of the most memory from what was planned


class Batch(NamedTuple):
    """What one batch took."""

    rollout_s: float
    update_s: float
    rollouts: list[Rollout]


def plan_of(check: Check, model: str, settings: dict[str, Any]) -> Plan:
    """The plan that a run on this card makes, with the rates that were measured on it."""
    changes = SETTINGS | settings | (TINY if check.tiny else {})
    changes |= {"run.device": "cuda", "student.dtype": str(check.dtype).removeprefix("torch.")}
    card = card_of(check.device, CONTEXT_BYTES / GIB) if check.is_cuda else CARDS["h100"]
    ceilings = check.ceilings
    card = card._replace(
        tb_s=ceilings.copy_gb_s / 1e3,
        bf16_tflop_s=ceilings.bf16_tflop_s,
        fp32_tflop_s=ceilings.fp32_tflop_s,
        source="measured" if ceilings.are_measured else "assumed",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = CONFIGS["tiny" if check.tiny else model]
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        config = load_config(None, changes | {"student.path": name})
        return make_plan(config, folder, card, is_training=True)


class Run:
    """What a trainer has, in the sizes of a plan."""

    def __init__(self, check: Check, plan: Plan):
        self.config = plan.config
        self.device = check.device
        student = make_model(plan.model, device=check.device, dtype=check.dtype)
        self.updater = Updater(student, plan.config, reference=None)
        self.engine = Engine(
            student,
            **plan.config.engine.model_dump(),
            min_memory_bytes=sum(gradient_bytes(student.parameters())),
        )
        self.tokenizer = load_tokenizer(STUDENT_DIR)
        limit = plan.config.rollout.guidance_limit
        self.bridge = Bridge(self.tokenizer, guidance_limit=limit)
        self.questions = questions(0, plan.config.rollout.questions_per_batch)

    def batch(self, batch_idx: int) -> Batch:
        """Rolls out, credits and updates once."""
        config = self.config
        params = SamplingParams(
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            eos_ids=self.bridge.eos_ids,
            ignore_eos=True,
        )
        started = self.now()
        rollouts = sorted(
            socratic_rollouts(
                self.engine,
                self.tokenizer,
                self.questions,
                teacher=lambda request: GUIDANCE,
                grader=verdict,
                params=params,
                options=rollout_options(config),
                batch_idx=batch_idx,
                bridge=self.bridge,
            ),
            key=lambda rollout: (rollout.question_idx, rollout.rollout_idx),
        )
        rolled_out = self.now()
        self.update(rollouts)
        return Batch(rolled_out - started, self.now() - rolled_out, rollouts)

    def update(self, rollouts: list[Rollout]) -> None:
        """Credits a batch and makes its updates."""
        credit = credit_options(self.config)
        _, advantages_A = assign_credit(rollouts, options=credit, device=self.device)
        groups = [list(group) for _, group in groupby(rollouts, lambda r: r.question_idx)]
        size = self.config.train.questions_per_update
        indices = list(range(len(groups)))
        order = [indices[start : start + size] for start in range(0, len(groups), size)]
        optimizer = self.updater.optimizer
        with self.engine.lend_memory() as memory, optimizer.gradients_in(memory):
            for _ in self.updater.updates(groups, order, advantages_A):
                self.engine.bump_policy_version()

    def now(self) -> float:
        """Seconds, when all is done that was begun."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def verdict(text: str, question: Question) -> bool:
    """Right for half of all texts."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def lengths_of(rollouts: list[Rollout]) -> dict[str, int]:
    """Tokens of a prompt, an answer and guidance, on average."""
    attempts = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    bridges = [
        len(rollout.seam(idx)[1]) for rollout in rollouts for idx in range(len(rollout.turns) - 1)
    ]
    prompts = [len(rollout.prompt_ids) for rollout in rollouts]
    lengths = {"prompt": prompts, "answer": attempts, "guidance": bridges or [1]}
    return {name: round(statistics.mean(found)) for name, found in lengths.items()}


def measure_memory(check: Check, plan: Plan, model: str) -> None:
    """The most that tensors took beside the plan; off by more than a tenth fails."""
    if not check.is_cuda:
        return
    peak_gib = torch.cuda.max_memory_allocated(check.device) / GIB
    planned_gib = plan.peak_bytes / GIB
    check.figure("batch.peak_gib", peak_gib, of=model, limit=planned_gib)
    reserved = torch.cuda.max_memory_reserved(check.device) / GIB
    check.figure("batch.reserved_gib", reserved, of=model, limit=plan.card.total_gib)
    assert_planned(model, peak_gib, planned_gib)


def assert_planned(model: str, peak_gib: float, planned_gib: float) -> None:
    is_near = abs(peak_gib - planned_gib) <= MAX_OFF * planned_gib
    rule = f"within {MAX_OFF:.0%} of the planned {planned_gib:.1f}"
    assert is_near, f"{model}: GiB of tensors must be {rule}, got {peak_gib:.1f}"


def whole_batch(model: str) -> Part:
    """Part that times the second of two batches; the first captures graphs and compiles."""

    def part(check: Check) -> None:
        plan = plan_of(check, model, WHOLE)
        run = Run(check, plan)
        run.batch(0)
        took = run.batch(1)
        lengths = lengths_of(took.rollouts)
        least = batch_seconds(plan, **lengths)
        check.note(plan_table(plan, **lengths))
        rollout_s = sum(s for name, s in least.items() if name.startswith("rollouts"))
        total_s = sum(least.values())
        check.figure("batch.rollout_s", took.rollout_s, of=model, limit=rollout_s)
        check.figure("batch.update_s", took.update_s, of=model, limit=total_s - rollout_s)
        both = took.rollout_s + took.update_s
        check.figure("batch.total_s", both, of=model, limit=total_s)
        check.figure("batch.sampled_tok_s", sampled(took.rollouts) / took.rollout_s, of=model)

    return part


def sampled(rollouts: list[Rollout]) -> int:
    return sum(rollout.num_sampled for rollout in rollouts)


def memory(model: str) -> Part:
    """Part that makes one update whose microbatches are as large as planned, of random answers."""

    def part(check: Check) -> None:
        plan = plan_of(check, model, LARGE)
        check.note(plan_table(plan))
        if check.is_cuda:
            torch.cuda.reset_peak_memory_stats(check.device)
        run = Run(check, plan)
        shape = TINY_GROUP if check.tiny else GROUP
        rollouts = make_rollouts(plan.model.vocab_size, shape, len(run.questions))
        for rollout in rollouts:
            rollout.turns[-1].raw_reward = float(rollout.rollout_idx % 4 == 0)
        run.update(rollouts)
        measure_memory(check, plan, model)

    return part


PARTS: dict[str, Part] = {
    "Qwen3-0.6B": whole_batch("Qwen3-0.6B"),
    "Qwen3-1.7B": whole_batch("Qwen3-1.7B"),
    "memory of 4B": memory("Qwen3-4B"),
}
