"""Stage `batch`: runs whole batches of a student with random weights, and compares their plan.

A batch has rollouts with a rule as the teacher, credit, and updates, as in a trainer. The time of
each phase is compared with the least time that its bytes and FLOPs need (report/batch_time.py), the
peak memory with the planned one (report/memory_plan.py). Answers run to their token limit, so all
lengths are known beforehand. Verdicts are a hash of the answer's text; half are right.
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
from socpo_fast.training.optimizer import gradient_bytes
from socpo_fast.training.update import Updater
from socpo_fast.types import Question, Rollout, SamplingParams
from tools.gpu_check.check import Check, Part
from tools.gpu_check.groups import GroupShape, make_rollouts
from tools.gpu_check.models import CONFIGS, make_model

GUIDANCE = "Look again at the first step, and count the atoms of each element."
SETTINGS: dict[str, Any] = {"data.eval": None, "train.lr": 1e-6}
# Half of the usual questions, with short answers: keeps a card busy and does not take long.
WHOLE: dict[str, Any] = {"rollout.questions_per_batch": 16, "rollout.max_new_tokens": 256}
# The largest updates that the plan allows.
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
MAX_OFF = 0.1  # relative error of the planned peak memory that is accepted


class Batch(NamedTuple):
    """Times and rollouts of one batch."""

    rollout_s: float
    update_s: float
    rollouts: list[Rollout]


def plan_of(check: Check, model: str, settings: dict[str, Any]) -> Plan:
    """Returns the plan that a run on this card makes, with the rates measured on it."""
    changes = SETTINGS | settings | (TINY if check.tiny else {})
    # A rehearsal on a CPU plans for an H100 as well: the plan needs a card, the run does not.
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
        # The plan reads a model's shape from its folder; weights need not be there.
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        config = load_config(None, changes | {"student.path": name})
        return make_plan(config, folder, card, is_training=True)


class Run:
    """The parts of a trainer, in the sizes of a plan."""

    def __init__(self, check: Check, plan: Plan):
        self.config = plan.config
        self.device = check.device
        student = make_model(plan.model, device=check.device, dtype=check.dtype)
        self.updater = Updater(student, plan.config, reference=None)
        self.engine = Engine(
            student,
            **plan.config.engine.model_dump(),
            # The KV cache must be large enough to hold the gradients, which borrow its memory in an
            # update.
            min_memory_bytes=sum(gradient_bytes(student.parameters())),
        )
        self.tokenizer = load_tokenizer(STUDENT_DIR)
        limit = plan.config.rollout.guidance_limit
        self.bridge = Bridge(self.tokenizer, guidance_limit=limit)
        self.questions = questions(0, plan.config.rollout.questions_per_batch)

    def batch(self, batch_idx: int) -> Batch:
        """Makes one batch: rollouts, credit and updates."""
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
            # Rollouts come in the order in which they end; credit and updates need them by
            # question.
            key=lambda rollout: (rollout.question_idx, rollout.rollout_idx),
        )
        rolled_out = self.now()
        self.update(rollouts)
        return Batch(rolled_out - started, self.now() - rolled_out, rollouts)

    def update(self, rollouts: list[Rollout]) -> None:
        """Gives a batch its credit and makes its updates."""
        credit = credit_options(self.config)
        _, advantages_A = assign_credit(rollouts, options=credit, device=self.device)
        groups = [list(group) for _, group in groupby(rollouts, lambda r: r.question_idx)]
        size = self.config.train.questions_per_update
        indices = list(range(len(groups)))
        order = [indices[start : start + size] for start in range(0, len(groups), size)]
        optimizer = self.updater.optimizer
        # The pages are free between rollouts, so gradients are put into their memory.
        with self.engine.lend_memory() as memory, optimizer.gradients_in(memory):
            for progress in self.updater.microbatches(groups, order, advantages_A):
                if progress.metrics is not None:
                    self.engine.bump_policy_version()

    def now(self) -> float:
        """Returns the clock in seconds, after all work on the device has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def verdict(text: str, question: Question) -> bool:
    """Grades half of all texts as right, by a hash."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def lengths_of(rollouts: list[Rollout]) -> dict[str, int]:
    """Returns the mean tokens of a prompt, an answer and guidance."""
    attempts = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    bridges = [
        len(rollout.next_context(idx)[1])
        for rollout in rollouts
        for idx in range(len(rollout.turns) - 1)
    ]
    prompts = [len(rollout.prompt_ids) for rollout in rollouts]
    # Where every first answer is right there is no guidance, and a mean needs a number.
    num_tokens = {"prompt": prompts, "answer": attempts, "guidance": bridges or [1]}
    return {name: round(statistics.mean(counts)) for name, counts in num_tokens.items()}


def measure_memory(check: Check, plan: Plan, model: str) -> None:
    """Records the peak memory beside the plan; fails where it is off by more than a tenth."""
    if not check.is_cuda:
        return
    peak_gib = torch.cuda.max_memory_allocated(check.device) / GIB
    planned_gib = plan.peak_bytes / GIB
    check.figure("batch.peak_gib", peak_gib, of=model, limit=planned_gib)
    reserved = torch.cuda.max_memory_reserved(check.device) / GIB
    check.figure("batch.reserved_gib", reserved, of=model, limit=plan.card.total_gib)
    assert_planned(model, peak_gib, planned_gib)


def assert_planned(model: str, peak_gib: float, planned_gib: float) -> None:
    """Asserts that the peak is within MAX_OFF of the plan."""
    is_near = abs(peak_gib - planned_gib) <= MAX_OFF * planned_gib
    rule = f"within {MAX_OFF:.0%} of the planned {planned_gib:.1f}"
    assert is_near, f"{model}: GiB of tensors must be {rule}, got {peak_gib:.1f}"


def whole_batch(model: str) -> Part:
    """Returns a part that times the second of two batches; the first captures and compiles."""

    def part(check: Check) -> None:
        plan = plan_of(check, model, WHOLE)
        run = Run(check, plan)
        # The first batch compiles and captures, which a run does once.
        run.batch(0)
        batch = run.batch(1)
        num_tokens = lengths_of(batch.rollouts)
        least_s = batch_seconds(plan, **num_tokens)
        check.note(plan_table(plan, **num_tokens))
        rollout_s = sum(s for name, s in least_s.items() if name.startswith("rollouts"))
        total_s = sum(least_s.values())
        check.figure("batch.rollout_s", batch.rollout_s, of=model, limit=rollout_s)
        check.figure("batch.update_s", batch.update_s, of=model, limit=total_s - rollout_s)
        batch_s = batch.rollout_s + batch.update_s
        check.figure("batch.total_s", batch_s, of=model, limit=total_s)
        check.figure("batch.sampled_tok_s", sampled(batch.rollouts) / batch.rollout_s, of=model)

    return part


def sampled(rollouts: list[Rollout]) -> int:
    """Returns the number of sampled tokens."""
    return sum(rollout.num_sampled for rollout in rollouts)


def memory(model: str) -> Part:
    """Returns a part that makes one update in microbatches of the planned size."""

    def part(check: Check) -> None:
        plan = plan_of(check, model, LARGE)
        check.note(plan_table(plan))
        if check.is_cuda:
            torch.cuda.reset_peak_memory_stats(check.device)
        run = Run(check, plan)
        shape = TINY_GROUP if check.tiny else GROUP
        rollouts = make_rollouts(plan.model.vocab_size, shape, len(run.questions))
        for rollout in rollouts:
            # Rewards must differ within a group, else all advantages are zero and nothing is
            # forwarded.
            rollout.turns[-1].raw_reward = float(rollout.rollout_idx % 4 == 0)
        run.update(rollouts)
        measure_memory(check, plan, model)

    return part


PARTS: dict[str, Part] = {
    "Qwen3-0.6B": whole_batch("Qwen3-0.6B"),
    "Qwen3-1.7B": whole_batch("Qwen3-1.7B"),
    "memory of 4B": memory("Qwen3-4B"),
}
