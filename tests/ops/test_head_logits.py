"""What stands between hidden states and loss besides the product: bias, softcap, scale, -100, weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import linear_logprob, linear_policy_loss, policy_loss
from tests.error_rule import assert_bitwise_equal, assert_error_rule
from tests.loss_options import gathered
from tests.ops.policy_head import IMPLS, Case, make_case

HEADS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "softcap": 3.0, "logit_scale": 1.7},
}
ALL_IMPLS = [*IMPLS, "triton"]
Leaves = tuple[Tensor, Tensor, Tensor]


def leaves_of(case: Case, dtype: torch.dtype) -> Leaves:
    """Hidden, weight and a bias that fits into bf16."""
    bias = torch.randn(case.weight.shape[0], generator=torch.Generator().manual_seed(2)).bfloat16()
    hidden, weight, bias = (x.to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight, bias))
    return hidden, weight, bias


def head_of(head: dict[str, Any], leaves: Leaves) -> dict[str, Any]:
    """The arguments of an op for one of HEADS."""
    return {name: leaves[2] if name == "bias" else value for name, value in head.items()}


def plain_logprob(case: Case, leaves: Leaves, bias: Tensor | None = None, softcap: float | None = None,
                  logit_scale: float = 1.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The docstring's formula over all logits at once."""
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    logits = (leaves[0][case.rows] @ leaves[1].T).to(wide)
    logits = logit_scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_softmax = (logits / case.temperature.to(wide)[:, None]).log_softmax(-1)
    logprobs = log_softmax.gather(1, case.targets[:, None])[:, 0]
    return logprobs, -(log_softmax.exp() * log_softmax).sum(-1)


def loss_arguments(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "old_logprobs_N": case.old.to(wide),
        "advantages": case.advantages.to(wide),
        "attempt_of_token_N": case.attempt_of_token,
        "weights_N": case.weights.to(wide),
        "ref_logprobs_N": case.ref.to(wide),
    }


def solve(case: Case, dtype: torch.dtype, head: dict[str, Any], impl: str | None, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the loss by an implementation, by the plain formula where impl is None."""
    leaves, arguments = leaves_of(case, dtype), loss_arguments(case, dtype) | gathered(options)
    head, wide = head_of(head, leaves), arguments["weights_N"].dtype
    if impl is None:
        logprobs, entropy = plain_logprob(case, leaves, **head)
        result = policy_loss(logprobs, entropy_N=entropy, **arguments)
    else:
        head |= {"bias_V": head.pop("bias")} if "bias" in head else {}
        more = {"temperature": case.temperature.to(wide), "rows_N": case.rows, "metrics": "all", "impl": impl}
        more |= {"workspace_mib": 1e-6}  # chunks of 16 rows
        result = linear_policy_loss(*leaves[:2], case.targets, **arguments, **head, **more)
    (3 * result.loss).backward()
    gradients = zip(("dX", "dW", "dbias"), (x.grad for x in leaves), strict=True)
    return result._asdict() | {name: x for name, x in gradients if x is not None}


def assert_as_right(actual: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    dtype = actual["dX"].dtype
    assert actual.keys() == truth.keys()
    for name, x in truth.items():
        size = max(1.0, x[x.isfinite()].abs().max().item())
        values = (y[name].double() / size for y in (actual, plain, truth))
        assert_error_rule(*values, name=name, dtype=dtype)
    assert all(actual[name].dtype == dtype for name in actual if name.startswith("d"))


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
# fp64, and what a card multiplies; options with every term
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_equals_all_logits(dtype: torch.dtype, head: dict[str, Any], impl: str) -> None:
    case, options = make_case(), {"entropy_coef": 0.05, "kl_coef": 0.1}
    actual, plain = solve(case, dtype, head, impl, **options), solve(case, dtype, head, None, **options)
    assert_as_right(actual, plain, solve(case, torch.float64, head, None, **options))
    assert ("dbias" in actual) == ("bias" in head)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradcheck(head: dict[str, Any], impl: str) -> None:
    case = make_case(num_tokens=5, num_rows=7, vocab=11, width=3)
    options = gathered({"entropy_coef": 0.3, "kl_coef": 0.2}) | {"impl": impl, "rows_N": case.rows}
    options |= {"temperature": case.temperature, "softcap": head.get("softcap")}
    options |= {"logit_scale": head.get("logit_scale", 1.0)}
    arguments = loss_arguments(case, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        bias_V = bias if "bias" in head else None
        return linear_policy_loss(hidden, weight, case.targets, bias_V=bias_V, **arguments, **options).loss

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        more = {name: x for name, x in options.items() if name != "options"} | {"entropy_grad": True}
        return linear_logprob(hidden, weight, case.targets, bias_V=bias if "bias" in head else None, **more)

    leaves = leaves_of(case, torch.float64)
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradcheck(logprobs, leaves)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_equal_all_logits(dtype: torch.dtype, impl: str) -> None:
    case, results = make_case(), []
    for key, kind in ((impl, dtype), (None, dtype), (None, torch.float64)):
        leaves = leaves_of(case, kind)
        head = head_of(HEADS["all"], leaves)
        if key is None:
            outputs = plain_logprob(case, leaves, **head)
        else:
            head |= {"bias_V": head.pop("bias"), "rows_N": case.rows, "impl": key, "entropy_grad": True}
            outputs = linear_logprob(*leaves[:2], case.targets, temperature=case.temperature, **head)
        upstream = torch.linspace(-1, 1, 53).to(outputs[0].dtype)
        torch.autograd.backward(outputs, (upstream, upstream.flip(0)))
        names = ("logprobs", "entropy", "dX", "dW", "dbias")
        results.append(dict(zip(names, (*(x.detach() for x in outputs), *(x.grad for x in leaves)), strict=True)))
    assert_as_right(*results)


def without(case: Case, left_out: Tensor) -> Case:
    """The case with those rows left out."""
    by_row = ("targets", "rows", "temperature", "old", "attempt_of_token", "weights", "ref")
    return case._replace(**{name: getattr(case, name)[~left_out] for name in by_row})


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.05, "kl_coef": 0.1}], ids=["plain", "all terms"])
# some rows, all of them, none
@pytest.mark.parametrize("every", [3, 1, 100])
def test_rows_without_a_target_have_no_loss(every: int, options: dict[str, Any], impl: str) -> None:
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


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_rows_without_a_target_have_no_logprob(impl: str) -> None:
    """Whatever the hidden state holds, and whatever gradient arrives."""
    case = make_case(num_tokens=60)._replace(rows=torch.arange(53))
    left_out = torch.arange(53) % 3 == 0
    case.hidden[:53][left_out] = torch.nan
    upstream = torch.linspace(-1, 1, 53).double().masked_fill(left_out, torch.nan)
    results = []
    for given, keep in ((case._replace(targets=case.targets.masked_fill(left_out, -100)), left_out | True),
                        (without(case, left_out), ~left_out)):  # fmt: skip
        leaves = leaves_of(given, torch.float64)
        outputs = linear_logprob(
            *leaves[:2],
            given.targets,
            temperature=given.temperature,
            rows_N=given.rows,
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
    """Even where the clips leave no room for a rounded ratio."""
    case, options = make_case(), gathered({"clip_low": 0.0, "clip_high": 0.0, "dual_clip": 1.01})
    results = []
    for is_given in (False, True):
        leaves = leaves_of(case, torch.float64)
        old = linear_logprob(*leaves[:2], case.targets, temperature=case.temperature, rows_N=case.rows)[0].detach()
        arguments = loss_arguments(case, torch.float64) | {"old_logprobs_N": old if is_given else None}
        weights = case.weights
        if is_given and tis_clip is not None:
            weights = weights * (old - case.ref).exp().clamp(max=tis_clip)
        arguments |= {"weights_N": weights, "temperature": case.temperature, "rows_N": case.rows, "impl": impl}
        if not is_given:
            arguments |= {"sampler_logprobs_N": case.ref, "tis_clip": tis_clip}
        result = linear_policy_loss(*leaves[:2], case.targets, **arguments, **(options if not is_given else {}))
        result.loss.backward()
        results.append((result.loss.detach(), result.logprobs, result.ratio, leaves[0].grad, leaves[1].grad))
        assert result.clip_fraction == 0
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_truncated_importance_weights(impl: str) -> None:
    """They multiply the weights; policy_loss has them too. A row of weight 0 may hold anything."""
    case = make_case()
    sampler = case.ref.masked_fill(case.weights == 0, torch.nan)
    weights = case.weights * (case.old - case.ref).exp().clamp(max=1.3)
    results = []
    for weights_N, more in ((case.weights, {"sampler_logprobs_N": sampler, "tis_clip": 1.3}), (weights, {})):
        hidden, weight, _ = leaves_of(case, torch.float64)
        arguments = loss_arguments(case, torch.float64) | {"weights_N": weights_N} | more
        head = {"temperature": case.temperature, "rows_N": case.rows, "metrics": "all", "impl": impl}
        result = linear_policy_loss(hidden, weight, case.targets, **arguments, **head)
        result.loss.backward()
        results.append((*result, hidden.grad, weight.grad))
        again = policy_loss(result.logprobs, **arguments)
        torch.testing.assert_close(again.loss, result.loss)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_bits_of_a_row_alone_and_of_two_runs(impl: str) -> None:
    case = make_case(num_tokens=53, width=24, vocab=1031)._replace(rows=torch.arange(53))
    first, second = (solve(case, torch.float32, HEADS["all"], impl) for _ in range(2))
    for name, x in first.items():
        assert_bitwise_equal(x, second[name], name=name)
    for n in (0, 17, 52):
        is_other = torch.arange(53) != n
        one = without(case, is_other)._replace(hidden=case.hidden[n : n + 1], rows=torch.zeros(1, dtype=torch.int64))
        alone = solve(one, torch.float32, HEADS["all"], impl)
        for name in ("logprobs", "entropy", "ratio", "dX"):
            assert_bitwise_equal(alone[name], first[name][n : n + 1], name=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap must be finite and > 0, got 0.0"),
        ({"softcap": float("inf")}, "softcap must be finite and > 0, got inf"),
        ({"logit_scale": -1.0}, "logit_scale must be finite and > 0, got -1.0"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite and > 0, got nan"),
        ({"bias_V": torch.zeros(4)}, r"bias_V must be float32 \[V=5\], got float32 \[4\]"),
        ({"bias_V": torch.zeros(5).double()}, r"bias_V must be float32 \[V=5\], got float64 \[5\]"),
        ({"targets_N": torch.tensor([-100, -99, 0])}, r"targets_N must be in \[0, 5\), got -99 at 1"),
    ],
)
def test_bad_inputs(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hidden_TD": torch.zeros(3, 2), "weight_VD": torch.zeros(5, 2), "temperature": 1.0}
    good |= {"targets_N": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
        linear_logprob(**(good | change))
    good |= {"old_logprobs_N": None, "advantages": torch.ones(3), "num_loss_tokens": 3}
    with pytest.raises(ValueError, match=f"^linear_policy_loss: {message}"):
        linear_policy_loss(**(good | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tis_clip": 2.0}, "sampler_logprobs_N must be given with tis_clip, got None"),
        ({"tis_clip": 0.0, "sampler_logprobs_N": torch.zeros(3)}, "tis_clip must be > 0, or None, got 0.0"),
        ({"sampler_logprobs_N": torch.zeros(2)}, r"sampler_logprobs_N must be float32/float64 \[N=3\], got"),
    ],
)
def test_bad_importance_weights(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^policy_loss: {message}"):
        policy_loss(torch.zeros(3), None, torch.ones(3), num_loss_tokens=3, **change)
