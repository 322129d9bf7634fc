"""The update's gradient against a computation that knows nothing of packing: one plain forward an attempt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.model.decoder import Decoder
from socpo_fast.train.step import compute_logprobs, policy_gradients
from socpo_fast.types import Rollout
from tests.train.rollouts import make_rollouts, make_student

ALL = 10_000  # a token budget that everything fits into
TEMPERATURE = 0.8


def gradients(student: Decoder, rollouts: list[Rollout], **options: Any) -> tuple[dict[str, Tensor], Any]:
    student.zero_grad(set_to_none=True)
    stats = policy_gradients(student, rollouts, temperature=TEMPERATURE, **{"token_budget": ALL} | options)
    return {name: param.grad.clone() for name, param in student.named_parameters()}, stats


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, grad in expected.items():
        error, size = (found[name] - grad).abs().max(), grad.abs().max()
        assert error <= tolerance * size, f"{name}: off by {error:.2e} of {size:.2e}"


def naive_logits(student: Decoder, token_ids: list[int]) -> Tensor:
    """Logits of one row by itself, with attention written out."""

    def attend(layer_idx: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        heads_per_kv = q_THE.shape[1] // k_TKE.shape[1]
        k_THE, v_THE = k_TKE.repeat_interleave(heads_per_kv, 1), v_TKE.repeat_interleave(heads_per_kv, 1)
        scores = torch.einsum("the,she->hts", q_THE, k_THE) / q_THE.shape[-1] ** 0.5
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        return torch.einsum("hts,she->the", scores.masked_fill(future, -torch.inf).softmax(-1), v_THE)

    hidden_TD = student(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    return hidden_TD @ student.lm_head.weight.T


def naive_logprobs(student: Decoder, rollout: Rollout) -> list[tuple[Tensor, Tensor]]:
    """(logprob, entropy) of every token of every attempt."""
    found, context = [], list(rollout.prompt_ids)
    for attempt_idx, attempt in enumerate(rollout.attempts):
        logits = naive_logits(student, context + attempt.token_ids)[len(context) - 1 : -1] / TEMPERATURE
        probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        logprobs = probabilities[torch.arange(attempt.num_tokens), torch.tensor(attempt.token_ids)].log()
        found.append((logprobs, -(probabilities * probabilities.log()).sum(-1)))
        if attempt_idx < len(rollout.bridges):
            context = context + attempt.token_ids[: rollout.cuts[attempt_idx]] + rollout.bridges[attempt_idx]
    return found


def naive_gradients(
    student: Decoder,
    rollouts: list[Rollout],
    loss_agg: str = "token_mean",
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    old: list[list[Tensor]] | None = None,
    ref: list[list[Tensor]] | None = None,
    tis_clip: float | None = None,
) -> tuple[dict[str, Tensor], float]:
    lengths = [attempt.num_tokens for rollout in rollouts for attempt in rollout.attempts]
    loss = torch.zeros((), dtype=student.lm_head.weight.dtype)
    for place, rollout in enumerate(rollouts):
        for attempt_idx, (logprobs, entropy) in enumerate(naive_logprobs(student, rollout)):
            advantage, sampler = rollout.advantages[attempt_idx], rollout.attempts[attempt_idx].logprobs
            old_logprobs = sampler if old is None else old[place][attempt_idx]
            for t in range(len(logprobs)):
                ratio = (logprobs[t] - old_logprobs[t]).exp()
                term = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
                if advantage < 0:
                    term = term.clamp(max=-3.0 * advantage)
                term = term - entropy_coef * entropy[t]
                if ref is not None:
                    difference = ref[place][attempt_idx][t] - logprobs[t]
                    term = term + kl_coef * (difference.exp() - 1 - difference)
                weight = {
                    "token_mean": 1 / sum(lengths),
                    "seq_mean_token_mean": 1 / len(lengths) / len(logprobs),
                    "seq_mean_token_sum_norm": 1 / len(lengths) / 7,
                }[loss_agg]
                if tis_clip is not None:
                    weight = weight * min(float((old_logprobs[t] - sampler[t]).exp()), tis_clip)
                loss = loss + weight * term
    student.zero_grad(set_to_none=True)
    loss.backward()
    return {name: param.grad.clone() for name, param in student.named_parameters()}, loss.item()


def near_policy(student: Decoder, rollouts: list[Rollout], spread: float, seed: int) -> list[list[Tensor]]:
    """fp32 log-probs around the student's own, so that some ratios clip and others do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        own = [[logprobs.float() for logprobs, _ in naive_logprobs(student, rollout)] for rollout in rollouts]
    return [[x + spread * torch.randn(x.shape, generator=generator) for x in attempts] for attempts in own]


@pytest.fixture(scope="module")
def student_64() -> Decoder:
    return make_student(dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_agg": "seq_mean_token_mean"},
        {"loss_agg": "seq_mean_token_sum_norm", "max_new_tokens": 7},
        {"entropy_coef": 0.1, "kl_coef": 0.3, "ref": True},
        {"old": True, "tis_clip": 1.1},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_gradient_equals_one_forward_an_attempt(student_64: Decoder, options: dict[str, Any]) -> None:
    rollouts = make_rollouts()
    ref = near_policy(student_64, rollouts, 0.5, seed=2) if options.get("ref") else None
    old = near_policy(student_64, rollouts, 0.3, seed=1)
    if not options.get("old"):  # the default: the sampler's
        for rollout, logprobs in zip(rollouts, old, strict=True):
            for attempt, logprobs_L in zip(rollout.attempts, logprobs, strict=True):
                attempt.logprobs = logprobs_L
    plain = {name: value for name, value in options.items() if name not in ("ref", "old", "max_new_tokens")}
    expected, loss = naive_gradients(student_64, rollouts, old=old, ref=ref, **plain)
    given = {name: value for name, value in options.items() if name not in ("ref", "old")}
    given |= {"old_logprobs": old if options.get("old") else None, "ref_logprobs": ref}
    found, stats = gradients(student_64, rollouts, **given)
    assert_close(found, expected, 1e-6)  # weights and advantages are fp32
    assert stats.loss == pytest.approx(loss, rel=1e-6)
    assert 0 < stats.clip_fraction < 1


def test_tree_equals_rows(student_64: Decoder) -> None:
    rollouts = make_rollouts()
    tree, tree_stats = gradients(student_64, rollouts, packing="tree")
    rows, rows_stats = gradients(student_64, rollouts, packing="rows")
    assert_close(tree, rows, 1e-9)
    assert tree_stats.loss == pytest.approx(rows_stats.loss, rel=1e-9)
    student = make_student()
    assert_close(gradients(student, rollouts, packing="tree")[0], gradients(student, rollouts, packing="rows")[0], 1e-5)


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("token_budget", [1, 20, 45])
def test_splitting_changes_nothing(student_64: Decoder, packing: str, token_budget: int) -> None:
    rollouts = make_rollouts()
    whole, whole_stats = gradients(student_64, rollouts)
    split, stats = gradients(student_64, rollouts, packing=packing, token_budget=token_budget)
    assert stats.num_microbatches > 1
    assert_close(split, whole, 1e-6)
    for name in ("loss", "entropy", "ratio_mean", "clip_fraction", "sampler_mismatch_mean_nats"):
        assert getattr(stats, name) == pytest.approx(getattr(whole_stats, name), rel=1e-6)


def test_calls_add_up_under_the_updates_normaliser(student_64: Decoder) -> None:
    rollouts = make_rollouts()
    whole, _ = gradients(student_64, rollouts, loss_agg="seq_mean_token_mean")
    num_attempts = sum(len(rollout.attempts) for rollout in rollouts)
    student_64.zero_grad(set_to_none=True)
    for part in (rollouts[:5], rollouts[5:]):
        policy_gradients(
            student_64,
            part,
            token_budget=ALL,
            temperature=TEMPERATURE,
            loss_agg="seq_mean_token_mean",
            num_attempts=num_attempts,
        )
    assert_close({name: param.grad for name, param in student_64.named_parameters()}, whole, 1e-6)


def test_same_inputs_same_bits_and_checkpointing_changes_none() -> None:
    student, rollouts = make_student(), make_rollouts()
    first, _ = gradients(student, rollouts)
    for options in ({}, {"checkpointing": True}):
        again, _ = gradients(student, rollouts, **options)
        assert all(torch.equal(again[name], grad) for name, grad in first.items())


def test_rows_that_enter_layer_0_are_those_counted_from_the_rollouts() -> None:
    student, rollouts, entered = make_student(), make_rollouts(), []
    hook = student.layers[0].register_forward_pre_hook(lambda layer, args: entered.append(args[1].shape[0]))
    _, stats = gradients(student, rollouts)
    hook.remove()
    trained = [rollout for rollout in rollouts if rollout.attempts]
    prompts = {(rollout.question_idx, tuple(rollout.prompt_ids)) for rollout in trained}
    nodes = sum(len(prompt) for _, prompt in prompts)
    leaves = len(trained)
    for rollout in trained:
        nodes += sum(len(attempt.token_ids) for attempt in rollout.attempts) + sum(map(len, rollout.bridges))
        for cut, attempt in zip(rollout.cuts, rollout.attempts[:-1], strict=True):
            leaves += cut is not None and cut < len(attempt.token_ids)
    assert entered == [stats.tokens_forwarded] == [nodes - leaves]
    assert stats.unique_tokens == nodes
    assert stats.loss_tokens == sum(len(attempt.token_ids) for rollout in trained for attempt in rollout.attempts)


def test_only_rows_before_sampled_tokens_get_a_gradient() -> None:
    """Prompt and bridge tokens are targets of nothing: hidden states that predict only them meet no loss."""
    student, rollout, hidden = make_student(), make_rollouts()[6], []  # attempts of 7 (cut at 3), 5 and 4 tokens
    own = compute_logprobs(student, [rollout], token_budget=ALL, temperature=TEMPERATURE)  # ratio 1: nothing clips

    def keep(norm: torch.nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        hidden.append(output)

    hook = student.norm.register_forward_hook(keep)
    _, stats = gradients(student, [rollout], old_logprobs=own)
    hook.remove()
    (hidden_TD,) = hidden
    prompt, kept, tail, bridge, second, third = 1, 3, 3, 3, 5, 3  # tail and third attempt without their last token
    predicts = [True] * (prompt + kept + tail) + [False] * (bridge - 1) + [True] * second
    predicts += [False] * bridge + [True] * (1 + third)  # the second attempt's last token is followed by the bridge
    assert (hidden_TD.grad != 0).any(1).tolist() == predicts
    assert stats.loss_tokens == 7 + 5 + 4


def test_zero_advantages_give_a_zero_gradient() -> None:
    student, rollouts = make_student(), make_rollouts()
    for rollout in rollouts:
        rollout.advantages = [0.0] * len(rollout.attempts)
    found, stats = gradients(student, rollouts, token_budget=20)
    assert all((grad == 0).all() for grad in found.values())
    assert (stats.loss, stats.clip_fraction) == (0.0, 0.0)
    assert stats.entropy != stats.entropy  # nan: nothing was projected


def test_compute_logprobs(student_64: Decoder) -> None:
    rollouts = make_rollouts()
    for packing, budget in (("tree", ALL), ("rows", ALL), ("tree", 20)):
        found = compute_logprobs(student_64, rollouts, packing=packing, token_budget=budget, temperature=TEMPERATURE)
        for rollout, logprobs in zip(rollouts, found, strict=True):
            expected = [logprobs for logprobs, _ in naive_logprobs(student_64, rollout)]
            assert [x.shape for x in logprobs] == [x.shape for x in expected]
            for one, other in zip(logprobs, expected, strict=True):
                torch.testing.assert_close(one.double(), other.detach(), atol=1e-6, rtol=0)
    with torch.no_grad():  # the sampler's own log-probs leave no mismatch
        for rollout, logprobs in zip(rollouts, found, strict=True):
            for attempt, logprobs_L in zip(rollout.attempts, logprobs, strict=True):
                attempt.logprobs = logprobs_L
    _, stats = gradients(student_64, rollouts)
    assert stats.sampler_mismatch_mean_nats <= stats.sampler_mismatch_max_nats < 1e-5
    assert stats.ratio_mean == pytest.approx(1.0, abs=1e-6)


def test_nothing_to_train() -> None:
    student = make_student()
    stats = policy_gradients(student, [], token_budget=ALL, temperature=1.0)
    assert (stats.loss, stats.loss_tokens, stats.tokens_forwarded, stats.num_microbatches) == (0.0, 0, 0, 0)
    assert all(param.grad is None for param in student.parameters())


def test_refusals() -> None:
    student, rollouts = make_student(), make_rollouts()
    own = [[attempt.logprobs for attempt in rollout.attempts] for rollout in rollouts]
    short = [[x[1:] for x in attempts] for attempts in own]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss_agg": "mean"}, "loss_agg must be one of token_mean, .* got 'mean'"),
        ({"loss_agg": "seq_mean_token_sum_norm"}, "max_new_tokens must be the sampler's .* got None"),
        ({"num_loss_tokens": 0}, "num_loss_tokens must be >= 1, got 0"),
        ({"tis_clip": 0.0}, "tis_clip must be > 0 or None, got 0.0"),
        ({"old_logprobs": own[1:]}, "old_logprobs must be a list for each of 12 rollouts, got 11"),
        ({"old_logprobs": short}, r"old_logprobs of rollouts\[0\].attempts\[0\] must be \[L=4\], got 3"),
        ({"kl_coef": 0.1}, "ref_logprobs"),
        ({"kl_coef": 0.1, "ref_logprobs": [[]] * 12}, r"ref_logprobs of .* must be \[L=4\], got 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            gradients(student, rollouts, **options)
    rollouts[0].advantages = []
    with pytest.raises(ValueError, match=r"rollouts\[0\].advantages must be one for each of its 1 attempts, got 0"):
        gradients(student, rollouts)
