"""Checks whole steps with Triton kernels, in its interpreter, against the reference.

A step is: rollouts, credit, two updates. Three runs start from the same weights: Triton's, the
reference's in the same dtype ("plain") and the reference's in fp64 ("truth"). All three update on
the rollouts that Triton sampled, so that they compute the same thing.
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

# Ops of the table of implementations that no step calls.
NOT_IN_A_STEP = {
    "rotary",  # rotary_qkv and rotary_write rotate what they norm
    "decay_rewards",  # compute_advantages decays in the same launch
    "sample",  # linear_sample draws from the LM head itself
    "policy_loss",  # linear_policy_loss has it inside
}
# Ops whose backward is a registered op of its own.
HAVE_BACKWARDS = ("rms_norm", "swiglu", "tree_attention")
REGISTERED_AS = {"compute_advantages": "credit_attempts"}  # the others under their own names
PRODUCT = "matmul_"  # of matrices: the C++ one stands in for cuBLAS on CPU tensors
CASES = [(model, dtype) for model in MODELS for dtype in LR]


class Step(NamedTuple):
    """The results of one step in three ways, and which implementations ran."""

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
    """Holds a whole tensor to the error rule, by its norm."""
    error = (actual.double() - truth).norm()
    size = truth.norm()
    allowed = 2 * (plain.double() - truth).norm() + TOLERANCE[dtype] * size
    assert error <= allowed, f"{name}: off by {error:.3e} of {size:.3e}, {allowed:.3e} allowed"


def test_every_op_that_can_runs_in_triton(step: Step) -> None:
    """Each op with a Triton kernel for the dtype runs it, forward and backward; others run ref."""
    ran = step.record.ran
    # Log-probs are computed by the updater in fp32 runs, and by the test in fp16 runs.
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
    """The rollouts cover all ends: right at once, right after guidance, and never right.

    Of wrong attempts one is shown to the teacher whole and one is cut.
    """
    verdicts = {tuple(turn.is_correct for turn in rollout.turns) for rollout in step.rollouts}
    assert verdicts == {(True,), (False, True), (False, False)}
    wrong = [r.turns[0].attempt for r in step.rollouts if len(r.turns) == 2]
    assert {attempt.num_tokens > ATTEMPT_LIMIT for attempt in wrong} == {False, True}
    assert {attempt.finish_reason for attempt in wrong} == {"stop", "length"}


def test_samples_as_the_reference_does(step: Step) -> None:
    """In fp32 the tokens are the reference's; log-probs follow the error rule in every dtype.

    In fp16 two tokens may be as near to each other as rounding, so they may differ.
    """
    if step.dtype == torch.float32:
        for rollout, plain_rollout in zip(step.rollouts, step.plain_rollouts, strict=True):
            last_idx = len(rollout.turns) - 1
            assert rollout.context_ids(last_idx) == plain_rollout.context_ids(last_idx)
            assert (
                rollout.attempts[last_idx].token_ids == plain_rollout.attempts[last_idx].token_ids
            )
            assert rollout.end_reason == plain_rollout.end_reason
    sampled = [[attempt.logprobs for attempt in rollout.attempts] for rollout in step.rollouts]
    with auto_means("ref"):
        plain = logprobs_of(step.start, step.rollouts)
        truth = logprobs_of(copy.deepcopy(step.start).double(), step.rollouts)
    three = [torch.cat([x for xs in run for x in xs]) for run in (sampled, plain, truth)]
    size = three[2].abs().mean()
    assert_error_rule(*(x / size for x in three), name="log-probs", dtype=step.dtype)


def test_credits_as_the_reference_does(step: Step) -> None:
    expected_rollouts = copy.deepcopy(step.rollouts)
    with auto_means("ref"):
        assign_credit(expected_rollouts, options=CreditOptions())
    assert any(
        turn.reward not in (0.0, 1.0) for rollout in expected_rollouts for turn in rollout.turns
    )
    for rollout, expected_rollout in zip(step.rollouts, expected_rollouts, strict=True):
        for turn, expected in zip(rollout.turns, expected_rollout.turns, strict=True):
            assert (turn.reward, turn.advantage) == (expected.reward, expected.advantage)


def test_gradients_are_as_right_as_ref(step: Step) -> None:
    """Gradients follow the error rule: those of the first update entry by entry, then by norm.

    The second update starts from weights that differ by the rounding of the first one.
    """
    runs = (step.triton, step.plain, step.truth)
    for idx, check in enumerate((assert_error_rule, assert_near)):
        for name, truth in step.truth.gradients[idx].items():
            size = truth.abs().max()
            assert size > 1e-3, name
            three = (run.gradients[idx][name] / size for run in runs)
            check(*three, name=name, dtype=step.dtype)


def test_parameters_are_as_right_as_ref(step: Step) -> None:
    """Updated entries follow the error rule where the sign of their gradient is certain.

    AdamW moves an entry by about lr, however small its gradient is. Where the gradient is nearly 0,
    rounding decides the direction, in the reference too. There only the distance is bounded.
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


def test_a_second_run_is_bitwise_equal() -> None:
    model, dtype = CASES[-1]
    first = run_step(model, dtype)
    (rollouts, second) = triton_step(make_start(model, dtype), dtype)
    for first_rollout, second_rollout in zip(first.rollouts, rollouts, strict=True):
        for turn, again in zip(first_rollout.turns, second_rollout.turns, strict=True):
            assert turn.attempt.token_ids == again.attempt.token_ids
            assert turn.advantage == again.advantage
            assert_bitwise_equal(turn.attempt.logprobs, again.attempt.logprobs, name="log-probs")
    for first_tensors, second_tensors in (
        *zip(first.triton.gradients, second.gradients, strict=True),
        (first.triton.params, second.params),
    ):
        for name, x in first_tensors.items():
            assert_bitwise_equal(x, second_tensors[name], name=name)
