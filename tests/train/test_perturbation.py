"""What must not matter does not: prompts, bridges, cuts and rows without loss are perturbed, and
bits are compared.
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
from socpo_fast.train import step
from socpo_fast.train.packing import pack_rollouts
from socpo_fast.train.step import compute_logprobs, policy_gradients
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
from tests.train.test_packing import paths

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
    """One attempt in three is right; guidance follows each but the last."""
    rollouts = make_rollouts()
    for number, rollout in enumerate(rollouts):
        last = len(rollout.attempts) - 1
        for k, turn in enumerate(rollout.turns):
            turn.is_correct = k == last and number % 3 == 0
            turn.raw_reward = float(turn.is_correct)
            if turn.guidance is not None:
                turn.guidance.text = f"look again, {k}"
    return rollouts


def with_other_surroundings(rollouts: list[Rollout]) -> list[Rollout]:
    """The same attempts behind other prompts, bridges and guidance of other lengths, and cut
    elsewhere.
    """
    changed = deepcopy(rollouts)
    for rollout in changed:
        bridges = [[5, *turn.guidance.bridge_ids[1:], 7, 7] for turn in rollout.turns[:-1]]
        was_whole = [
            turn.guidance.kept_tokens == len(context + turn.attempt.token_ids)
            for turn, context in zip(rollout.turns[:-1], contexts(rollout), strict=False)
        ]
        cuts = [1 if whole else None for whole in was_whole]
        others = turns_of(rollout.prompt_ids + [0] * 3, rollout.attempts, bridges, cuts)
        rollout.prompt_ids = [VOCAB - 1 - token for token in rollout.prompt_ids] + [3, 0, 3]
        for turn, other in zip(rollout.turns, others, strict=True):
            turn.guidance = other.guidance
            if turn.guidance is not None:
                turn.guidance.text = "look, and <|im_end|> elsewhere"
    return changed


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus_baseline", "grpo"])
@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_and_weights_know_attempts_only(
    monkeypatch: Any, estimator: Any, loss: str
) -> None:
    """Rewards, whitening, normalisers and targets are bit for bit the same whatever stands around
    the attempts.
    """
    student = make_student()
    seen = []

    def spy(*head: Tensor, **options: Any) -> Any:
        names = ("targets_N", "old_logprobs_N", "advantages", "attempt_of_token_N", "weights_N")
        seen.append({name: options[name] for name in names})
        return linear_policy_loss(*head, **options)

    monkeypatch.setattr(step, "linear_policy_loss", spy)
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
    assert len(seen) == 2
    for name, x in seen[0].items():
        assert_bitwise_equal(seen[1][name], x, name=name)
    own, other = (compute_logprobs(student, batch, **ALL) for batch in (rollouts, changed))
    assert not torch.equal(
        own[0][0], other[0][0]
    )  # only what the student thinks of them has changed


@pytest.fixture
def student_and_hidden() -> tuple[Decoder, list[Tensor]]:
    """A student, and what its last norm gave in each forward, with gradients: a head's gradient
    stops at a zero row.
    """
    student = make_student()
    hidden = []

    def keep(norm: torch.nn.Module, args: Any, outputs: tuple[Tensor, Tensor]) -> None:
        if outputs[0].requires_grad:
            outputs[0].retain_grad()
            hidden.append(outputs[0])

    student.norm.register_forward_hook(keep)
    return student, hidden


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("loss", LOSSES)
def test_only_rows_before_sampled_tokens_get_a_gradient(
    student_and_hidden: Any, packing: Any, loss: str
) -> None:
    """Exactly zero at every prompt, bridge and kept-copy row that predicts no sampled token, and
    nowhere else.
    """
    (student, hidden), rollouts = student_and_hidden, make_rollouts()
    own = compute_logprobs(student, rollouts, **ALL)  # ratio 1: nothing clips
    reference = [[x - 0.5 for x in by_attempt] for by_attempt in own]
    alone = [[i] for i, rollout in enumerate(rollouts) if rollout.attempts]
    for places in (
        *alone,
        range(len(rollouts)),
    ):  # of one rollout, a row is known by what stands up to it
        chosen = [rollouts[i] for i in places]
        old = [own[i] for i in places]
        ref = [reference[i] for i in places]
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
            before_sampled = [
                context + attempt.token_ids[:t]
                for context, attempt in zip(contexts(chosen[0]), chosen[0].attempts, strict=True)
                for t in range(attempt.num_tokens)
            ]
            ids = microbatch.token_ids_T.tolist()
            row_ids = [[ids[row] for row in path] for path in paths(microbatch)]
            assert has_gradient.tolist() == [seen in before_sampled for seen in row_ids]


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_what_comes_later_leaves_earlier_attempts_alone(
    student_and_hidden: Any, packing: Any
) -> None:
    """Other guidance: log-probs and gradients of the attempts before it keep their bits, those
    after it do not.
    """
    student, hidden = student_and_hidden
    rollout = make_rollout(0, 0, [1, 2, 3], [5, 4, 6], [3, 3], [2, None])
    other = deepcopy(rollout)
    guidance = other.turns[1].guidance
    guidance.bridge_ids = [(token + 1) % VOCAB for token in guidance.bridge_ids]
    for each in (rollout, other):
        policy_gradients(student, [each], packing=packing, **ALL)
    rows = pack_rollouts([rollout], packing=packing, token_budget=10_000)[0].rows_N
    one, two = (x.grad[rows].split([5, 4, 6]) for x in hidden)
    assert_bitwise_equal(two[0], one[0], name="attempt 0")
    assert_bitwise_equal(two[1], one[1], name="attempt 1")
    assert not torch.equal(two[2], one[2])


@pytest.mark.parametrize("loss", ["plain", "all"])
def test_rows_without_loss_may_hold_anything(loss: str) -> None:
    """The op: other targets, advantages, old log-probs where the weight is 0, nan in rows that
    predict nothing.
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
    for name, one, two in zip(("loss", "hidden", "weight", "clip_fraction"), *results, strict=True):
        assert_bitwise_equal(two, one, name=name)
    assert not results[0][1][~torch.isin(torch.arange(40), rows[~masked])].any()


def one_id(rollouts: list[Rollout]) -> list[Rollout]:
    """Every token of prompts, attempts and bridges is the same, as where pad is eos and eos is all
    there is.
    """
    for rollout in rollouts:
        rollout.prompt_ids = [2] * len(rollout.prompt_ids)
        for turn in rollout.turns[:-1]:
            turn.guidance.bridge_ids = [2] * len(turn.guidance.bridge_ids)
        for attempt in rollout.attempts:
            attempt.token_ids = [2] * attempt.num_tokens
    return rollouts


def test_a_loss_token_is_known_by_its_place_never_by_its_id() -> None:
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
