"""Whole steps with Triton wherever it can run, in its interpreter, against the reference.

Three runs start from the same weights: Triton's, the reference's in the same dtype ("plain") and
the reference's in fp64 ("truth"). All three update on the rollouts that Triton sampled, so that
they answer the same question.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import CreditOptions
from socpo_fast.ops._impl import IMPLS, INTERPRETS
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.types import Rollout
from tests.helpers.error_rule import TOLERANCE, assert_bitwise_equal, assert_error_rule
from tests.helpers.whole_step import (
    ATTEMPT_LIMIT,
    LR,
    MODELS,
    Record,
    Updates,
    auto_means,
    logprobs_of,
    make_start,
    recorded,
    sample,
    two_updates,
)

pytestmark = pytest.mark.skipif(not INTERPRETS, reason="Triton runs on CPU tensors here")

# What no step calls, of the table of implementations.
NOT_IN_A_STEP = {
    "rotary",  # rotary_qkv and rotary_write rotate what they norm
    "decay_rewards",  # compute_advantages decays in the same launch
    "sample",  # linear_sample draws from the LM head itself
    "policy_loss",  # linear_policy_loss has it inside
}
HAVE_BACKWARDS = ("rms_norm", "swiglu", "tree_attention")  # that are registered ops themselves
REGISTERED_AS = {"compute_advantages": "credit_attempts"}  # the others under their own names
PRODUCT = "matmul_"  # of matrices: the C++ one stands in for cuBLAS on CPU tensors
CASES = [(model, dtype) for model in MODELS for dtype in LR]


class Step(NamedTuple):
    """One step in three ways."""

    start: Decoder
    dtype: torch.dtype
    rollouts: list[Rollout]
    plain_rollouts: list[Rollout]
    triton: Updates
    plain: Updates
    truth: Updates
    record: Record
    plain_record: Record


def triton_step(start: Decoder, dtype: torch.dtype) -> tuple[list[Rollout], Updates]:
    with auto_means("triton"):
        rollouts = sample(start)
        return rollouts, two_updates(copy.deepcopy(start), rollouts, dtype)


@functools.cache
def run_step(model: str, dtype: torch.dtype) -> Step:
    start = make_start(model, dtype)
    with recorded() as record:
        rollouts, triton = triton_step(start, dtype)
    with auto_means("ref"):
        with recorded() as plain_record:
            plain_rollouts = sample(start)
            plain = two_updates(copy.deepcopy(start), rollouts, dtype)
        truth = two_updates(copy.deepcopy(start).double(), rollouts, dtype)
    return Step(
        start,
        dtype,
        rollouts,
        plain_rollouts,
        triton,
        plain,
        truth,
        record,
        plain_record,
    )


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{str(case[1]).split('.')[1]}")
def step(request: pytest.FixtureRequest) -> Step:
    return run_step(*request.param)


def assert_near(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    name: str,
    dtype: torch.dtype,
) -> None:
    """Hold a whole tensor to the error rule, by its norm."""
    error = (actual.double() - truth).norm()
    size = truth.norm()
    allowed = 2 * (plain.double() - truth).norm() + TOLERANCE[dtype] * size
    assert error <= allowed, f"{name}: off by {error:.3e} of {size:.3e}, {allowed:.3e} allowed"


def test_every_op_that_can_runs_in_triton(step: Step) -> None:
    ran = step.record.ran
    # Updater asks for log-probs in fp32, and in fp16 the test does.
    assert step.record.picked.keys() == IMPLS.keys() - NOT_IN_A_STEP
    for op, picked in step.record.picked.items():
        is_triton = step.dtype in IMPLS[op].get("triton", ())
        assert picked == {"triton" if is_triton else "ref"}, op
        names = [REGISTERED_AS.get(op, op)]
        names += [f"{op}_backward"] if op in HAVE_BACKWARDS else []
        assert not is_triton or all((name, "triton") in ran for name in names), op
    assert {impl for name, impl in ran if name != PRODUCT} == {"triton"}


def test_the_reference_runs_no_kernel(step: Step) -> None:
    picked = step.plain_record.picked
    ran = step.plain_record.ran
    assert picked.keys() == step.record.picked.keys()
    assert set.union(*picked.values()) == {"ref"}
    assert {impl for name, impl in ran if name != PRODUCT} == {"ref"}


def test_attempts_end_in_every_way(step: Step) -> None:
    """Right at once, after help and never; a wrong one shown whole, and one that was cut."""
    verdicts = {tuple(turn.is_correct for turn in rollout.turns) for rollout in step.rollouts}
    assert verdicts == {(True,), (False, True), (False, False)}
    wrong = [r.turns[0].attempt for r in step.rollouts if len(r.turns) == 2]
    assert {attempt.num_tokens > ATTEMPT_LIMIT for attempt in wrong} == {False, True}
    assert {attempt.finish_reason for attempt in wrong} == {"stop", "length"}


def test_samples_as_the_reference_does(step: Step) -> None:
    """The same tokens in fp32; in fp16 two may be as near as a rounding."""
    if step.dtype == torch.float32:
        for one, other in zip(step.rollouts, step.plain_rollouts, strict=True):
            last = len(one.turns) - 1
            assert one.context_ids(last) == other.context_ids(last)
            assert one.attempts[last].token_ids == other.attempts[last].token_ids
            assert one.end_reason == other.end_reason
    sampled = [[attempt.logprobs for attempt in rollout.attempts] for rollout in step.rollouts]
    with auto_means("ref"):
        plain = logprobs_of(step.start, step.rollouts)
        truth = logprobs_of(copy.deepcopy(step.start).double(), step.rollouts)
    three = [torch.cat([x for xs in run for x in xs]) for run in (sampled, plain, truth)]
    size = three[2].abs().mean()
    assert_error_rule(*(x / size for x in three), name="log-probs", dtype=step.dtype)


def test_credits_as_the_reference_does(step: Step) -> None:
    again = copy.deepcopy(step.rollouts)
    with auto_means("ref"):
        assign_credit(again, options=CreditOptions())
    assert any(turn.reward not in (0.0, 1.0) for rollout in again for turn in rollout.turns)
    for one, other in zip(step.rollouts, again, strict=True):
        for turn, expected in zip(one.turns, other.turns, strict=True):
            assert (turn.reward, turn.advantage) == (expected.reward, expected.advantage)


def test_gradients_are_as_right_as_ref(step: Step) -> None:
    """The first update's entry by entry; the second's start where rounded steps have led."""
    runs = (step.triton, step.plain, step.truth)
    for idx, check in enumerate((assert_error_rule, assert_near)):
        for name, truth in step.truth.gradients[idx].items():
            size = truth.abs().max()
            assert size > 1e-3, name
            three = (run.gradients[idx][name] / size for run in runs)
            check(*three, name=name, dtype=step.dtype)


def test_parameters_are_as_right_as_ref(step: Step) -> None:
    """Entry by entry, where gradients are known well enough to say which way one goes.

    AdamW moves an entry by about lr, however small its gradient is. Where that is next to nothing,
    rounding decides the way, in the reference too; there only the length of the way is bounded.
    """
    lr = LR[step.dtype]
    tolerance = TOLERANCE[step.dtype]
    num_held = 0
    for name, param in step.start.named_parameters():
        is_held = torch.ones_like(param, dtype=torch.bool)
        for by_name in step.truth.gradients:
            size = by_name[name].abs()
            is_held &= (size > 5 * tolerance * size.max()) | (size == 0)
        three = [run.params[name] for run in (step.triton, step.plain, step.truth)]
        assert_error_rule(*(x[is_held] for x in three), name=name)
        moved = (three[0] - param).detach()
        assert lr < moved.abs().max() < 2.5 * lr, name
        num_held += int(is_held.sum())
    assert num_held > 0.25 * sum(param.numel() for param in step.start.parameters())


def test_same_bits_again() -> None:
    model, dtype = CASES[-1]
    one = run_step(model, dtype)
    (rollouts, two) = triton_step(make_start(model, dtype), dtype)
    for rollout, other in zip(one.rollouts, rollouts, strict=True):
        for turn, again in zip(rollout.turns, other.turns, strict=True):
            assert turn.attempt.token_ids == again.attempt.token_ids
            assert turn.advantage == again.advantage
            assert_bitwise_equal(turn.attempt.logprobs, again.attempt.logprobs, name="log-probs")
    for tensors, others in (
        *zip(one.triton.gradients, two.gradients, strict=True),
        (one.triton.params, two.params),
    ):
        for name, x in tensors.items():
            assert_bitwise_equal(x, others[name], name=name)
