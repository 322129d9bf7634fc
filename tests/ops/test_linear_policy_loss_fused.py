"""Tests what the fused form of linear_policy_loss adds.

That is which products run and on how many rows, with which bits and errors.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import (
    PolicyLoss,
    _fused_policy_loss,
    available_impls,
    linear_policy_loss,
)
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.policy_head import (
    OPTIONS,
    assert_as_right_as_plain,
    call,
    fused,
    keep_all,
    make_case,
    shapes_inside,
)

pytestmark = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)


def products(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """Returns (rows, length of the sums, columns) of each product of the fused form."""
    shapes_of_products = [shapes for name, shapes in shapes_inside(run) if name == "socpo::matmul_"]
    return [(a[0], a[1], b[1]) for _, a, b, *_ in shapes_of_products]


@pytest.mark.parametrize("vocab", [49152, 50257, 151936])
# The width is no multiple of 8. A peak of 9 gives half of the targets nearly all probability.
@pytest.mark.parametrize("peak", [2.0, 9.0])
def test_real_vocabularies(vocab: int, peak: float) -> None:
    assert_as_right_as_plain(
        make_case(5, 7, vocab, width=13, peak=peak), torch.float32, "cpp", entropy_coef=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["large", "offset"])
def test_awkward_logits(kind: str, dtype: torch.dtype) -> None:
    """Logits of magnitude 1e3, or all of them 1e4 higher, keep the error rule.

    They are on a grid on which fp32 products round nothing, so only log-softmax can be wrong.
    """
    case = make_case()
    hidden, weight = ((x * 4).round() / 4 for x in (case.hidden, case.weight))
    if kind == "large":
        hidden = hidden * 128
    else:
        hidden = torch.cat([hidden, hidden.new_full((37, 1), 100)], 1)
        weight = torch.cat([weight, weight.new_full((97, 1), 100)], 1)
    case = case._replace(
        hidden=hidden, weight=weight, temperature=case.temperature.round().clamp(min=1)
    )
    logits = hidden[case.rows] @ weight.T
    assert logits.max() > 1e3
    logprobs = (
        (logits / case.temperature[:, None]).log_softmax(1).gather(1, case.targets[:, None])[:, 0]
    )
    noise = 0.5 * torch.randn(53, generator=torch.Generator().manual_seed(0))
    assert_as_right_as_plain(
        case._replace(old=logprobs + noise, ref=logprobs - noise), dtype, "cpp", entropy_coef=0.05
    )


def test_only_needed_products_run() -> None:
    """Logits, dW and dX take one product each, and what nobody needs is not computed.

    The products run in the forward, so that the logits need not be kept.
    """
    case = make_case(num_rows=37)._replace(weights=torch.ones(37), advantages=torch.ones(4))
    # With the current log-probs as old ones nothing is clipped.
    case = case._replace(old=fused(case, torch.float32, metrics="all", impl="cpp")[0].logprobs)
    hidden = case.hidden.float()
    weight = case.weight.float()
    logits = (37, 16, 97)
    dw = (97, 37, 16)
    dx = (37, 97, 16)
    for needs_hidden, needs_weight, expected in (
        (True, True, [logits, dw, dx]),
        (True, False, [logits, dx]),
        (False, True, [logits, dw]),
        (False, False, [logits]),
    ):
        leaves = (
            hidden.clone().requires_grad_(needs_hidden),
            weight.clone().requires_grad_(needs_weight),
        )
        assert products(lambda leaves=leaves: call(case, *leaves)) == expected
        with torch.no_grad():
            assert products(lambda leaves=leaves: call(case, *leaves)) == [logits]
        if needs_hidden or needs_weight:
            call(case, *leaves).loss.backward()
        assert [x.grad is not None for x in leaves] == [needs_hidden, needs_weight]


def test_clipped_rows_take_no_gradient_products() -> None:
    """A clipped row has no gradient, so the products of dW and dX leave it out."""
    case = make_case(num_rows=61)._replace(weights=torch.ones(61), advantages=torch.ones(4))
    logprobs = fused(case, torch.float32, metrics="all")[0].logprobs.double()
    clipped = torch.rand(61, generator=torch.Generator().manual_seed(0)) < 0.5
    # The advantage is positive and the ratio of clipped rows is e, beyond the upper clip.
    case = case._replace(old=logprobs - torch.where(clipped, 1.0, 0.0))
    num_kept = int((~clipped).sum())
    leaves = case.hidden.float().requires_grad_(), case.weight.float().requires_grad_()
    assert products(lambda: call(case, *leaves)) == [
        (61, 16, 97),
        (97, num_kept, 16),
        (num_kept, 97, 16),
    ]
    assert_as_right_as_plain(case, torch.float32, "cpp")
    kept = case._replace(
        **{
            name: getattr(case, name)[~clipped]
            for name in (
                "targets",
                "rows",
                "temperature",
                "old",
                "attempt_of_token",
                "weights",
                "ref",
            )
        }
    )
    for a, b, name in zip(
        fused(case, torch.float32)[1:], fused(kept, torch.float32)[1:], ("dX", "dW"), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batch_invariant(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A row's log-prob, entropy, ratio and dX are bitwise those that it has alone.

    The batch runs in chunks of 24 rows.
    """
    case = make_case(num_tokens=53, width=24, vocab=1031)._replace(rows=torch.arange(53))
    result, dx, _ = fused(case, dtype, metrics="all", workspace_mib=0.1, **options)
    for n in (0, 1, 17, 18, 40, 52):
        one_row = case._replace(
            **{
                name: getattr(case, name)[n : n + 1]
                for name in (
                    "hidden",
                    "targets",
                    "temperature",
                    "old",
                    "attempt_of_token",
                    "weights",
                    "ref",
                )
            },
            rows=torch.zeros(1, dtype=torch.int64),
        )
        actual, actual_dx, _ = fused(one_row, dtype, metrics="all", **options)
        for name in ("logprobs", "entropy", "ratio"):
            assert_bitwise_equal(
                getattr(actual, name), getattr(result, name)[n : n + 1], name=f"{name} {n}"
            )
        assert_bitwise_equal(actual_dx, dx[n : n + 1], name=f"dX {n}")


def test_batch_invariant_at_real_size() -> None:
    """GEMM libraries choose their kernels by size, so rows are also compared at SmolLM2's size."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 576, generator=rng)
    weight = torch.randn(49152, 576, generator=rng) / 24

    def run(rows: slice) -> tuple[PolicyLoss, Tensor]:
        x = hidden[rows].clone().requires_grad_()
        row = torch.ones(40)[rows]
        result = linear_policy_loss(
            x, weight, torch.arange(40)[rows], -11 * row, row, temperature=1.0, weights_N=row
        )
        result.loss.backward()
        return result, x.grad

    all_rows, dx = run(slice(None))
    for rows in (slice(7, 8), slice(3, 20)):
        some_rows, some_dx = run(rows)
        assert_bitwise_equal(some_rows.logprobs, all_rows.logprobs[rows], name="logprobs")
        assert_bitwise_equal(some_dx, dx[rows], name="dX")


def test_second_backward_and_tied_lm_head() -> None:
    """Gradients scale with the upstream gradient, in a second backward too.

    An LM head tied to the embedding gets the sum of both gradients.
    """
    case = make_case()
    _, dx, dw = fused(case, torch.float64)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    loss = call(case, hidden, weight).loss
    # The first backward hands its buffers out as gradients, so the second one recomputes them.
    for upstream in (-3.0, 0.5):
        got_dx, got_dw = torch.autograd.grad(
            loss, (hidden, weight), torch.tensor(upstream).double(), retain_graph=True
        )
        torch.testing.assert_close(
            (got_dx, got_dw), (dx * upstream, dw * upstream), rtol=1e-14, atol=0
        )
    token_ids = torch.arange(37) % 97
    tied = case.weight.clone().requires_grad_()
    call(case, tied[token_ids], tied).loss.backward()
    embedded = case.weight[token_ids].requires_grad_()
    lm_head = case.weight.clone().requires_grad_()
    call(case, embedded, lm_head).loss.backward()
    torch.testing.assert_close(tied.grad, lm_head.grad.index_add(0, token_ids, embedded.grad))


def test_inputs_changed_before_second_backward_raise() -> None:
    """A second backward starts from the inputs again.

    With other targets it would be the gradient of another loss, so a changed input raises.
    """
    hidden = torch.ones(3, 2, requires_grad=True)
    weight = torch.rand(5, 2)
    row = torch.ones(3)
    for changed in (targets := torch.zeros(3, dtype=torch.int64), old := -row.clone()):
        loss = linear_policy_loss(
            hidden, weight, targets, old, row, temperature=1.0, num_loss_tokens=3
        ).loss
        loss.backward(retain_graph=True)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_without_compaction_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropping rows the loss and its gradients are the same.

    On a GPU the host must not wait for the number of rows, so all stay, with weight 0 and hidden
    states of 0.
    """
    case = make_case(num_rows=37)._replace(rows=torch.arange(37))
    case.hidden[case.weights == 0] = torch.nan
    expected = fused(case, torch.float64)
    monkeypatch.setattr(_fused_policy_loss, "keep_rows", keep_all)
    torch.testing.assert_close(fused(case, torch.float64), expected, equal_nan=True)


MEMORY = """
import torch
from socpo_fast.ops import linear_policy_loss
def mib(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
torch.set_num_threads(1)
x, w = torch.randn(4096, 576).requires_grad_(), (torch.randn(49152, 576) / 24).requires_grad_()
row, targets = torch.ones(4096), torch.arange(4096)
small = (x[:16], w[:64], targets[:16], row[:16], row[:16])
linear_policy_loss(*small, temperature=1.0, num_loss_tokens=1).loss.backward()
x.grad = w.grad = None
before = mib("VmRSS")
large = (x, w, targets, row * -11, row)
linear_policy_loss(*large, temperature=1.0, num_loss_tokens=4096).loss.backward()
print(mib("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory() -> None:
    """At 4096 rows of SmolLM2's head the op takes at most dW + 256 MiB.

    All logits would be 768 MiB.
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 108 < float(done.stdout) < 108 + 256
