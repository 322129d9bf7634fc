"""Checks several updates of one batch, epochs included: each gradient is right against fp64.

Old and reference log-probs are those of the batch's first weights, and stay fixed for all updates.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.config import Config, load_config
from socpo_fast.model.decoder import Decoder
from socpo_fast.training.step import compute_logprobs, policy_gradients
from socpo_fast.training.update import Updater
from socpo_fast.types import Rollout
from tests.helpers.made_rollouts import make_rollouts, make_student
from tests.helpers.naive_update import (
    distance,
    naive_gradients,
    near_policy,
    norm,
    set_sampler_logprobs,
)
from tests.helpers.updates import updates_of

ORDER = [[0, 2], [1], [1, 0], [2]]  # two epochs of two updates over three groups
CHANGES: dict[str, Any] = {
    "rollout.temperature": 0.8,
    "rollout.max_new_tokens": 7,
    "train.lr": 3e-3,  # far enough for ratios to clip from the second update on
    "train.warmup_updates": 0,
    "train.token_budget": 60,
    "train.max_grad_norm": 1e9,
}
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {"loss.old_logprobs": "sampler"},
    "recompute": {"loss.old_logprobs": "recompute", "loss.tis_clip": 1.1},
    "auto": {"loss.agg": "seq_mean_token_mean", "loss.dual_clip": 1.5, "loss.tis_clip": 1.1},
    "k1": {"loss.kl_coef": 0.3, "loss.kl_estimator": "k1", "loss.agg": "seq_mean_token_sum_norm"},
    "k2": {"loss.kl_coef": 0.3, "loss.kl_estimator": "k2", "loss.old_logprobs": "recompute"},
    "k3": {
        "loss.kl_coef": 0.3,
        "loss.kl_estimator": "k3",
        "loss.entropy_coef": 0.1,
        "loss.dual_clip": "none",
    },
}


def groups_of(rollouts: list[Rollout]) -> list[list[Rollout]]:
    return [
        [rollout for rollout in rollouts if rollout.question_idx == question]
        for question in range(3)
    ]


def naive_options(config: Config) -> dict[str, Any]:
    loss = config.loss
    return {
        "loss_agg": loss.agg,
        "max_new_tokens": config.rollout.max_new_tokens,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": loss.dual_clip,
        "entropy_coef": loss.entropy_coef,
        "kl_coef": loss.kl_coef,
        "kl_estimator": loss.kl_estimator,
        "tis_clip": loss.tis_clip,
    }


def spy_on_steps(updater: Updater) -> list[tuple[Decoder, dict[str, Tensor]]]:
    """Returns a list that receives, for each update, the student before it and its gradient.

    Both are copies in fp64.
    """
    steps = []
    original = updater.optimizer.step
    config = updater.student.config

    def step(loss: Tensor, **options: Any) -> Any:
        old_student = Decoder(config).double()
        old_student.load_state_dict(updater.student.state_dict())
        grads = {
            name: param.grad.clone().double() for name, param in updater.student.named_parameters()
        }
        steps.append((old_student, grads))
        return original(loss, **options)

    updater.optimizer.step = step
    return steps


@pytest.mark.parametrize("loss", LOSSES)
def test_every_update_is_as_right_as_plain_fp32(loss: str) -> None:
    """Each gradient of two epochs is at most twice as far from fp64 as a naive one in fp32.

    Old and reference log-probs of the naive update are those of the first weights.
    """
    config = load_config(None, CHANGES | LOSSES[loss])
    start = make_student(dtype=torch.float64)
    reference = make_student()
    rollouts = make_rollouts()
    with torch.no_grad():
        for param in reference.parameters():
            param.mul_(0.95)
    set_sampler_logprobs(rollouts, near_policy(start, rollouts, 0.3, seed=5))
    old = near_policy(start, rollouts, 0.0, seed=0)
    ref = near_policy(reference.double(), rollouts, 0.0, seed=0)
    groups = groups_of(rollouts)
    updater = Updater(
        make_student(), config, reference=reference.float() if config.loss.kl_coef else None
    )
    steps = spy_on_steps(updater)
    outcomes = list(updates_of(updater, groups, ORDER))
    assert [num_groups for num_groups, _ in outcomes] == [len(chosen) for chosen in ORDER]

    for (old_student, grads), chosen, (_, metrics) in zip(steps, ORDER, outcomes, strict=True):
        indices = [i for g in chosen for i in range(len(rollouts)) if rollouts[i].question_idx == g]
        options = naive_options(config) | {
            "old": None if config.loss.old_logprobs == "sampler" else [old[i] for i in indices],
            "ref": [ref[i] for i in indices] if config.loss.kl_coef else None,
        }
        chosen_rollouts = [rollouts[i] for i in indices]
        truth, value, clipped = naive_gradients(old_student, chosen_rollouts, **options)
        plain, _, _ = naive_gradients(old_student.float(), chosen_rollouts, **options)
        size = norm(truth)
        # The error rule, applied to the norm of the whole gradient.
        assert distance(grads, truth) <= 2 * distance(plain, truth) + 1e-5 * size
        assert metrics["policy/loss"] == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert metrics["policy/grad_norm"] == pytest.approx(size, rel=1e-4)
        assert metrics["policy/clip_fraction"] == pytest.approx(clipped, abs=1e-6)
    assert outcomes[-1][1]["policy/clip_fraction"] > 0.1
    assert all(
        not torch.equal(first, second)
        for first, second in zip(*(list(s[0].parameters()) for s in steps[:2]), strict=True)
    )


def test_progress_by_group_and_by_microbatch() -> None:
    changes = CHANGES | LOSSES["k3"] | {"loss.old_logprobs": "recompute"}
    updater = Updater(make_student(), load_config(None, changes), reference=make_student())
    progress = list(updater.microbatches(groups_of(make_rollouts()), ORDER))
    before, within = progress[:6], progress[6:]
    # Old and then reference log-probs of three groups.
    assert [(x.work, x.done, x.total) for x in before] == 2 * [
        ("log-probs", done, 3) for done in (1, 2, 3)
    ]
    for chosen in ORDER:
        (*microbatches, end), within = within[: (n := within[0].total + 1)], within[n:]
        assert [(x.work, x.done, x.total) for x in microbatches] == [
            ("microbatch", done, n - 1) for done in range(1, n)
        ]
        assert end.metrics is not None and end.metrics["perf/microbatches"] == n - 1
        assert n - 1 >= len(chosen), "the budget holds no two groups"
    assert within == []


def test_sampler_logprobs_that_fit_serve_as_old_ones() -> None:
    """With "auto", sampler log-probs within 1e-3 nats of the student's own serve as old ones.

    The first group is forwarded to find out. If they do not fit, the other groups are as well.
    """
    start = make_student(dtype=torch.float64)
    rollouts = make_rollouts()
    config = load_config(None, CHANGES | {"train.token_budget": 10_000})  # one forward a group
    outcomes = []
    for spread, num_forwards in ((1e-5, 1), (0.3, 3)):
        set_sampler_logprobs(rollouts, near_policy(start, rollouts, spread, seed=5))
        student = make_student()
        forwarded = []
        student.norm.register_forward_hook(
            lambda norm, args, out, seen=forwarded: seen.append(out[0].requires_grad)
        )
        updater = Updater(student, config, reference=None)
        (_, metrics) = next(updates_of(updater, groups_of(rollouts), ORDER))
        assert forwarded.count(False) == num_forwards
        outcomes.append((metrics["policy/sampler_mismatch_nats"], metrics["policy/ratio_mean"]))
    assert outcomes[0][0] < 1e-4
    assert outcomes[1][0] > 1e-1
    assert outcomes[1][1] == pytest.approx(1.0, abs=1e-5)  # recomputed: ratio 1 at the first update
    assert outcomes[0][1] != outcomes[1][1]


@pytest.mark.parametrize("choice", ["auto", "sampler", "recompute"])
def test_old_logprobs_in_bf16(choice: str) -> None:
    """With "auto" and bf16 weights, the first update needs no old log-probs, since its ratio is 1.

    For the other updates they are computed with the first weights.
    """
    rollouts = make_rollouts()
    start = make_student(dtype=torch.bfloat16)
    set_sampler_logprobs(
        rollouts, near_policy(make_student(dtype=torch.float64), rollouts, 0.3, seed=5)
    )
    options = CHANGES | {"train.token_budget": 10_000, "loss.old_logprobs": choice}
    config = load_config(None, options | {"loss.tis_clip": 1.5})
    groups = groups_of(rollouts)
    first_logprobs = [
        compute_logprobs(start, group, token_budget=10_000, temperature=0.8) for group in groups
    ]
    forwarded: list[bool] = []
    start.norm.register_forward_hook(lambda norm, args, out: forwarded.append(out[0].requires_grad))
    updater = Updater(start, config, reference=None)
    old_logprobs: list[Any] = []
    original = updater.one_update

    def note_old(rollouts: Any, old: Any, *args: Any) -> dict[str, float]:
        old_logprobs.append(old)
        return original(rollouts, old, *args)

    updater.one_update = note_old
    metrics = [metrics for _, metrics in updates_of(updater, groups, [[0, 2], [1]])]
    assert forwarded.count(False) == {"auto": 1, "sampler": 0, "recompute": 3}[choice]
    if choice == "sampler":
        assert old_logprobs == [None, None]
    else:
        assert (old_logprobs[0] == "current") == (choice == "auto")
        for by_attempt, expected in zip(old_logprobs[1], first_logprobs[1], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(by_attempt, expected, strict=True))
        assert metrics[0]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert metrics[0]["policy/clip_fraction"] == 0
    assert metrics[1]["policy/ratio_mean"] != 1.0
    # Noise of 0.3 nats and bf16's rounding, measured at the first update and reported for all.
    for name in ("policy/sampler_mismatch_nats", "policy/sampler_mismatch_mean_nats"):
        assert metrics[0][name] == metrics[1][name]
    assert (
        0.05
        < metrics[0]["policy/sampler_mismatch_mean_nats"]
        < metrics[0]["policy/sampler_mismatch_nats"]
        < 3
    )


def test_non_finite_updates_are_skipped_then_stop() -> None:
    """A non-finite update changes no weight; max_bad_updates of them in a row end the run."""
    rollouts = make_rollouts()
    config = load_config(
        None, CHANGES | {"loss.old_logprobs": "sampler", "train.max_bad_updates": 2}
    )
    student = make_student()
    updater = Updater(student, config, reference=None)
    old_weights = [param.detach().clone() for param in student.parameters()]
    rollouts[0].turns[0].advantage = float("1e38")  # finite, but its loss is not
    groups = groups_of(rollouts)
    updates = updates_of(updater, groups, [[0], [0]])
    _, metrics = next(updates)
    assert metrics["policy/bad_updates"] == 1
    assert not math.isfinite(metrics["policy/grad_norm"])
    assert all(
        torch.equal(param, old)
        for param, old in zip(student.parameters(), old_weights, strict=True)
    )
    with pytest.raises(
        RuntimeError, match="must be finite, got 2 updates in a row that were not; lower train.lr"
    ):
        next(updates)


def test_batch_advantages_replace_those_of_turns() -> None:
    """Advantages passed as a tensor give bitwise the updates of the same advantages in the turns.

    The turns' own are only a record then, and may be None.
    """
    outcomes = []
    for passed in (False, True):
        rollouts = make_rollouts()
        student = make_student()
        groups = groups_of(rollouts)
        turns = [turn for group in groups for rollout in group for turn in rollout.turns]
        advantages_A = torch.tensor([turn.advantage for turn in turns])
        if passed:
            for turn in turns:
                turn.advantage = None
        updater = Updater(student, load_config(None, CHANGES | LOSSES["plain"]), reference=None)
        metrics = [
            x for _, x in updates_of(updater, groups, ORDER, advantages_A if passed else None)
        ]
        policy = [{k: v for k, v in x.items() if k.startswith("policy")} for x in metrics]
        outcomes.append((policy, [param.tolist() for param in student.parameters()]))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]) == len(ORDER)


@pytest.mark.parametrize("shape", [(), (2,), (5, 1)])
def test_advantages_are_one_for_each_attempt(shape: tuple[int, ...]) -> None:
    rollouts = make_rollouts()
    num_attempts = sum(len(rollout.turns) for rollout in rollouts)
    message = rf"^policy_gradients: shape of advantages_A must be \[A={num_attempts}\], got \[.*\]$"
    with pytest.raises(ValueError, match=message):
        policy_gradients(
            make_student(),
            rollouts,
            token_budget=60,
            temperature=1.0,
            advantages_A=torch.zeros(shape),
        )
