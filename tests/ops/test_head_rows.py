"""Tests special rows of the LM-head ops.

Rows without a target, rows without old log-probs, and rows with importance weights.
"""

from typing import Any

import pytest
import torch

from socpo_fast.ops import _fused_logprob, linear_logprob, linear_policy_loss, policy_loss
from tests.helpers.loss_options import gathered
from tests.helpers.policy_head import (
    ALL_IMPLS,
    HEADS,
    keep_all,
    leaves_of,
    loss_arguments,
    make_case,
    solve,
    without,
)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"entropy_coef": 0.05, "kl_coef": 0.1}],
    ids=["plain", "all terms"],
)
# Every third row is left out, all are, none is.
@pytest.mark.parametrize("every", [3, 1, 100])
def test_rows_without_a_target_have_no_loss(every: int, options: dict[str, Any], impl: str) -> None:
    """Rows of target -100 give what the batch without them gives, whatever they hold."""
    case = make_case(num_tokens=60)
    left_out = torch.arange(53) % every == every - 1
    case = case._replace(rows=torch.arange(53))
    case.hidden[:53][left_out] = torch.nan
    marked = case._replace(targets=case.targets.masked_fill(left_out, -100))
    expected = solve(without(case, left_out), torch.float64, HEADS["all"], impl, **options)
    actual = solve(marked, torch.float64, HEADS["all"], impl, **options)
    for name in ("logprobs", "entropy", "ratio"):
        values = actual.pop(name)
        assert values[left_out].isnan().all()
        torch.testing.assert_close(values[~left_out], expected.pop(name))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("as_on_a_card", [False, True])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_rows_without_a_target_have_no_logprob(
    impl: str,
    as_on_a_card: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They report NaN and take no gradient, whatever they hold and whatever gradient arrives.

    On a card such rows stay in the products, so both ways are tested.
    """
    if as_on_a_card:
        monkeypatch.setattr(_fused_logprob, "keep_rows", keep_all)
    case = make_case(num_tokens=60)._replace(rows=torch.arange(53))
    left_out = torch.arange(53) % 3 == 0
    case.hidden[:53][left_out] = torch.nan
    upstream = torch.linspace(-1, 1, 53).double().masked_fill(left_out, torch.nan)
    results = []
    marked = case._replace(targets=case.targets.masked_fill(left_out, -100))
    for one_case, keep in ((marked, left_out | True), (without(case, left_out), ~left_out)):
        leaves = leaves_of(one_case, torch.float64)
        outputs = linear_logprob(
            *leaves[:2],
            one_case.targets,
            temperature=one_case.temperature,
            rows_N=one_case.rows,
            bias_V=leaves[2],
            entropy_grad=True,
            impl=impl,
        )
        torch.autograd.backward(outputs, (upstream[keep], upstream[keep]))
        results.append((*(x.detach() for x in outputs), *(x.grad for x in leaves)))
    (logprobs, entropy, *gradients), expected = results
    assert torch.equal(logprobs.isnan(), left_out)
    assert torch.equal(entropy.isnan(), left_out)
    for a, b in zip((logprobs[~left_out], entropy[~left_out], *gradients), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("tis_clip", [None, 1.2])
def test_old_logprobs_none_are_the_current_ones(tis_clip: float | None, impl: str) -> None:
    """Without old log-probs every ratio is exactly 1.

    The clips here leave no room for a ratio that is rounded.
    """
    case = make_case()
    options = gathered({"clip_low": 0.0, "clip_high": 0.0, "dual_clip": 1.01})
    results = []
    for has_old in (False, True):
        leaves = leaves_of(case, torch.float64)
        old = linear_logprob(
            *leaves[:2],
            case.targets,
            temperature=case.temperature,
            rows_N=case.rows,
        )[0].detach()
        arguments = loss_arguments(case, torch.float64) | {
            "old_logprobs_N": old if has_old else None,
        }
        weights = case.weights
        if has_old and tis_clip is not None:
            weights = weights * (old - case.ref).exp().clamp(max=tis_clip)
        arguments |= {
            "weights_N": weights,
            "temperature": case.temperature,
            "rows_N": case.rows,
            "impl": impl,
        }
        if not has_old:
            arguments |= {"sampler_logprobs_N": case.ref, "tis_clip": tis_clip}
        result = linear_policy_loss(
            *leaves[:2],
            case.targets,
            **arguments,
            **(options if not has_old else {}),
        )
        result.loss.backward()
        results.append(
            (result.loss.detach(), result.logprobs, result.ratio, leaves[0].grad, leaves[1].grad),
        )
        assert result.clip_fraction == 0
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_truncated_importance_weights(impl: str) -> None:
    """Truncated importance weights multiply the weights, here and in policy_loss.

    A row of weight 0 may hold anything.
    """
    case = make_case()
    sampler = case.ref.masked_fill(case.weights == 0, torch.nan)
    weights = case.weights * (case.old - case.ref).exp().clamp(max=1.3)
    results = []
    for weights_N, tis_options in (
        (case.weights, {"sampler_logprobs_N": sampler, "tis_clip": 1.3}),
        (weights, {}),
    ):
        hidden, weight, _ = leaves_of(case, torch.float64)
        arguments = loss_arguments(case, torch.float64) | {"weights_N": weights_N} | tis_options
        head_inputs = {
            "temperature": case.temperature,
            "rows_N": case.rows,
            "metrics": "all",
            "impl": impl,
        }
        result = linear_policy_loss(hidden, weight, case.targets, **arguments, **head_inputs)
        result.loss.backward()
        results.append((*result, hidden.grad, weight.grad))
        again = policy_loss(result.logprobs, **arguments)
        torch.testing.assert_close(again.loss, result.loss)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tis_clip": 2.0}, "sampler_logprobs_N must be given with tis_clip, got None"),
        (
            {"tis_clip": 0.0, "sampler_logprobs_N": torch.zeros(3)},
            "tis_clip must be > 0, or None, got 0.0",
        ),
        (
            {"sampler_logprobs_N": torch.zeros(2)},
            r"sampler_logprobs_N must be float32/float64 \[N=3\], got",
        ),
    ],
)
def test_bad_importance_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^policy_loss: {message}"):
        policy_loss(torch.zeros(3), None, torch.ones(3), num_loss_tokens=3, **change)
