"""Checks policy_gradients and compute_logprobs: packings, determinism, counts and refusals.

The value of the gradient is checked in test_semantics.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.engine import Engine
from socpo_fast.model.decoder import Decoder
from socpo_fast.training.step import compute_logprobs, policy_gradients
from socpo_fast.types import Rollout, SamplingParams
from tests.helpers.loss_options import gathered
from tests.helpers.made_rollouts import count_nodes, make_rollouts, make_student, turns_of
from tests.helpers.naive_update import (
    TEMPERATURE,
    assert_close,
    decoder_forward,
    naive_logprobs,
    set_sampler_logprobs,
)
from tests.helpers.tiny import generate_same

ALL = 10_000  # a token budget that all rollouts fit into


def gradients(
    student: Decoder, rollouts: list[Rollout], **options: Any
) -> tuple[dict[str, Tensor], Any]:
    """Returns the gradients by parameter, and the statistics."""
    student.zero_grad(set_to_none=True)
    stats = policy_gradients(
        student, rollouts, temperature=TEMPERATURE, **gathered({"token_budget": ALL} | options)
    )
    return {name: param.grad.clone() for name, param in student.named_parameters()}, stats


@pytest.fixture(scope="module")
def student_64() -> Decoder:
    return make_student(dtype=torch.float64)


def test_tree_equals_rows(student_64: Decoder) -> None:
    rollouts = make_rollouts()
    tree, tree_stats = gradients(student_64, rollouts, packing="tree")
    rows, rows_stats = gradients(student_64, rollouts, packing="rows")
    assert_close(tree, rows, 1e-9)
    assert tree_stats.loss == pytest.approx(rows_stats.loss, rel=1e-9)
    student = make_student()
    assert_close(
        gradients(student, rollouts, packing="tree")[0],
        gradients(student, rollouts, packing="rows")[0],
        1e-5,
    )


def test_calls_add_up_under_the_updates_normaliser(student_64: Decoder) -> None:
    """Two calls with halves of the rollouts and the update's num_attempts give its gradient."""
    rollouts = make_rollouts()
    expected, _ = gradients(student_64, rollouts, loss_agg="seq_mean_token_mean")
    num_attempts = sum(len(rollout.attempts) for rollout in rollouts)
    student_64.zero_grad(set_to_none=True)
    for some_rollouts in (rollouts[:5], rollouts[5:]):
        policy_gradients(
            student_64,
            some_rollouts,
            token_budget=ALL,
            temperature=TEMPERATURE,
            loss_agg="seq_mean_token_mean",
            num_attempts=num_attempts,
        )
    assert_close(
        {name: param.grad for name, param in student_64.named_parameters()}, expected, 1e-6
    )


def test_deterministic_with_and_without_checkpointing() -> None:
    """Gradients are bitwise equal in a second run, and in one that recomputes activations."""
    student = make_student()
    rollouts = make_rollouts()
    first, _ = gradients(student, rollouts)
    for options in ({}, {"checkpointing": True}):
        again, _ = gradients(student, rollouts, **options)
        assert all(torch.equal(again[name], grad) for name, grad in first.items())


def test_rows_entering_layer_0_match_the_counts() -> None:
    """The layers forward as many rows as the trees have nodes, except for leaves."""
    student = make_student()
    rollouts = make_rollouts()
    num_rows = []
    hook = student.layers[0].register_forward_pre_hook(
        lambda layer, args: num_rows.append(args[1].shape[0])
    )
    _, stats = gradients(student, rollouts)
    hook.remove()
    nodes, leaves = count_nodes(rollouts)
    assert num_rows == [stats.tokens_forwarded] == [nodes - leaves]
    assert stats.unique_tokens == nodes
    assert stats.loss_tokens == sum(
        len(attempt.token_ids) for rollout in rollouts for attempt in rollout.attempts
    )
    assert stats.idle_rollouts == 0


def test_compute_logprobs(student_64: Decoder) -> None:
    """Log-probs are the naive ones in every packing; as the sampler's they leave no mismatch."""
    rollouts = make_rollouts()
    for packing, budget in (("tree", ALL), ("rows", ALL), ("tree", 20)):
        by_rollout = compute_logprobs(
            student_64, rollouts, packing=packing, token_budget=budget, temperature=TEMPERATURE
        )
        for rollout, logprobs in zip(rollouts, by_rollout, strict=True):
            expected = [
                logprobs for logprobs, _ in naive_logprobs(decoder_forward(student_64), rollout)
            ]
            assert [x.shape for x in logprobs] == [x.shape for x in expected]
            for actual_L, expected_L in zip(logprobs, expected, strict=True):
                torch.testing.assert_close(
                    actual_L.double(), expected_L.detach(), atol=1e-6, rtol=0
                )
    set_sampler_logprobs(rollouts, by_rollout)
    _, stats = gradients(student_64, rollouts)
    assert (
        stats.figures.sampler_mismatch_mean_nats <= stats.figures.sampler_mismatch_max_nats < 1e-5
    )
    assert stats.figures.ratio_mean == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_engine_and_packing_agree_on_cuts(packing: Any) -> None:
    """The trainer's log-probs are the sampler's for rollouts with every kind of cut.

    The engine and the packing each work out a cut attempt's context on their own.
    """
    student = make_student()
    engine = Engine(student, kv_cache_gib=0.01, page_size=4)
    params = SamplingParams(
        n=6, temperature=TEMPERATURE, max_new_tokens=9, eos_ids=(), ignore_eos=True
    )
    prompt = [1, 2, 3, 4, 5, 6]
    bridge = [7, 8, 9]
    first = generate_same(engine, [prompt], params, keep=True)[0]
    cuts = [None, 9, 8, 4, 0, -5]
    rollouts = []
    for attempt, cut in zip(first, cuts, strict=True):
        attempts = [attempt]
        context_len = len(prompt)
        for next_cut in (cut, -2):
            kept_tokens = context_len + (attempts[-1].num_tokens if next_cut is None else next_cut)
            engine.resume(attempts[-1], bridge, replace(params, n=1), kept_tokens=kept_tokens)
            context_len = kept_tokens + len(bridge)
            while engine.has_work:
                attempts += engine.step()
        engine.release(attempts)
        turns = turns_of(prompt, attempts, [bridge, bridge], [cut, -2])
        rollouts.append(
            Rollout(question_idx=0, rollout_idx=len(rollouts), prompt_ids=prompt, turns=turns)
        )
    by_rollout = compute_logprobs(
        student, rollouts, packing=packing, token_budget=ALL, temperature=TEMPERATURE
    )
    for rollout, by_attempt in zip(rollouts, by_rollout, strict=True):
        for attempt, logprobs_L in zip(rollout.attempts, by_attempt, strict=True):
            assert attempt.num_tokens == 9
            assert (attempt.logprobs - logprobs_L).abs().max() < 1e-4, (
                f"kept {rollout.next_context(0)[0]}"
            )


@pytest.mark.parametrize("shift", [0.2, -1e-3, 0.0])
def test_approx_kl_is_k3(student_64: Decoder, shift: float) -> None:
    """Small ones as well, where ratio - 1 - log(ratio) would be rounding only in fp32."""
    rollouts = make_rollouts()
    own = compute_logprobs(student_64, rollouts, token_budget=ALL, temperature=TEMPERATURE)
    old = [[logprobs_L + shift for logprobs_L in by_attempt] for by_attempt in own]
    _, stats = gradients(student_64, rollouts, old_logprobs=old)
    expected = math.expm1(-shift) + shift
    assert stats.figures.approx_kl == pytest.approx(expected, rel=2e-3, abs=1e-12)


def test_nothing_to_train() -> None:
    student = make_student()
    stats = policy_gradients(student, [], token_budget=ALL, temperature=1.0)
    assert (stats.loss, stats.loss_tokens, stats.tokens_forwarded, stats.num_microbatches) == (
        0.0,
        0,
        0,
        0,
    )
    assert all(param.grad is None for param in student.parameters())


def test_refusals() -> None:
    student = make_student()
    rollouts = make_rollouts()
    old = [[attempt.logprobs for attempt in rollout.attempts] for rollout in rollouts]
    too_short = [[x[1:] for x in attempts] for attempts in old]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss_agg": "mean"}, "loss_agg must be one of token_mean, .* got 'mean'"),
        (
            {"loss_agg": "seq_mean_token_sum_norm"},
            "max_new_tokens must be the sampler's .* got None",
        ),
        ({"num_loss_tokens": 0}, "num_loss_tokens must be >= 1, got 0"),
        ({"tis_clip": 0.0}, "tis_clip must be > 0 or None, got 0.0"),
        (
            {"old_logprobs": old[1:]},
            "old_logprobs must be a list for each of 17 rollouts, got 16",
        ),
        (
            {"old_logprobs": too_short},
            r"old_logprobs of rollouts\[0\].turns\[0\] must be \[L=4\], got 3",
        ),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"kl_coef": 0.1, "ref_logprobs": [[]] * 17}, r"ref_logprobs of .* must be \[L=4\], got 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            gradients(student, rollouts, **options)
    rollouts[0].turns[0].advantage = None
    with pytest.raises(
        ValueError, match=r"rollouts\[0\].turns\[0\].advantage must be a number, got None"
    ):
        gradients(student, rollouts)
