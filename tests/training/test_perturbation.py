"""Perturbs what must not matter: prompts, bridges, cuts and rows without loss; compares bitwise.

Only sampled tokens have a loss. Credit depends on the attempts, not on the text around them.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import CreditOptions, linear_policy_loss
from socpo_fast.socratic.credit import assign_credit
from socpo_fast.training import step
from socpo_fast.training.packing import pack_rollouts
from socpo_fast.training.step import compute_logprobs, policy_gradients
from socpo_fast.types import Rollout
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.loss_options import gathered
from tests.helpers.made_rollouts import (
    VOCAB,
    contexts,
    make_rollout,
    make_rollouts,
    make_student,
    turns_of,
)
from tests.helpers.naive_update import TEMPERATURE, assert_close, naive_gradients
from tests.training.test_packing import paths

ALL = {"token_budget": 10_000, "temperature": TEMPERATURE}
LOSSES = {
    "plain": {},
    "all": {
        "entropy_coef": 0.1,
        "kl_coef": 0.1,
        "tis_clip": 2.0,
        "loss_agg": "seq_mean_token_mean",
    },
}


def graded_rollouts() -> list[Rollout]:
    """Returns rollouts with verdicts and guidance; the last attempt of one in three is right."""
    rollouts = make_rollouts()
    for number, rollout in enumerate(rollouts):
        last_idx = len(rollout.attempts) - 1
        for k, turn in enumerate(rollout.turns):
            turn.is_correct = k == last_idx and number % 3 == 0
            turn.raw_reward = float(turn.is_correct)
            if turn.guidance is not None:
                turn.guidance.text = f"look again, {k}"
    return rollouts


def with_other_surroundings(rollouts: list[Rollout]) -> list[Rollout]:
    """Returns the same attempts behind other prompts, bridges and guidance, cut elsewhere.

    All of these have other lengths, too.
    """
    changed = deepcopy(rollouts)
    for rollout in changed:
        bridges = [[5, *turn.guidance.bridge_ids[1:], 7, 7] for turn in rollout.turns[:-1]]
        was_uncut = [
            turn.guidance.kept_tokens == len(context + turn.attempt.token_ids)
            for turn, context in zip(rollout.turns[:-1], contexts(rollout), strict=False)
        ]
        cuts = [1 if uncut else None for uncut in was_uncut]
        new_turns = turns_of(rollout.prompt_ids + [0] * 3, rollout.attempts, bridges, cuts)
        rollout.prompt_ids = [VOCAB - 1 - token for token in rollout.prompt_ids] + [3, 0, 3]
        for turn, new_turn in zip(rollout.turns, new_turns, strict=True):
            turn.guidance = new_turn.guidance
            if turn.guidance is not None:
                turn.guidance.text = "look, and <|im_end|> elsewhere"
    return changed


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "grpo"])
@pytest.mark.parametrize("loss", LOSSES)
def test_credit_depends_on_attempts_only(monkeypatch: Any, estimator: Any, loss: str) -> None:
    """Rewards, advantages, weights and targets do not depend on what surrounds the attempts."""
    student = make_student()
    loss_inputs = []

    def note_inputs(*tensors: Tensor, **options: Any) -> Any:
        names = ("targets_N", "old_logprobs_N", "advantages", "attempt_of_token_N", "weights_N")
        loss_inputs.append({name: options[name] for name in names})
        return linear_policy_loss(*tensors, **options)

    monkeypatch.setattr(step, "linear_policy_loss", note_inputs)
    rollouts = graded_rollouts()
    changed = with_other_surroundings(rollouts)
    ref = [[attempt.logprobs for attempt in rollout.attempts] for rollout in rollouts]
    for batch in (rollouts, changed):
        assign_credit(batch, options=CreditOptions(estimator=estimator))
        policy_gradients(
            student, batch, old_logprobs=ref, ref_logprobs=ref, **ALL, **gathered(LOSSES[loss])
        )
    credit = [
        [(turn.reward, turn.advantage) for r in batch for turn in r.turns]
        for batch in (rollouts, changed)
    ]
    assert credit[0] == credit[1]
    assert len({advantage for _, advantage in credit[0]}) > 3
    assert len(loss_inputs) == 2
    for name, x in loss_inputs[0].items():
        assert_bitwise_equal(loss_inputs[1][name], x, name=name)
    # The perturbation is real: the student's log-probs of the same attempts did change.
    old, new = (compute_logprobs(student, batch, **ALL) for batch in (rollouts, changed))
    assert not torch.equal(old[0][0], new[0][0])


@pytest.fixture
def student_and_hidden() -> tuple[Decoder, list[Tensor]]:
    """Returns a student and a list that receives the hidden states of each forward.

    They are the outputs of the last norm, the LM head's input, and keep their gradients. A row that
    predicts nothing has a gradient of exactly 0 there.
    """
    student = make_student()
    hidden = []

    def keep_hidden(norm: torch.nn.Module, args: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if outputs[0].requires_grad:
            outputs[0].retain_grad()
            hidden.append(outputs[0])

    student.norm.register_forward_hook(keep_hidden)
    return student, hidden


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("loss", LOSSES)
def test_only_rows_that_predict_get_a_gradient(
    student_and_hidden: Any, packing: Any, loss: str
) -> None:
    """A row has a gradient of exactly 0 if and only if it predicts no sampled token.

    Such rows belong to prompts, to bridges and to copies of kept tokens.
    """
    (student, hidden), rollouts = student_and_hidden, make_rollouts()
    old_logprobs = compute_logprobs(student, rollouts, **ALL)  # ratio 1: nothing clips
    reference = [[x - 0.5 for x in by_attempt] for by_attempt in old_logprobs]
    singles = [[i] for i, rollout in enumerate(rollouts) if rollout.attempts]
    # Each rollout by itself, then all. In a single rollout the tokens up to a row say which row it
    # is, so that the rows that predict can be found without packing's own `rows_N`.
    for indices in (*singles, range(len(rollouts))):
        chosen = [rollouts[i] for i in indices]
        old = [old_logprobs[i] for i in indices]
        ref = [reference[i] for i in indices]
        policy_gradients(
            student,
            chosen,
            packing=packing,
            old_logprobs=old,
            ref_logprobs=ref,
            **ALL,
            **gathered(LOSSES[loss]),
        )
        (microbatch,) = pack_rollouts(chosen, packing=packing, token_budget=10_000)
        has_gradient = (hidden.pop().grad != 0).any(1)
        predicts = torch.zeros(microbatch.tokens_forwarded, dtype=torch.bool)
        predicts[microbatch.rows_N] = True
        assert torch.equal(has_gradient, predicts)
        if len(chosen) == 1:
            sampling_contexts = [
                context + attempt.token_ids[:t]
                for context, attempt in zip(contexts(chosen[0]), chosen[0].attempts, strict=True)
                for t in range(attempt.num_tokens)
            ]
            ids = microbatch.token_ids_T.tolist()
            row_ids = [[ids[row] for row in path] for path in paths(microbatch)]
            assert has_gradient.tolist() == [seen in sampling_contexts for seen in row_ids]


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_later_guidance_changes_no_earlier_attempt(student_and_hidden: Any, packing: Any) -> None:
    """Other guidance leaves the gradients of attempts before it bitwise equal.

    Those of the attempt after it change.
    """
    student, hidden = student_and_hidden
    rollout = make_rollout(0, 0, [1, 2, 3], [5, 4, 6], [3, 3], [2, None])
    changed = deepcopy(rollout)
    guidance = changed.turns[1].guidance
    guidance.bridge_ids = [(token + 1) % VOCAB for token in guidance.bridge_ids]
    for each in (rollout, changed):
        policy_gradients(student, [each], packing=packing, **ALL)
    rows = pack_rollouts([rollout], packing=packing, token_budget=10_000)[0].rows_N
    expected, actual = (x.grad[rows].split([5, 4, 6]) for x in hidden)
    assert_bitwise_equal(actual[0], expected[0], name="attempt 0")
    assert_bitwise_equal(actual[1], expected[1], name="attempt 1")
    assert not torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("loss", ["plain", "all"])
def test_rows_without_loss_may_hold_anything(loss: str) -> None:
    """The op reads nothing of a token whose weight is 0, and no hidden row that predicts nothing.

    NaN hidden rows, NaN old log-probs, huge advantages and other targets there change nothing.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(40, 16, generator=generator)
    weight_VD = torch.randn(VOCAB, 16, generator=generator)
    targets = torch.randint(0, VOCAB, (24,), generator=generator)
    rows = torch.randperm(40, generator=generator)[:24].sort().values
    old = -4 + torch.rand(24, generator=generator)
    advantages = torch.randn(24, generator=generator)
    weights = torch.where(torch.arange(24) % 3 == 0, 0.0, 1 / 16)
    masked = weights == 0
    perturbed = {
        "hidden": torch.where(torch.isin(torch.arange(40), rows)[:, None], hidden_TD, torch.nan),
        "targets": torch.where(masked, (targets + 7) % VOCAB, targets),
        "old": torch.where(masked, torch.nan, old),
        "advantages": torch.where(masked, 1e30, advantages),
    }
    results = []
    for h, t, o, a in ((hidden_TD, targets, old, advantages), tuple(perturbed.values())):
        h_leaf = h.clone().requires_grad_()
        w_leaf = weight_VD.clone().requires_grad_()
        terms = (
            {"entropy_coef": 0.1, "kl_coef": 0.1, "ref_logprobs_N": o + 0.5}
            if loss == "all"
            else {}
        )
        options = gathered({"temperature": 0.8, "rows_N": rows, "weights_N": weights, **terms})
        policy = linear_policy_loss(h_leaf, w_leaf, t, o, a, **options)
        policy.loss.backward()
        results.append((policy.loss.detach(), h_leaf.grad, w_leaf.grad, policy.clip_fraction))
    for name, expected, actual in zip(
        ("loss", "hidden", "weight", "clip_fraction"), *results, strict=True
    ):
        assert_bitwise_equal(actual, expected, name=name)
    assert not results[0][1][~torch.isin(torch.arange(40), rows[~masked])].any()


def one_id(rollouts: list[Rollout]) -> list[Rollout]:
    """Gives all tokens of prompts, attempts and bridges the same id, in place.

    This is the extreme case of a model whose pad token is its eos token.
    """
    for rollout in rollouts:
        rollout.prompt_ids = [2] * len(rollout.prompt_ids)
        for turn in rollout.turns[:-1]:
            turn.guidance.bridge_ids = [2] * len(turn.guidance.bridge_ids)
        for attempt in rollout.attempts:
            attempt.token_ids = [2] * attempt.num_tokens
    return rollouts


def test_loss_tokens_are_found_by_position_not_id() -> None:
    """With one id for all tokens the gradient is still that of the sampled ones."""
    student: Decoder = make_student(dtype=torch.float64)
    rollouts = one_id(make_rollouts())
    expected, loss, _ = naive_gradients(student, rollouts)
    student.zero_grad(set_to_none=True)
    stats = policy_gradients(student, rollouts, **ALL)
    assert_close({name: param.grad for name, param in student.named_parameters()}, expected, 1e-6)
    assert stats.loss == pytest.approx(loss, rel=1e-6)
    assert stats.loss_tokens == sum(
        attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts
    )
