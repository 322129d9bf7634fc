"""Compares linear_logprob with log-softmax over all logits, for all kinds of upstream gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import linear_logprob, linear_policy_loss
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.helpers.policy_head import IMPLS


def make_inputs(num_tokens: int, num_rows: int, vocab: int, width: int = 16) -> dict[str, Tensor]:
    """Returns peaked logits; rows repeat.

    bf16 holds hidden and weight exactly, so every dtype computes on the same numbers.
    """
    rng = torch.Generator().manual_seed(vocab)
    return {
        "hidden_TD": torch.randn(num_tokens, width, generator=rng).bfloat16().double(),
        "weight_VD": torch.randn(vocab, width, generator=rng).bfloat16().double(),
        "targets_N": torch.randint(vocab, (num_rows,), generator=rng),
        "rows_N": torch.randint(num_tokens, (num_rows,), generator=rng),
        "temperature": 0.5 + torch.rand(num_rows, generator=rng).double(),
    }


def materialised(
    hidden_TD: Tensor, weight_VD: Tensor, targets_N: Tensor, rows_N: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the docstring's formula over all logits at once."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits = (hidden_TD[rows_N] @ weight_VD.T).to(wide) / temperature.to(wide)[:, None]
    logprobs = logits - logits.logsumexp(-1, keepdim=True)
    return logprobs.gather(1, targets_N[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Tensor]:
    """Returns log-probs, entropies and the gradients of hidden and weight.

    The upstream gradients are random, and the same in every call.
    """
    hidden, weight = (
        inputs[name].to(dtype, copy=True).requires_grad_() for name in ("hidden_TD", "weight_VD")
    )
    logprobs, entropy = op(**(inputs | {"hidden_TD": hidden, "weight_VD": weight}), **options)
    rng = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=rng).to(x.dtype) for x in (logprobs, entropy)]
    torch.autograd.backward((logprobs, entropy), upstream)
    return {
        "logprobs": logprobs,
        "entropy": entropy,
        "hidden.grad": hidden.grad,
        "weight.grad": weight.grad,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
# One row; no row; a prime number of rows with repeats; a vocabulary of 1025; of one token.
@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "vocab"),
    [(1, 1, 97), (3, 0, 97), (37, 53, 97), (5, 7, 1025), (3, 4, 1)],
)
def test_equals_log_softmax_of_all_logits(
    num_tokens: int, num_rows: int, vocab: int, dtype: torch.dtype, impl: str
) -> None:
    inputs = make_inputs(num_tokens, num_rows, vocab)
    actual = outputs_and_gradients(linear_logprob, inputs, dtype, entropy_grad=True, impl=impl)
    plain = outputs_and_gradients(materialised, inputs, dtype)
    truth = outputs_and_gradients(materialised, inputs, torch.float64)
    for name in truth:
        assert_error_rule(actual[name], plain[name], truth[name], name=name, dtype=dtype)


# Not the reference, whose entropy over so many tokens is less exact than the rule asks for.
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_a_real_vocabulary(impl: str) -> None:
    inputs = make_inputs(num_tokens=5, num_rows=7, vocab=50257)
    actual = outputs_and_gradients(
        linear_logprob, inputs, torch.float32, entropy_grad=True, impl=impl
    )
    plain, truth = (
        outputs_and_gradients(materialised, inputs, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name in truth:
        assert_error_rule(actual[name], plain[name], truth[name], name=name)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl: str, entropy_grad: bool) -> None:
    inputs: dict[str, Any] = make_inputs(num_tokens=5, num_rows=7, vocab=11, width=3)
    leaves = inputs.pop("hidden_TD").requires_grad_(), inputs.pop("weight_VD").requires_grad_()
    inputs |= {"entropy_grad": entropy_grad, "impl": impl}
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, **inputs), leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients_of_any_kind(impl: str) -> None:
    """Strided, expanded and partly zero upstream gradients act like their contiguous copies.

    They may also arrive for one of the two outputs only.
    """
    inputs = make_inputs(num_tokens=37, num_rows=53, vocab=97)
    leaves = inputs["hidden_TD"].requires_grad_(), inputs["weight_VD"].requires_grad_()
    outputs = linear_logprob(
        **inputs, entropy_grad=True, impl=impl, workspace_mib=1e-6
    )  # chunks of 16 rows
    strided = torch.randn(53, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[
        :, 1
    ]
    expanded = torch.tensor(0.3, dtype=torch.float64).expand(53)
    partly_zero = strided * (torch.arange(53) % 3 == 0)
    for upstream in (
        (strided, expanded),
        (expanded, torch.zeros(53).double()),
        (partly_zero, partly_zero.roll(1)),
    ):
        expected = torch.autograd.grad(
            materialised(**inputs), leaves, [x.contiguous() for x in upstream]
        )
        actual = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    only_entropy = torch.autograd.grad(outputs[1].sum(), leaves[1], retain_graph=True)
    torch.testing.assert_close(
        only_entropy, torch.autograd.grad(materialised(**inputs)[1].sum(), leaves[1])
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic_and_batch_invariant(impl: str) -> None:
    """Two runs are bitwise equal; a row alone equals it among others, except in the reference."""
    inputs = make_inputs(num_tokens=53, num_rows=53, vocab=1031, width=24)
    inputs |= {"rows_N": torch.arange(53)}
    options = {"entropy_grad": True, "impl": impl}
    first = outputs_and_gradients(linear_logprob, inputs, torch.float32, **options)
    second = outputs_and_gradients(linear_logprob, inputs, torch.float32, **options)
    for name in first:
        assert_bitwise_equal(first[name], second[name], name=name)
    if impl == "ref":
        return
    hidden = inputs["hidden_TD"].float()
    weight = inputs["weight_VD"].float()
    for n in (0, 17, 52):
        row_inputs = {name: inputs[name][n : n + 1] for name in ("targets_N", "temperature")}
        for name, actual in zip(
            ("logprobs", "entropy"),
            linear_logprob(hidden[n : n + 1], weight, **row_inputs),
            strict=True,
        ):
            assert_bitwise_equal(actual, first[name][n : n + 1], name=name)


def test_defaults_equal_explicit_arguments() -> None:
    """No rows_N means all rows in order; a number as temperature is that of every row."""
    inputs = make_inputs(num_tokens=11, num_rows=11, vocab=97)
    inputs |= {"rows_N": torch.arange(11), "temperature": torch.full((11,), 0.7)}
    every_row_named = linear_logprob(**inputs)
    no_row_named = linear_logprob(**(inputs | {"rows_N": None, "temperature": 0.7}))
    torch.testing.assert_close(no_row_named, every_row_named)
    for a, b in zip(linear_logprob(**(inputs | {"rows_N": None})), every_row_named, strict=True):
        assert_bitwise_equal(a, b, name="rows_N")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_equal_their_copies(impl: str) -> None:
    inputs = make_inputs(num_tokens=5, num_rows=7, vocab=11)
    strided = {
        name: torch.stack([x, x.roll(1)], 1)[:, 0] for name, x in inputs.items() if x.dim() == 1
    }
    assert not any(x.is_contiguous() for x in strided.values())
    for a, b in zip(
        linear_logprob(**(inputs | strided), impl=impl),
        linear_logprob(**inputs, impl=impl),
        strict=True,
    ):
        assert_bitwise_equal(a, b, name=impl)


def test_entropy_has_no_gradient_unless_asked() -> None:
    inputs = make_inputs(num_tokens=5, num_rows=7, vocab=11)
    inputs["hidden_TD"].requires_grad_()
    assert [x.requires_grad for x in linear_logprob(**inputs)] == [True, False]
    assert [x.requires_grad for x in linear_logprob(**inputs, entropy_grad=True)] == [True, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_minus_infinity_is_probability_zero(impl: str) -> None:
    """A logit of -inf has log-prob -inf and adds nothing to the entropy."""
    hidden = torch.ones(1, 1)
    weight = torch.tensor([[-torch.inf], [0.0], [0.0]])
    logprobs, entropy = linear_logprob(
        hidden,
        weight,
        torch.arange(3),
        temperature=2.0,
        rows_N=torch.zeros(3, dtype=torch.int64),
        impl=impl,
    )
    log_2 = torch.tensor(2.0).log()
    torch.testing.assert_close(logprobs, torch.stack((-torch.tensor(torch.inf), -log_2, -log_2)))
    torch.testing.assert_close(entropy, log_2.expand(3))


GOOD = {
    "hidden_TD": torch.zeros(3, 2),
    "weight_VD": torch.zeros(5, 2),
    "targets_N": torch.zeros(3, dtype=torch.int64),
    "temperature": 1.0,
}
BAD = [
    (
        {"hidden_TD": torch.zeros(3, 2, dtype=torch.int32)},
        r"hidden_TD must be float32/.* \[T, D\], got int32 \[3, 2\]",
    ),
    (
        {"hidden_TD": torch.zeros(2, 3).T},
        r"hidden_TD strides must be \(\*, 1\), got \(1, 3\); call .contiguous\(\)",
    ),
    (
        {"weight_VD": torch.zeros(5, 4)},
        r"weight_VD must be float32 \[V, D=2\], got float32 \[5, 4\]",
    ),
    (
        {"weight_VD": torch.zeros(5, 2).half()},
        r"weight_VD must be float32 \[V, D=2\], got float16 \[5, 2\]",
    ),
    ({"weight_VD": torch.zeros(5, 2, device="meta")}, "weight_VD must be on cpu, got meta"),
    ({"weight_VD": torch.zeros(0, 2)}, r"weight_VD must be \[V, D\] with V > 0, got \[0, 2\]"),
    (
        {"targets_N": torch.zeros(4, dtype=torch.int64)},
        r"targets_N must be int64 \[N=3\], got int64 \[4\]",
    ),
    (
        {"targets_N": torch.zeros(3, dtype=torch.int32)},
        r"targets_N must be int64 \[N=3\], got int32 \[3\]",
    ),
    ({"targets_N": torch.tensor([0, 4, 5])}, r"targets_N must be in \[0, 5\), got 5 at 2"),
    ({"targets_N": torch.tensor([0, -1, 5])}, r"targets_N must be in \[0, 5\), got -1 at 1"),
    ({"rows_N": torch.tensor([0, 3, 1])}, r"rows_N must be in \[0, 3\), got 3 at 1"),
    ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
    (
        {"temperature": torch.tensor([1.0, 0.0, 1.0])},
        "temperature_N must be finite and > 0, got 0.0 at 1",
    ),
    (
        {"temperature": torch.ones(2)},
        r"temperature_N must be float32/float64 \[N=3\], got float32 \[2\]",
    ),
    ({"temperature": float("nan")}, "temperature must be finite and > 0, got nan"),
    ({"workspace_mib": -1.0}, "workspace_mib must be finite and > 0, got -1.0"),
    ({"impl": "cuda"}, "impl must be one of auto, ref, cpp, triton, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_inputs(change: dict[str, object], message: str) -> None:
    """Both ops check these inputs, each under its own name."""
    with pytest.raises(ValueError, match=f"^linear_logprob: {message}"):
        linear_logprob(**(GOOD | change))
    loss = {"old_logprobs_N": torch.zeros(3), "advantages": torch.ones(3), "num_loss_tokens": 3}
    with pytest.raises(ValueError, match=f"^linear_policy_loss: {message}"):
        linear_policy_loss(**(GOOD | loss | change))
