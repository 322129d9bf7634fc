"""Tests what changes logits between the product and log-softmax: bias, softcap, scale."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import linear_logprob, linear_policy_loss
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.helpers.loss_options import gathered
from tests.helpers.policy_head import (
    ALL_IMPLS,
    HEADS,
    IMPLS,
    head_of,
    leaves_of,
    loss_arguments,
    make_case,
    plain_logprob,
    solve,
    without,
)


def assert_as_right(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    truth: dict[str, Tensor],
) -> None:
    """Asserts the error rule for all outputs and gradients, each scaled to at most 1."""
    dtype = actual["dX"].dtype
    assert actual.keys() == truth.keys()
    for name, x in truth.items():
        size = max(1.0, x[x.isfinite()].abs().max().item())
        values = (y[name].double() / size for y in (actual, plain, truth))
        assert_error_rule(*values, name=name, dtype=dtype)
    assert all(actual[name].dtype == dtype for name in actual if name.startswith("d"))


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
# The usual dtypes of the product on a CPU and on a card.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_equals_all_logits(dtype: torch.dtype, head: dict[str, Any], impl: str) -> None:
    """Loss and gradients equal those of the plain formula over all logits."""
    case = make_case()
    options = {"entropy_coef": 0.05, "kl_coef": 0.1}
    actual = solve(case, dtype, head, impl, **options)
    plain = solve(case, dtype, head, None, **options)
    assert_as_right(actual, plain, solve(case, torch.float64, head, None, **options))
    assert ("dbias" in actual) == ("bias" in head)


# Gradcheck calls the op hundreds of times, which is slow in the interpreter.
SLOW = [pytest.param(HEADS["all"], "triton", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("head", "impl"), [*itertools.product(HEADS.values(), IMPLS), *SLOW])
def test_gradcheck(head: dict[str, Any], impl: str) -> None:
    case = make_case(num_tokens=5, num_rows=7, vocab=11, width=3)
    options = gathered({"entropy_coef": 0.3, "kl_coef": 0.2}) | {"impl": impl, "rows_N": case.rows}
    options |= {"temperature": case.temperature, "softcap": head.get("softcap")}
    options |= {"logit_scale": head.get("logit_scale", 1.0)}
    arguments = loss_arguments(case, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        bias_V = bias if "bias" in head else None
        return linear_policy_loss(
            hidden,
            weight,
            case.targets,
            bias_V=bias_V,
            **arguments,
            **options,
        ).loss

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head_options = {name: x for name, x in options.items() if name != "options"} | {
            "entropy_grad": True,
        }
        return linear_logprob(
            hidden,
            weight,
            case.targets,
            bias_V=bias if "bias" in head else None,
            **head_options,
        )

    leaves = leaves_of(case, torch.float64)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradcheck(logprobs, leaves)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_equal_all_logits(dtype: torch.dtype, impl: str) -> None:
    """Log-probs, entropies and gradients equal those of the plain formula over all logits."""
    case = make_case()
    results = []
    for used_impl, used_dtype in ((impl, dtype), (None, dtype), (None, torch.float64)):
        leaves = leaves_of(case, used_dtype)
        settings = head_of(HEADS["all"], leaves)
        if used_impl is None:
            outputs = plain_logprob(case, leaves, **settings)
        else:
            settings |= {
                "bias_V": settings.pop("bias"),
                "rows_N": case.rows,
                "impl": used_impl,
                "entropy_grad": True,
            }
            outputs = linear_logprob(
                *leaves[:2],
                case.targets,
                temperature=case.temperature,
                **settings,
            )
        upstream = torch.linspace(-1, 1, 53).to(outputs[0].dtype)
        torch.autograd.backward(outputs, (upstream, upstream.flip(0)))
        names = ("logprobs", "entropy", "dX", "dW", "dbias")
        values = *(x.detach() for x in outputs), *(x.grad for x in leaves)
        results.append(dict(zip(names, values, strict=True)))
    assert_as_right(*results)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_deterministic_and_batch_invariant(impl: str) -> None:
    """Two runs are bitwise equal, and a row computed alone equals it among the others."""
    case = make_case(num_tokens=53, width=24, vocab=1031)._replace(rows=torch.arange(53))
    first, second = (solve(case, torch.float32, HEADS["all"], impl) for _ in range(2))
    for name, x in first.items():
        assert_bitwise_equal(x, second[name], name=name)
    for n in (0, 17, 52):
        is_other = torch.arange(53) != n
        one_row = without(case, is_other)._replace(
            hidden=case.hidden[n : n + 1],
            rows=torch.zeros(1, dtype=torch.int64),
        )
        actual = solve(one_row, torch.float32, HEADS["all"], impl)
        for name in ("logprobs", "entropy", "ratio", "dX"):
            assert_bitwise_equal(actual[name], first[name][n : n + 1], name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap must be finite and > 0, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be finite and > 0, got inf"),
        ({"logit_scale": -1.0}, "logit_scale must be finite and > 0, got -1.0"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite and > 0, got nan"),
        ({"bias_V": torch.zeros(4)}, r"bias_V must be float32 \[V=5\], got float32 \[4\]"),
        ({"bias_V": torch.zeros(5).double()}, r"bias_V must be float32 \[V=5\], got float64 \[5\]"),
        (
            {"targets_N": torch.tensor([-100, -99, 0])},
            r"targets_N must be in \[0, 5\), got -99 at 1",
        ),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden_TD": torch.zeros(3, 2),
        "weight_VD": torch.zeros(5, 2),
        "temperature": 1.0,
    }
    good |= {"targets_N": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
        linear_logprob(**(good | change))
    good |= {"old_logprobs_N": None, "advantages": torch.ones(3), "num_loss_tokens": 3}
    with pytest.raises(ValueError, match=f"^linear_policy_loss: {message}"):
        linear_policy_loss(**(good | change))
