"""Checks that updates in bf16 follow those in fp32, on the built-in task.

A bf16 parameter has an fp32 master: the parameter holds its high bits, `low_bits` the others.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from socpo_fast.config import Config, load_config
from socpo_fast.model import load_student
from socpo_fast.ops.adamw import join_master
from socpo_fast.session import Session, credit_options
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.training.step import compute_logprobs
from socpo_fast.training.update import Updater
from socpo_fast.types import Rollout
from tests.helpers.updates import updates_of

CONFIG = Path(__file__).parent.parent.parent / "configs" / "molar_mass.toml"
ORDER = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(
        CONFIG, {"data.builtin_train_questions": 8, "rollout.questions_per_batch": 8}
    )


@pytest.fixture(scope="module")
def groups(config: Config) -> list[list[Rollout]]:
    """Returns rollouts of one batch with credit, grouped by question; the shipped student's."""
    with closing(Session(config)) as session:
        questions = session.train_questions()
        rollouts = list(session.training_rollouts(questions, 1))
    assign_credit(rollouts, options=credit_options(config))
    by_question: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_question.setdefault(rollout.question_idx, []).append(rollout)
    return list(by_question.values())


def logprobs(updater: Updater, groups: list[list[Rollout]]) -> Tensor:
    """Returns the log-probs of all sampled tokens under the fp32 masters of the parameters."""
    masters = load_student(molar_mass.STUDENT_DIR)
    low_bits = updater.optimizer.low_bits
    with torch.no_grad():
        for (name, master), param in zip(
            masters.named_parameters(), updater.student.parameters(), strict=True
        ):
            master.copy_(join_master(param, low_bits[name]) if low_bits else param)
    rollouts = [rollout for group in groups for rollout in group]
    by_rollout = compute_logprobs(masters, rollouts, token_budget=8192, temperature=1.0)
    return torch.cat([x for by_attempt in by_rollout for x in by_attempt])


def test_updates_in_bf16_follow_fp32(config: Config, groups: list[list[Rollout]]) -> None:
    """Loss, gradient norm, entropy and the change of log-probs agree within a few per cent."""
    advantages = torch.cat([
        torch.full((turn.attempt.num_tokens,), turn.advantage)
        for group in groups
        for rollout in group
        for turn in rollout.turns
    ])  # fmt: skip
    metrics = {}
    gains = {}
    for dtype in ("float32", "bfloat16"):
        updater = Updater(load_student(molar_mass.STUDENT_DIR, dtype=dtype), config, reference=None)
        old_logprobs = logprobs(updater, groups)
        metrics[dtype] = [metrics for _, metrics in updates_of(updater, groups, ORDER)]
        gains[dtype] = (logprobs(updater, groups) - old_logprobs) * advantages
        assert updater.optimizer.num_skipped == 0
    for exact, rounded in zip(metrics["float32"], metrics["bfloat16"], strict=True):
        assert rounded["policy/loss"] == pytest.approx(exact["policy/loss"], abs=0.01)
        assert rounded["policy/grad_norm"] == pytest.approx(exact["policy/grad_norm"], rel=0.05)
        assert rounded["policy/entropy"] == pytest.approx(exact["policy/entropy"], rel=0.02)
    # Tokens with a positive advantage became likelier, and by as much in both dtypes.
    assert gains["float32"].mean() > 0
    assert gains["bfloat16"].mean() == pytest.approx(gains["float32"].mean().item(), rel=0.1)


def test_masters_move_by_less_than_bf16_resolves(
    config: Config, groups: list[list[Rollout]]
) -> None:
    """At the default learning rate of 1e-6, most bf16 parameters stay, but their masters move."""
    small_lr = load_config(None, {"train.lr": 1e-6, "train.warmup_updates": 0})
    student = load_student(molar_mass.STUDENT_DIR, dtype="bfloat16")
    updater = Updater(student, small_lr, reference=None)
    param = student.layers[0].mlp.down.weight
    old_param = param.detach().clone()
    list(updates_of(updater, groups[:2], [[0], [1]]))
    master = join_master(param.detach(), updater.optimizer.low_bits["layers.0.mlp.down.weight"])
    assert (param == old_param).float().mean() > 0.9
    assert (master != old_param.float()).float().mean() > 0.9
