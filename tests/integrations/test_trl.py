"""Checks SocraticPO inside TRL's trainer with our engine, on a tiny Llama on the CPU.

It must train on TRL's own parameters, with our gradients and TRL's losses, and resume and evaluate
as TRL does.
"""

from __future__ import annotations

import copy
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from socpo_fast import Engine, SamplingParams, adopt_student, policy_gradients
from socpo_fast.model.hf_views import hf_views
from socpo_fast.ops.policy_loss import PolicyLossOptions

pytest.importorskip("trl", minversion="1.16")

from tests.helpers.tiny_trl import (
    largest_difference,
    logged,
    make_data,
    make_model,
    make_trainer,
    teach,
    tokens_of,
    trained,
)


def test_trains_on_trls_own_parameters(tmp_path: Path) -> None:
    """After every step the engine samples from what TRL's optimizer wrote."""
    trainer = trained(tmp_path, of_trl={"max_steps": 3})
    params = SamplingParams(temperature=0.0, max_new_tokens=6, eos_ids=(), ignore_eos=True)
    fresh = Engine(adopt_student(copy.deepcopy(trainer.model)), kv_cache_gib=0.01)
    attempts = [engine.generate([[5, 6, 7]], params)[0][0] for engine in (trainer.engine, fresh)]
    assert attempts[0].token_ids == attempts[1].token_ids
    assert torch.equal(attempts[0].logprobs, attempts[1].logprobs)
    weights = dict(trainer.model.named_parameters())
    for name, view in hf_views(trainer.engine.student):
        assert view.data_ptr() == weights[name].data_ptr(), name
        assert not torch.equal(weights[name], dict(make_model().named_parameters())[name]), name
    assert len(logged(trainer, "success/unassisted")) == 3


def test_gradients_are_those_of_policy_gradients(tmp_path: Path) -> None:
    trainer = trained(tmp_path, of_trl={"max_steps": 1, "temperature": 0.8})
    model = make_model()
    policy_gradients(
        adopt_student(model, share=True),
        trainer.rollouts,
        token_budget=500,
        temperature=0.8,
        options=PolicyLossOptions(dual_clip=None),
    )
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_difference(trainer.recorder.grads[0], expected) < 1e-5
    assert {len(rollout.turns) for rollout in trainer.rollouts} == {1, 2}


# One generation feeds two optimizer steps of two microbatches each. The second step is off policy,
# and the learning rate large enough that ratios are clipped.
OFF_POLICY = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "learning_rate": 0.03,
    "epsilon_high": 0.28,
}
COMPARED = (
    "loss",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_max",
)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_fused_loss_is_trls(tmp_path: Path, loss_type: str) -> None:
    """Loss, gradients and metrics, on and off policy, with gradient accumulation."""
    settings = OFF_POLICY | {"loss_type": loss_type}
    ours, theirs = (trained(tmp_path, of_trl=settings, loss=loss) for loss in ("fused", "trl"))
    assert tokens_of(ours.rollouts) == tokens_of(theirs.rollouts)
    for actual, expected in zip(ours.recorder.grads, theirs.recorder.grads, strict=True):
        assert largest_difference(actual, expected) < 1e-5
    for name in COMPARED:
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5, rel=1e-4), name
    assert logged(ours, "clip_ratio/region_mean")[1] > 0.01


def test_kl_and_steps_per_generation_are_trls(tmp_path: Path) -> None:
    """A generation feeds two optimizer steps, and there is a reference model."""
    make_model().save_pretrained(tmp_path / "model")
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "beta": 0.1,
        "use_bias_correction_kl": False,
    }
    ours, theirs = (
        trained(tmp_path, of_trl=settings, loss=loss, model=str(tmp_path / "model"))
        for loss in ("fused", "trl")
    )
    for actual, expected in zip(ours.recorder.grads, theirs.recorder.grads, strict=True):
        assert largest_difference(actual, expected) < 1e-4
    for name in ("kl", "loss"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-5), name
    assert logged(ours, "kl")[3] > 1e-4


def test_noise_differs_in_every_generation(tmp_path: Path) -> None:
    """Also where an optimizer step needs several generations, of the same question."""
    trainer = make_trainer(
        tmp_path,
        of_trl={
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
            "learning_rate": 0.0,
        },
        train_dataset=make_data(1).select([0] * 4),
    )
    drawn: list[list[int]] = []
    roll_out = trainer.rollout_func

    def recorded(*args: Any) -> dict[str, Any]:
        output = roll_out(*args)
        drawn.extend(rollout.attempts[0].token_ids for rollout in trainer.rollouts)
        return output

    trainer.rollout_func = recorded
    trainer.train()
    assert len(drawn) == 16
    assert max(Counter(map(tuple, drawn)).values()) == 1


def test_resumed_run_is_the_unbroken_run(tmp_path: Path) -> None:
    """Weights after a save at step 2 and a resume to 4 are bitwise those without the break."""
    unbroken = make_trainer(tmp_path / "a", of_trl={"max_steps": 4, "save_strategy": "no"})
    unbroken.train()
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "b", of_trl=saving).train()
    resumed = make_trainer(tmp_path / "b", of_trl=saving, model=make_model(seed=1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert tokens_of(resumed.rollouts) == tokens_of(unbroken.rollouts)
    expected = unbroken.model.state_dict()
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_evaluation_is_unassisted_and_repeatable(tmp_path: Path) -> None:
    """An evaluation asks no teacher, and changes nothing."""
    requests = []
    trainer = make_trainer(
        tmp_path,
        teacher=requests.append,
        eval_dataset=make_data(6),
        of_trl={"num_generations_eval": 2, "per_device_eval_batch_size": 4},
    )
    first, second = trainer.evaluate(), trainer.evaluate()
    assert 0 < first["eval_success/unassisted"] < 1
    assert first["eval_reward"] == pytest.approx(first["eval_success/unassisted"])
    assert not requests
    timing = {key for key in first if key.endswith(("_runtime", "_per_second"))}
    assert {k: v for k, v in first.items() if k not in timing} == {
        k: v for k, v in second.items() if k not in timing
    }
    assert not any("assisted" in key and "unassisted" not in key for key in first)


def test_a_failing_teacher_does_not_end_training(tmp_path: Path) -> None:
    def fail(request: object) -> str:
        raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="no network"):
        trainer = trained(tmp_path, teacher=fail)
    assert all(len(rollout.turns) == 1 for rollout in trainer.rollouts)
    num_wrong = sum(rollout.end_reason == "guidance_failed" for rollout in trainer.rollouts)
    assert logged(trainer, "guidance/failed_exception")[-1] == num_wrong > 0


def test_an_async_teacher_helps(tmp_path: Path) -> None:
    async def guide(request: Any) -> str:
        return teach(request)

    ours, theirs = (trained(tmp_path, teacher=teacher) for teacher in (guide, teach))
    assert tokens_of(ours.rollouts) == tokens_of(theirs.rollouts)
    assert logged(ours, "guidance/rate")[-1] > 0


def test_example(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "trl_socratic.py"
    main = runpy.run_path(str(path))["main"]
    trainer = main(steps=1, questions_per_step=2, num_eval=8, folder=str(tmp_path))
    assert len(trainer.rollouts) == 8  # of the last evaluation
    assert trainer.state.global_step == 1
