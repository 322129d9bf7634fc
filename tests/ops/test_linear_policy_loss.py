"""linear_policy_loss against log-softmax over all logits and policy_loss, and what it promises about rows."""

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from socpo_fast.ops import PolicyLoss, linear_policy_loss, policy_loss
from tests.error_rule import assert_bitwise_equal, assert_error_rule

linear_logprob_module = importlib.import_module("socpo_fast.ops.linear_logprob")  # as an attribute, the op


class Case(NamedTuple):
    """Inputs of one call in fp64; hidden and weight fit into bf16, so every dtype computes on the same numbers."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    rows: Tensor
    temperature: Tensor
    old: Tensor
    advantages: Tensor  # per attempt, the last one exactly 0
    attempt_of_token: Tensor
    weights: Tensor  # about a quarter 0
    ref: Tensor


def make_case(num_tokens: int = 37, num_rows: int = 53, vocab: int = 97, width: int = 16, peak: float = 4.0) -> Case:
    """Prime sizes; peaked logits, some log-probs near 0 and some far below; ratios on both sides of the clips."""
    rng = torch.Generator().manual_seed(num_tokens * 1000 + num_rows)
    hidden, weight = torch.randn(num_tokens, width, generator=rng), torch.randn(vocab, width, generator=rng)
    rows = torch.randint(num_tokens, (num_rows,), generator=rng) if num_tokens else torch.zeros(0, dtype=torch.int64)
    logits = hidden[rows] @ weight.T * (peak / width**0.5)
    best = logits.argmax(-1)
    targets = torch.where(
        torch.rand(num_rows, generator=rng) < 0.5, best, torch.randint(vocab, (num_rows,), generator=rng)
    )
    temperature = 0.5 + torch.rand(num_rows, generator=rng)
    logprobs = (logits / temperature[:, None]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    case = Case(
        hidden=(hidden * (peak / width**0.5)).bfloat16(),
        weight=weight.bfloat16(),
        targets=targets,
        rows=rows,
        temperature=temperature,
        old=logprobs + 0.5 * torch.randn(num_rows, generator=rng),
        advantages=torch.tensor([1.5, -0.7, -2.0, 0.0]),
        attempt_of_token=torch.arange(num_rows) % 4,
        weights=torch.rand(num_rows, generator=rng) * (torch.rand(num_rows, generator=rng) < 0.75) / max(1, num_rows),
        ref=logprobs + 0.5 * torch.randn(num_rows, generator=rng),
    )
    return Case(*(x.double() if x.is_floating_point() else x for x in case))


def materialised(case: Case, dtype: torch.dtype, **options: object) -> tuple[PolicyLoss, Tensor, Tensor]:
    """All logits at once, then policy_loss; the gradients of hidden and weight beside it."""
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight))
    wide = torch.promote_types(dtype, torch.float32)
    log_softmax = ((hidden[case.rows] @ weight.T).to(wide) / case.temperature.to(wide)[:, None]).log_softmax(-1)
    result = policy_loss(
        log_softmax.gather(1, case.targets[:, None])[:, 0],
        case.old.to(wide),
        case.advantages.to(wide),
        case.attempt_of_token,
        weights_N=case.weights.to(wide),
        entropy_N=-(log_softmax.exp() * log_softmax).sum(-1),
        ref_logprobs_N=case.ref.to(wide),
        **options,
    )
    result.loss.backward()
    return result, hidden.grad, weight.grad


def fused(case: Case, dtype: torch.dtype, **options: object) -> tuple[PolicyLoss, Tensor, Tensor]:
    """The op, in the same form as `materialised`."""
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight))
    wide = torch.promote_types(dtype, torch.float32)
    result = linear_policy_loss(
        hidden,
        weight,
        case.targets,
        case.old.to(wide),
        case.advantages.to(wide),
        case.attempt_of_token,
        temperature=case.temperature.to(wide),
        rows_N=case.rows,
        weights_N=case.weights.to(wide),
        ref_logprobs_N=case.ref.to(wide),
        **options,
    )
    result.loss.backward()
    return result, hidden.grad, weight.grad


OPTIONS = {
    "plain": {},
    "entropy_and_kl": {"entropy_coef": 0.05, "kl_coef": 0.1, "kl_estimator": "k3"},
    "no_dual_clip": {"dual_clip": None, "clip_low": 0.1, "clip_high": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
# one row, a prime number of them with repeats; a vocabulary that is one chunk + 1, a prime, a single word
@pytest.mark.parametrize(("num_tokens", "num_rows", "vocab"), [(1, 1, 97), (37, 53, 97), (5, 7, 1025), (3, 4, 1)])
def test_equals_log_softmax_of_all_logits(
    num_tokens: int, num_rows: int, vocab: int, dtype: torch.dtype, options: dict[str, object]
) -> None:
    case = make_case(num_tokens, num_rows, vocab)
    truth, plain = materialised(case, torch.float64, **options), materialised(case, dtype, **options)
    actual = fused(case, dtype, metrics="all", **options)
    for field in PolicyLoss._fields:
        assert_error_rule(*(getattr(x[0], field) for x in (actual, plain, truth)), name=field, dtype=dtype)
    for idx, name in ((1, "hidden.grad"), (2, "weight.grad")):
        assert actual[idx].dtype == dtype
        assert_error_rule(actual[idx], plain[idx], truth[idx], name=name)


def test_gradcheck() -> None:
    case = make_case(num_tokens=5, num_rows=7, vocab=11, width=3)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_policy_loss(
            hidden,
            weight,
            case.targets,
            case.old,
            case.advantages,
            case.attempt_of_token,
            temperature=case.temperature,
            rows_N=case.rows,
            weights_N=case.weights,
            entropy_coef=0.3,
            ref_logprobs_N=case.ref,
            kl_coef=0.2,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_change_nothing_but_rounding(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    whole = fused(case, torch.float64, **options)
    monkeypatch.setattr(linear_logprob_module, "_CHUNK_LOGITS", 97 * 5)
    chunked = fused(case, torch.float64, **options)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
            self.numel = max([self.numel, *(x.numel() for x in tensors)])
            return out

    monkeypatch.setattr(linear_logprob_module, "_CHUNK_LOGITS", 1025 * 4)
    case = make_case(num_tokens=40, num_rows=64, vocab=1025, width=3)
    with LargestTensor() as largest:
        fused(case, torch.float32, metrics="all", entropy_coef=0.1)
    assert largest.numel == 1025 * 4


def test_same_inputs_same_bits() -> None:
    case = make_case()
    first, second = fused(case, torch.float32), fused(case, torch.float32)
    for name, a, b in zip(PolicyLoss._fields, first[0], second[0], strict=True):
        assert_bitwise_equal(a, b, name=name)
    assert_bitwise_equal(first[1], second[1], name="hidden.grad")
    assert_bitwise_equal(first[2], second[2], name="weight.grad")


def test_microbatches_add_up_to_the_update() -> None:
    case = make_case()
    num_loss_tokens = case.rows.numel()

    def gradients(parts: list[slice]) -> tuple[Tensor, Tensor]:
        hidden, weight = (x.float().requires_grad_() for x in (case.hidden, case.weight))
        for part in parts:
            linear_policy_loss(
                hidden,
                weight,
                case.targets[part],
                case.old[part],
                case.advantages,
                case.attempt_of_token[part],
                temperature=0.8,
                rows_N=case.rows[part],
                num_loss_tokens=num_loss_tokens,
            ).loss.backward()
        return hidden.grad, weight.grad

    whole, split = gradients([slice(None)]), gradients([slice(0, 10), slice(10, 11), slice(11, None)])
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


def test_one_prompt_row_predicts_eight_first_tokens() -> None:
    case = make_case(num_tokens=1, num_rows=8)
    shared, copied = case, case._replace(hidden=case.hidden.repeat(8, 1), rows=torch.arange(8))
    (one, one_dx, one_dw), (eight, eight_dx, eight_dw) = fused(shared, torch.float64), fused(copied, torch.float64)
    torch.testing.assert_close(one, eight, equal_nan=True)
    torch.testing.assert_close(one_dx, eight_dx.sum(0, keepdim=True))
    torch.testing.assert_close(one_dw, eight_dw)


def test_skipped_rows_are_nan_and_change_nothing() -> None:
    case = make_case()
    skipped = (case.weights == 0) | (case.advantages[case.attempt_of_token] == 0)
    assert 0 < skipped.sum() < skipped.numel()
    some, some_dx, some_dw = fused(case, torch.float64)
    everything, all_dx, all_dw = fused(case, torch.float64, metrics="all")
    for field in ("logprobs", "entropy", "ratio"):
        assert torch.equal(getattr(some, field).isnan(), skipped)
        torch.testing.assert_close(getattr(some, field)[~skipped], getattr(everything, field)[~skipped])
    torch.testing.assert_close((some.loss, some.clip_fraction), (everything.loss, everything.clip_fraction))
    torch.testing.assert_close((some_dx, some_dw), (all_dx, all_dw))
    # with an entropy or KL term only a weight of 0 skips a row
    assert torch.equal(fused(case, torch.float64, kl_coef=0.1)[0].ratio.isnan(), case.weights == 0)


def test_rows_without_loss_may_hold_anything() -> None:
    case = make_case(num_rows=37)._replace(rows=torch.arange(37))
    dirty = case.hidden.clone()
    dirty[case.weights == 0] = torch.nan
    _, clean_dx, clean_dw = fused(case, torch.float64)
    _, dirty_dx, dirty_dw = fused(case._replace(hidden=dirty), torch.float64)
    torch.testing.assert_close((dirty_dx, dirty_dw), (clean_dx, clean_dw))


@pytest.mark.parametrize(
    "case", [make_case()._replace(weights=torch.zeros(53)), make_case(0, 0)], ids=["masked", "empty"]
)
def test_nothing_to_train_gives_zero_gradients(case: Case) -> None:
    result, hidden_grad, weight_grad = fused(case, torch.float32)
    assert (result.loss.item(), result.clip_fraction.item()) == (0.0, 0.0)
    assert result.logprobs.shape == case.targets.shape
    assert hidden_grad.shape == case.hidden.shape
    assert not hidden_grad.any()
    assert not weight_grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprobs_N": torch.zeros(2)}, r"old_logprobs_N must be float32/float64 \[N=3\], got float32 \[2\]"),
        ({"advantages": torch.tensor([1.0, 1.0, torch.inf])}, "advantages_N must be finite, got inf at 2"),
        ({"num_loss_tokens": -1}, "num_loss_tokens must be finite and > 0, got -1"),
        ({"weights_N": torch.ones(3)}, "exactly one of weights_N and num_loss_tokens must be given, got both"),
        ({"clip_high": -0.1}, "clip_high must be finite and >= 0, got -0.1"),
        ({"metrics": "none"}, "metrics must be one of loss_rows, all, got 'none'"),
    ],
)
def test_bad_loss_inputs(change: dict[str, object], message: str) -> None:
    good = {
        "hidden_TD": torch.zeros(3, 2),
        "weight_VD": torch.zeros(5, 2),
        "targets_N": torch.zeros(3, dtype=torch.int64),
        "temperature": 1.0,
        "old_logprobs_N": torch.zeros(3),
        "advantages": torch.ones(3),
        "num_loss_tokens": 3,
    }
    with pytest.raises(ValueError, match=f"^linear_policy_loss: {message}"):
        linear_policy_loss(**(good | change))
