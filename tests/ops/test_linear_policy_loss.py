"""Compares linear_policy_loss with log-softmax over all logits and policy_loss.

Also tests what it promises about rows.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import PolicyLoss, linear_policy_loss
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.policy_head import (
    IMPLS,
    OPTIONS,
    Case,
    assert_as_right_as_plain,
    call,
    fused,
    make_case,
    shapes_inside,
)

# An import by name would give the op, which the package has under the same name.
linear_logprob_module = importlib.import_module("socpo_fast.ops.linear_logprob")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
# One row, a prime number of rows with repeats; a prime vocabulary, one of 1025 tokens, one of a
# single token.
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "vocab"), [(1, 1, 97), (37, 53, 97), (5, 7, 1025), (3, 4, 1)]
)
def test_equals_log_softmax_of_all_logits(
    num_tokens: int,
    num_rows: int,
    vocab: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    impl: str,
) -> None:
    assert_as_right_as_plain(make_case(num_tokens, num_rows, vocab), dtype, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_gradcheck(kl_estimator: str, impl: str) -> None:
    """The gradient is that of the loss; gradcheck also runs backward twice through a graph."""
    case = make_case(num_tokens=5, num_rows=7, vocab=11, width=3)
    options = {"entropy_coef": 0.3, "kl_coef": 0.2, "kl_estimator": kl_estimator, "impl": impl}
    leaves = case.hidden.requires_grad_(), case.weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden, weight: call(case, hidden, weight, **options).loss, leaves
    )
    assert torch.autograd.gradcheck(
        lambda hidden, weight: call(case, hidden, weight, impl=impl).loss, leaves
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_change_nothing_but_rounding(
    options: dict[str, Any], impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an unlimited workspace nor chunks of 16 rows change more than the last bits."""
    case = make_case()
    in_one_chunk = fused(case, torch.float64, impl=impl, **options)
    no_limit = fused(case, torch.float64, impl=impl, workspace_mib=1e308, **options)
    torch.testing.assert_close(no_limit, in_one_chunk, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(linear_logprob_module, "_CHUNK_LOGITS", 97 * 16)
    chunked = fused(case, torch.float64, impl=impl, workspace_mib=1e-6, **options)
    torch.testing.assert_close(chunked, in_one_chunk, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
# Chunks have 16 rows. No row, one, a chunk - 1, a chunk, a chunk + 1, and a prime number of rows,
# which is split into chunks of about the same size.
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 53])
def test_any_number_of_rows(num_rows: int, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_logprob_module, "_CHUNK_LOGITS", 97 * 16)
    case = make_case(num_rows=num_rows)
    assert_as_right_as_plain(case, torch.float32, impl, workspace_mib=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_full_logits_never_exist(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor in any op is larger than the logits of one chunk."""
    monkeypatch.setattr(linear_logprob_module, "_CHUNK_LOGITS", 1025 * 16)
    case = make_case(num_tokens=40, num_rows=64, vocab=1025, width=3)
    options = {"metrics": "all", "entropy_coef": 0.1, "impl": impl, "workspace_mib": 1e-6}
    ops_run = shapes_inside(lambda: fused(case, torch.float32, **options))
    assert max(math.prod(shape) for _, shapes in ops_run for shape in shapes) == 1025 * 16


@pytest.mark.parametrize("impl", IMPLS)
def test_same_inputs_same_bits(impl: str) -> None:
    case = make_case()
    first = fused(case, torch.float32, impl=impl)
    second = fused(case, torch.float32, impl=impl)
    for name, a, b in zip(PolicyLoss._fields, first[0], second[0], strict=True):
        assert_bitwise_equal(a, b, name=name)
    assert_bitwise_equal(first[1], second[1], name="hidden.grad")
    assert_bitwise_equal(first[2], second[2], name="weight.grad")


@pytest.mark.parametrize("impl", IMPLS)
def test_microbatches_add_up_to_the_update(impl: str) -> None:
    """Gradients of microbatches, with the number of tokens of the update, sum to its gradient."""
    case = make_case()
    num_loss_tokens = case.rows.numel()

    def gradients(microbatches: list[slice]) -> tuple[Tensor, Tensor]:
        hidden, weight = (x.float().requires_grad_() for x in (case.hidden, case.weight))
        for rows in microbatches:
            linear_policy_loss(
                hidden,
                weight,
                case.targets[rows],
                case.old[rows],
                case.advantages,
                case.attempt_of_token[rows],
                temperature=0.8,
                rows_N=case.rows[rows],
                num_loss_tokens=num_loss_tokens,
                impl=impl,
            ).loss.backward()
        return hidden.grad, weight.grad

    in_one = gradients([slice(None)])
    in_three = gradients([slice(0, 10), slice(10, 11), slice(11, None)])
    torch.testing.assert_close(in_three, in_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_prompt_row_predicts_eight_first_tokens(impl: str) -> None:
    """A hidden row that eight rows share gives what eight copies of it give."""
    case = make_case(num_tokens=1, num_rows=8)
    shared = case
    copied = case._replace(hidden=case.hidden.repeat(8, 1), rows=torch.arange(8))
    (from_shared, one_dx, one_dw), (from_copies, eight_dx, eight_dw) = (
        fused(x, torch.float64, impl=impl) for x in (shared, copied)
    )
    torch.testing.assert_close(from_shared, from_copies, equal_nan=True)
    torch.testing.assert_close(one_dx, eight_dx.sum(0, keepdim=True))
    torch.testing.assert_close(one_dw, eight_dw)


@pytest.mark.parametrize("impl", IMPLS)
def test_skipped_rows_are_nan_and_change_nothing(impl: str) -> None:
    """Rows of weight 0 or advantage 0 are skipped: they report NaN, and nothing else changes.

    With an entropy or KL term only a weight of 0 skips a row.
    """
    case = make_case()
    skipped = (case.weights == 0) | (case.advantages[case.attempt_of_token] == 0)
    assert 0 < skipped.sum() < skipped.numel()
    loss_rows, some_dx, some_dw = fused(case, torch.float64, impl=impl)
    all_rows, all_dx, all_dw = fused(case, torch.float64, metrics="all", impl=impl)
    for field in ("logprobs", "entropy", "ratio"):
        assert torch.equal(getattr(loss_rows, field).isnan(), skipped)
        torch.testing.assert_close(
            getattr(loss_rows, field)[~skipped], getattr(all_rows, field)[~skipped]
        )
    torch.testing.assert_close(
        (loss_rows.loss, loss_rows.clip_fraction), (all_rows.loss, all_rows.clip_fraction)
    )
    torch.testing.assert_close((some_dx, some_dw), (all_dx, all_dw))
    assert torch.equal(
        fused(case, torch.float64, kl_coef=0.1, impl=impl)[0].ratio.isnan(), case.weights == 0
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_loss_may_hold_anything(impl: str) -> None:
    """NaN in a hidden row of weight 0 reaches no gradient."""
    case = make_case(num_rows=37)._replace(rows=torch.arange(37))
    dirty = case.hidden.clone()
    dirty[case.weights == 0] = torch.nan
    _, clean_dx, clean_dw = fused(case, torch.float64, impl=impl)
    _, dirty_dx, dirty_dw = fused(case._replace(hidden=dirty), torch.float64, impl=impl)
    torch.testing.assert_close((dirty_dx, dirty_dw), (clean_dx, clean_dw))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_and_expanded_inputs_equal_copies(impl: str) -> None:
    """Strided and expanded inputs give exactly what their contiguous copies give.

    In fp64 and with no row skipped the op gets them as they are; conversion or picking rows would
    copy them.
    """
    case = make_case()._replace(
        weights=torch.tensor(0.1).double().expand(53), advantages=torch.ones(4).double()
    )
    names = ("targets", "rows", "temperature", "old", "attempt_of_token", "ref", "advantages")
    strided = {
        name: torch.stack([x, x.roll(1)], 1)[:, 0] for name in names for x in [getattr(case, name)]
    }
    copies = case._replace(weights=case.weights.contiguous())
    actual, expected = (
        fused(x, torch.float64, kl_coef=0.1, impl=impl) for x in (case._replace(**strided), copies)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case",
    [make_case()._replace(weights=torch.zeros(53)), make_case(0, 0)],
    ids=["masked", "empty"],
)
def test_nothing_to_train_gives_zero_gradients(case: Case, impl: str) -> None:
    result, hidden_grad, weight_grad = fused(case, torch.float32, impl=impl)
    assert (result.loss.item(), result.clip_fraction.item()) == (0.0, 0.0)
    assert result.logprobs.shape == case.targets.shape
    assert hidden_grad.shape == case.hidden.shape
    assert not hidden_grad.any()
    assert not weight_grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"old_logprobs_N": torch.zeros(2)},
            r"old_logprobs_N must be float32/float64 \[N=3\], got float32 \[2\]",
        ),
        (
            {"advantages": torch.tensor([1.0, 1.0, torch.inf])},
            "advantages_N must be finite, got inf at 2",
        ),
        ({"num_loss_tokens": -1}, "num_loss_tokens must be finite and > 0, got -1"),
        (
            {"weights_N": torch.ones(3)},
            "exactly one of weights_N and num_loss_tokens must be given, got both",
        ),
        ({"workspace_mib": 0}, "workspace_mib must be finite and > 0, got 0"),
        ({"num_loss_tokens": float("nan")}, "num_loss_tokens must be finite and > 0, got nan"),
        (
            {"old_logprobs_N": torch.zeros(3, device="meta")},
            "old_logprobs_N must be on cpu, got meta",
        ),
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
