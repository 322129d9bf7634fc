"""Checks that faults of updates are found: other bits, skipped steps and too little memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import adamw as step
from tools.gpu_check import adamw, updates
from tools.gpu_check.check import Check
from tools.gpu_check.groups import TINY_GROUP, make_rollouts
from tools.gpu_check.results import StageResult, read_results
from tools.gpu_check.stages import NAMES
from tools.gpu_check.worker import run_parts

BF16 = torch.bfloat16


@pytest.fixture
def check(tmp_path: Path) -> Check:
    results = tmp_path / "results.jsonl"
    return Check("training", device=torch.device("cpu"), tiny=True, results=results, peers=None)


def outcome(check: Check, part: updates.Part) -> StageResult:
    """Runs one part of a stage; returns what was written down."""
    run_parts(check, {"part": part}, [])
    return read_results(check.results, NAMES).stages["training"]


def test_groups_have_different_prompts() -> None:
    rollouts = make_rollouts(211, TINY_GROUP, num_groups=2)
    assert [rollout.question_idx for rollout in rollouts] == [0] * 4 + [1] * 4
    assert len({tuple(rollout.prompt_ids) for rollout in rollouts}) == 2
    assert make_rollouts(211, TINY_GROUP)[0].prompt_ids == rollouts[0].prompt_ids


def test_other_bits_of_an_update_are_named(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second update that is not bitwise the first one is a failure that names the parameter."""
    num_trainees = [0]

    class Restless(updates.Trainee):
        def __init__(self, *args: object):
            super().__init__(*args)
            num_trainees[0] += 1
            if num_trainees[0] > 1:
                with torch.no_grad():
                    self.student.lm_head.weight[3, 2] += 1e-3

    monkeypatch.setattr(updates, "Trainee", Restless)
    stage = outcome(check, updates.update("Qwen3-0.6B", BF16))
    (failure,) = stage.failures
    assert "Qwen3-0.6B in bfloat16, 1 group: embed.weight: " in failure["message"]
    assert [f.value for f in stage.figures if f.key == "training.repeats"] == [0.0]


def test_one_group_where_two_do_not_fit(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an update of two groups runs out of memory, one group is measured, with a note."""
    make = updates.make_rollouts

    def too_many(vocab_size: int, shape: object, num_groups: int) -> object:
        if num_groups > 1:
            raise torch.OutOfMemoryError("tried to allocate 60 GiB")
        return make(vocab_size, shape, num_groups)

    monkeypatch.setattr(updates, "make_rollouts", too_many)
    stage = outcome(check, updates.update("Qwen3-1.7B", BF16, num_groups=2))
    assert stage.failures == [] and "2 groups: tried to allocate 60 GiB" in stage.notes[0]
    assert {figure.of for figure in stage.figures} == {"Qwen3-1.7B in bfloat16, 1 group"}


def test_a_skipped_step_is_a_failure(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = SimpleNamespace(loss_stats_7=torch.full((7,), torch.nan))
    monkeypatch.setattr(updates, "gradients", lambda *_, **__: stats)
    (failure,) = outcome(check, updates.update("Qwen3-0.6B", BF16)).failures
    assert "the gradient is not finite" in failure["message"]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_adamw_must_be_bitwise_its_reference(
    check: Check, monkeypatch: pytest.MonkeyPatch, is_wrong: bool
) -> None:
    """A step with another eps is a failure that names the first tensor that differs."""

    def op(*tensors: Tensor, impl: str = "auto", **options: object) -> None:
        if is_wrong and impl != "ref":
            options["eps"] = 1e-6
        step(*tensors, impl=impl, **options)

    monkeypatch.setattr(adamw, "step", op)
    rates = Check("rates", device=check.device, tiny=True, results=check.results, peers=None)
    run_parts(rates, {"adamw": adamw.adamw}, [])
    stage = read_results(check.results, NAMES).stages["rates"]
    cases = [figure.of for figure in stage.figures]
    assert cases[0] == "torch's fused, float32" and stage.skips == []
    if is_wrong:
        messages = [failure["message"] for failure in stage.failures]
        names = ("param", "low_bits")  # of a bf16 parameter's master the low half differs first
        for message, name in zip(messages, names, strict=True):
            assert f"adamw: {name} after 3 steps: " in message
    else:
        assert stage.failures == [] and cases[1:] == ["float32", "bfloat16 and low bits"]
