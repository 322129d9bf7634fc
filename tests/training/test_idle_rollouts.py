"""Checks idle rollouts, whose advantages are all 0: no layer forwards them, with the same result.

Their gradient is 0, but their tokens still count in the loss's normaliser and in the metrics.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from socpo_fast.config import load_config
from socpo_fast.model.decoder import Decoder
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import GradientStats, policy_gradients
from socpo_fast.training.update import Updater
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
from tests.helpers.updates import updates_of
from tests.training.test_update import CHANGES, groups_of

NUM_IDLE = {0: 8, 1: 5, 2: 3}  # question -> rollouts with attempts, which `idle` makes idle


def idle(rollouts: list[Rollout], *questions: int) -> list[Rollout]:
    """Sets the advantages of some questions to 0 in place; a zero may have either sign."""
    for rollout in rollouts:
        for turn_idx, turn in enumerate(rollout.turns):
            if rollout.question_idx in questions:
                turn.advantage = -0.0 if turn_idx else 0.0
    return rollouts


def watch_layer_0(student: Decoder) -> list[int]:
    """Returns a list that receives the number of rows of each later forward."""
    num_rows: list[int] = []
    student.layers[0].register_forward_pre_hook(
        lambda layer, args: num_rows.append(args[1].shape[0])
    )
    return num_rows


def run(student: Decoder, rollouts: list[Rollout], **options: Any) -> GradientStats:
    student.zero_grad(set_to_none=True)
    options = gathered({"token_budget": 10_000} | options)
    return policy_gradients(student, rollouts, temperature=TEMPERATURE, **options)


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("loss_agg", ["token_mean", "seq_mean_token_mean"])
def test_gradient_equals_forwarding_all_rows(packing: str, loss_agg: str) -> None:
    """Loss and gradient are those of forwarding everything in fp64.

    They are bitwise those of the rollouts with a signal, under the normaliser of all rollouts.
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
    with_signal = [rollout for rollout in rollouts if rollout.question_idx != 0]
    normaliser = {"num_loss_tokens": num_tokens, "num_attempts": len(attempts)}
    expected = run(student, with_signal, packing=packing, loss_agg=loss_agg, **normaliser)
    for name, param in student.named_parameters():
        assert torch.equal(param.grad, grads[name]), name
    # An idle token is never clipped, so the fraction refers to more tokens with idle rollouts.
    num_clipped = stats.figures.clip_fraction * num_tokens
    assert (
        num_clipped == pytest.approx(expected.figures.clip_fraction * expected.loss_tokens)
        and num_clipped > 1
    )
    assert stats.figures._replace(clip_fraction=0) == expected.figures._replace(clip_fraction=0)


def test_idle_rollouts_do_not_enter_layer_0() -> None:
    """The forwarded rows are the tree nodes of rollouts with a signal, except for leaves."""
    student = make_student()
    rollouts = idle(make_rollouts(), 1)
    forwarded_rows = watch_layer_0(student)
    idle(rollouts[0:1], 0)  # and one rollout of another question
    stats = run(student, rollouts)
    nodes, leaves = count_nodes([x for x in rollouts[1:] if x.question_idx != 1])
    assert forwarded_rows == [stats.tokens_forwarded] == [nodes - leaves]
    assert stats.unique_tokens == count_nodes(rollouts)[0]
    assert stats.idle_rollouts == NUM_IDLE[1] + 1


@pytest.mark.parametrize(
    "options", [{"entropy_coef": 1e-3}, {"entropy_coef": -1e-3}, {"kl_coef": 1e-3}, {}]
)
def test_rollouts_with_any_gradient_are_forwarded(options: dict[str, float]) -> None:
    """An entropy bonus, a KL term, or an advantage that is tiny but not 0 needs the forward."""
    student = make_student()
    rollouts = idle(make_rollouts(), 0, 1, 2)
    ref = near_policy(student, rollouts, 0.3, seed=1)
    if not options:
        for rollout in rollouts:
            for turn in rollout.turns[-1:]:
                turn.advantage = 1e-40
    forwarded_rows = watch_layer_0(student)
    stats = run(student, rollouts, ref_logprobs=ref if "kl_coef" in options else None, **options)
    nodes, leaves = count_nodes(rollouts)
    assert forwarded_rows == [nodes - leaves] and stats.idle_rollouts == 0


def test_all_idle_is_a_zero_gradient_and_no_forward() -> None:
    student = make_student()
    rollouts = idle(make_rollouts(), 0, 1, 2)
    forwarded_rows = watch_layer_0(student)
    stats = run(student, rollouts, token_budget=20)
    assert forwarded_rows == [] and all(param.grad is None for param in student.parameters())
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
def test_update_without_signal_has_zero_gradient(choice: str) -> None:
    """An update of idle rollouts is AdamW's step with a gradient of 0.

    Moments fade, matrices decay and counts go on. The sampler's mismatch is measured on one group.
    """
    rollouts = idle(make_rollouts(), 0, 1, 2)
    student = make_student()
    expected_student = make_student()
    set_sampler_logprobs(rollouts, near_policy(student, rollouts, 1e-5, seed=5))
    updater = Updater(
        student,
        load_config(None, CHANGES | {"loss.old_logprobs": choice, "train.token_budget": 10_000}),
        reference=None,
    )
    optimizer = Optimizer(expected_student, lr=3e-3, warmup_updates=0, max_grad_norm=1e9)
    for each in (updater.optimizer, optimizer):
        for tensor in each.state_tensors().values():
            tensor.fill_(0.25)
    forwarded_rows = watch_layer_0(student)
    groups = groups_of(rollouts)
    outcomes = [metrics for _, metrics in updates_of(updater, groups, [[0, 2], [1]])]
    nodes, leaves = count_nodes(groups[1])
    assert sum(forwarded_rows) == (0 if choice == "sampler" else nodes - leaves)
    for _ in outcomes:
        for param in expected_student.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for name, param in expected_student.named_parameters():
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


def test_mismatch_is_that_of_the_first_signal() -> None:
    """An idle update reports no mismatch; the first one with a signal reports it for all later."""
    rollouts = idle(make_rollouts(), 0)
    student = make_student()
    set_sampler_logprobs(rollouts, near_policy(make_student(), rollouts, 0.3, seed=5))
    config = load_config(
        None, CHANGES | {"loss.old_logprobs": "sampler", "train.token_budget": 10_000}
    )
    updater = Updater(student, config, reference=None)
    mismatches = [
        m["policy/sampler_mismatch_nats"]
        for _, m in updates_of(updater, groups_of(rollouts), [[0], [1], [2]])
    ]
    assert math.isnan(mismatches[0]) and mismatches[1] == mismatches[2] > 0.1


@pytest.mark.parametrize(
    ("dtype", "choice"), [("float32", "auto"), ("float32", "recompute"), ("bfloat16", "auto")]
)
def test_old_logprobs_are_computed_where_they_are_read(dtype: str, choice: str) -> None:
    """Old log-probs are computed for groups with a signal only.

    The first group is idle, as is one of the last update's two. The other one gives the mismatch.
    """
    rollouts = idle(make_rollouts(), 0, 2)
    student = make_student(dtype=getattr(torch, dtype))
    set_sampler_logprobs(rollouts, near_policy(make_student(), rollouts, 0.3, seed=5))
    config = load_config(
        None, CHANGES | {"loss.old_logprobs": choice, "train.token_budget": 10_000}
    )
    updater = Updater(student, config, reference=None)
    forwarded_rows = watch_layer_0(student)
    groups = groups_of(rollouts)
    first, last = (metrics for _, metrics in updates_of(updater, groups, [[0], [1, 2]]))
    nodes, leaves = count_nodes(groups[1])
    assert forwarded_rows == [nodes - leaves] * 2  # once for the old log-probs, once for the update
    assert first["policy/sampler_mismatch_nats"] == last["policy/sampler_mismatch_nats"] > 0.1
    # The first update had a zero gradient: decay moved the weights, by 3e-5 of them.
    assert last["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-2)
