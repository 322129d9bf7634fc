"""Rollouts whose advantages are all 0: no layer sees them, and nothing else is different for it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from socpo_fast.config import load_config
from socpo_fast.model.decoder import Decoder
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.step import GradientStats, policy_gradients
from socpo_fast.train.update import Updater
from socpo_fast.types import Rollout
from tests.helpers.loss_options import gathered
from tests.helpers.made_rollouts import count_nodes, make_rollouts, make_student
from tests.helpers.naive_update import (
    TEMPERATURE,
    distance,
    naive_gradients,
    near_policy,
    norm,
    set_sampler_logprobs,
)
from tests.train.test_update import CHANGES, groups_of

NUM_IDLE = {0: 8, 1: 5, 2: 3}  # rollouts with attempts, by question


def idle(rollouts: list[Rollout], *questions: int) -> list[Rollout]:
    """The same, those of some questions without a signal; a zero may have either sign."""
    for rollout in rollouts:
        for turn_idx, turn in enumerate(rollout.turns):
            if rollout.question_idx in questions:
                turn.advantage = -0.0 if turn_idx else 0.0
    return rollouts


def watch_layer_0(student: Decoder) -> list[int]:
    """The rows of each forward from here on."""
    entered: list[int] = []
    student.layers[0].register_forward_pre_hook(
        lambda layer, args: entered.append(args[1].shape[0])
    )
    return entered


def run(student: Decoder, rollouts: list[Rollout], **options: Any) -> GradientStats:
    student.zero_grad(set_to_none=True)
    options = gathered({"token_budget": 10_000} | options)
    return policy_gradients(student, rollouts, temperature=TEMPERATURE, **options)


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean_token_mean"])
def test_the_value_is_that_of_all_rows(packing: str, loss_agg: str) -> None:
    """Against fp64 that forwards everything; in bits against the others alone under all's
    normalisers.
    """
    student = make_student()
    rollouts = idle(make_rollouts(), 0)
    rollouts[1].turns[0].advantage = 0.0  # one attempt of a rollout that has a signal
    set_sampler_logprobs(rollouts, near_policy(student.double(), rollouts, 0.3, seed=5))
    truth, loss, _ = naive_gradients(student, rollouts, loss_agg=loss_agg)
    plain, _, _ = naive_gradients(student.float(), rollouts, loss_agg=loss_agg)
    stats = run(student, rollouts, packing=packing, loss_agg=loss_agg)
    grads = {name: param.grad for name, param in student.named_parameters()}
    assert distance(grads, truth) <= 2 * distance(plain, truth) + 1e-5 * norm(truth)
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    attempts = [attempt for rollout in rollouts for attempt in rollout.attempts]
    num_tokens = sum(attempt.num_tokens for attempt in attempts)
    assert stats.loss_tokens == num_tokens
    others = [rollout for rollout in rollouts if rollout.question_idx != 0]
    whole = {"num_loss_tokens": num_tokens, "num_attempts": len(attempts)}
    alone = run(student, others, packing=packing, loss_agg=loss_agg, **whole)
    for name, param in student.named_parameters():
        assert torch.equal(param.grad, grads[name]), name
    clipped = stats.figures.clip_fraction * num_tokens
    assert clipped == pytest.approx(alone.figures.clip_fraction * alone.loss_tokens) and clipped > 1
    assert stats.figures._replace(clip_fraction=0) == alone.figures._replace(clip_fraction=0)


def test_rows_that_enter_layer_0_are_those_of_the_others() -> None:
    student = make_student()
    rollouts = idle(make_rollouts(), 1)
    entered = watch_layer_0(student)
    idle(rollouts[0:1], 0)  # and one rollout of another question
    stats = run(student, rollouts)
    nodes, leaves = count_nodes([x for x in rollouts[1:] if x.question_idx != 1])
    assert entered == [stats.tokens_forwarded] == [nodes - leaves]
    assert stats.unique_tokens == count_nodes(rollouts)[0]
    assert stats.idle_rollouts == NUM_IDLE[1] + 1


@pytest.mark.parametrize(
    "options", [{"entropy_coef": 1e-3}, {"entropy_coef": -1e-3}, {"kl_coef": 1e-3}, {}]
)
def test_what_has_a_gradient_is_forwarded(options: dict[str, float]) -> None:
    """An entropy bonus, a KL, or an advantage that is as good as 0."""
    student = make_student()
    rollouts = idle(make_rollouts(), 0, 1, 2)
    ref = near_policy(student, rollouts, 0.3, seed=1)
    if not options:
        for rollout in rollouts:
            for turn in rollout.turns[-1:]:
                turn.advantage = 1e-40
    entered = watch_layer_0(student)
    stats = run(student, rollouts, ref_logprobs=ref if "kl_coef" in options else None, **options)
    nodes, leaves = count_nodes(rollouts)
    assert entered == [nodes - leaves] and stats.idle_rollouts == 0


def test_all_idle_is_a_zero_gradient_and_no_forward() -> None:
    student = make_student()
    rollouts = idle(make_rollouts(), 0, 1, 2)
    entered = watch_layer_0(student)
    stats = run(student, rollouts, token_budget=20)
    assert entered == [] and all(param.grad is None for param in student.parameters())
    assert (stats.tokens_forwarded, stats.num_microbatches, stats.idle_rollouts) == (
        0,
        0,
        sum(NUM_IDLE.values()),
    )
    figures = stats.figures
    assert (figures.loss, figures.clip_fraction) == (0.0, 0.0)
    assert all(
        map(math.isnan, (figures.entropy, figures.ratio_mean, figures.sampler_mismatch_max_nats))
    )


@pytest.mark.parametrize("choice", ["auto", "sampler", "recompute"])
def test_an_update_without_signal_is_a_step_of_zero_gradient(choice: str) -> None:
    """AdamW's moments fade, matrices decay, counts go on, and the mismatch is measured on one
    group.
    """
    rollouts = idle(make_rollouts(), 0, 1, 2)
    student = make_student()
    other = make_student()
    set_sampler_logprobs(rollouts, near_policy(student, rollouts, 1e-5, seed=5))
    updater = Updater(
        student,
        load_config(None, CHANGES | {"loss.old_logprobs": choice, "train.token_budget": 10_000}),
        reference=None,
    )
    optimizer = Optimizer(other, lr=3e-3, warmup_updates=0, max_grad_norm=1e9)
    for one in (updater.optimizer, optimizer):
        for tensor in one.state_tensors().values():
            tensor.fill_(0.25)
    entered = watch_layer_0(student)
    groups = groups_of(rollouts)
    outcomes = [metrics for _, metrics in updater.updates(groups, [[0, 2], [1]])]
    nodes, leaves = count_nodes(groups[1])
    assert sum(entered) == (0 if choice == "sampler" else nodes - leaves)
    for _ in outcomes:
        for param in other.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for name, param in other.named_parameters():
        assert torch.equal(param, student.get_parameter(name)), name
    state = updater.optimizer.state_tensors()
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in optimizer.state_tensors().items()
    )
    assert updater.optimizer.state_counts() == optimizer.state_counts()
    for metrics, num_idle in zip(outcomes, (NUM_IDLE[0] + NUM_IDLE[2], NUM_IDLE[1]), strict=True):
        assert (
            metrics["policy/loss"],
            metrics["policy/grad_norm"],
            metrics["perf/tokens_forwarded"],
        ) == (0, 0, 0)
        assert metrics["perf/idle_rollouts"] == num_idle
        mismatch = metrics["policy/sampler_mismatch_nats"]
        assert math.isnan(mismatch) if choice == "sampler" else 0 < mismatch < 1e-4


def test_the_mismatch_is_of_the_first_update_with_one() -> None:
    rollouts = idle(make_rollouts(), 0)
    student = make_student()
    set_sampler_logprobs(rollouts, near_policy(make_student(), rollouts, 0.3, seed=5))
    config = load_config(
        None, CHANGES | {"loss.old_logprobs": "sampler", "train.token_budget": 10_000}
    )
    updater = Updater(student, config, reference=None)
    mismatches = [
        m["policy/sampler_mismatch_nats"]
        for _, m in updater.updates(groups_of(rollouts), [[0], [1], [2]])
    ]
    assert math.isnan(mismatches[0]) and mismatches[1] == mismatches[2] > 0.1


@pytest.mark.parametrize(
    ("dtype", "choice"), [("float32", "auto"), ("float32", "recompute"), ("bfloat16", "auto")]
)
def test_old_logprobs_are_computed_where_they_are_read(dtype: str, choice: str) -> None:
    """The first group is idle, as is one of the last update's two; others give the mismatch."""
    rollouts = idle(make_rollouts(), 0, 2)
    student = make_student(dtype=getattr(torch, dtype))
    set_sampler_logprobs(rollouts, near_policy(make_student(), rollouts, 0.3, seed=5))
    config = load_config(
        None, CHANGES | {"loss.old_logprobs": choice, "train.token_budget": 10_000}
    )
    updater = Updater(student, config, reference=None)
    entered = watch_layer_0(student)
    groups = groups_of(rollouts)
    first, last = (metrics for _, metrics in updater.updates(groups, [[0], [1, 2]]))
    nodes, leaves = count_nodes(groups[1])
    assert entered == [nodes - leaves] * 2  # once for the old log-probs, once for the update
    assert first["policy/sampler_mismatch_nats"] == last["policy/sampler_mismatch_nats"] > 0.1
    # The first update had a zero gradient: decay moved the weights, by 3e-5 of them.
    assert last["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-2)
