"""Compares the Triton row passes with log-softmax, policy_loss_ref and autograd.

On a CPU they run in the interpreter.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels.linear_policy_loss import logprob_rows, logprob_rows_backward, policy_rows
from socpo_fast.ops.policy_loss import policy_loss_ref
from tests.helpers.error_rule import assert_bitwise_equal, assert_equal_across_variants
from tests.helpers.head_rows import (
    DEVICE,
    TILE,
    Rows,
    assert_scaled,
    logprobs_and_entropy,
    make_rows,
)
from tests.helpers.loss_options import gathered

DEFAULTS = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 3.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
}
ALL_TERMS = {"entropy_coef": 0.3, "kl_coef": 0.5, "kl_estimator": 3}


def expected_rows(rows: Rows, dtype: torch.dtype, **options: float) -> tuple[Tensor, Tensor]:
    """Returns values [6, N] and the gradient of the logits.

    They come from policy_loss_ref and autograd, one row at a time.
    """
    options = DEFAULTS | {"kl_estimator": 3} | options
    options |= {"kl_estimator": f"k{options['kl_estimator']}"}
    options |= {"dual_clip": None} if options["dual_clip"] == float("inf") else {}
    rows = Rows(*(x.to(dtype, copy=True) if x.is_floating_point() else x for x in rows))
    logits = rows.logits.requires_grad_()
    logprobs, entropy = logprobs_and_entropy(logits, rows.targets, rows.inv_temperature)
    values = []
    for n in range(logits.shape[0]):
        row = slice(n, n + 1)
        result = policy_loss_ref(
            logprobs[row], rows.old[row], rows.advantages[row], rows.weights[row],
            entropy_N=entropy[row], ref_logprobs_N=rows.ref[row], **gathered(options),
        )  # fmt: skip
        (coefficient,) = torch.autograd.grad(result.loss, logprobs, retain_graph=True)
        result.loss.backward(retain_graph=True)
        clipped = result.clip_fraction
        values.append(
            torch.stack(
                [result.loss, logprobs[n], entropy[n], result.ratio[0], clipped, coefficient[n]]
            )
        )
    return torch.stack(values, dim=1).detach(), logits.grad


def triton_rows(
    rows: Rows, dtype: torch.dtype, grad_dtype: torch.dtype | None = None, **options: float
) -> tuple[Tensor, Tensor]:
    """Returns the values of the row pass, and its gradient of the logits."""
    options = DEFAULTS | {"kl_estimator": 3} | options
    rows = Rows(*(x.to(DEVICE, dtype if x.is_floating_point() else x.dtype) for x in rows))
    grad = torch.full_like(rows.logits, torch.nan, dtype=grad_dtype or dtype)
    values = policy_rows(
        rows.logits, grad, rows.targets, rows.old, rows.advantages, None, rows.weights,
        rows.inv_temperature,
        ref_logprobs_N=rows.ref, need_entropy=True, **options,
    )  # fmt: skip
    return values.cpu(), grad.cpu()


def assert_rows(
    rows: Rows, dtype: torch.dtype, grad_dtype: torch.dtype | None = None, **options: float
) -> None:
    """Asserts the error rule for all values and for the gradient."""
    actual = triton_rows(rows, dtype, grad_dtype, **options)
    plain = expected_rows(rows, dtype, **options)
    truth = expected_rows(rows, torch.float64, **options)
    for i, name in enumerate(("loss", "logprob", "entropy", "ratio", "clipped", "coefficient")):
        assert_scaled(actual[0][i], plain[0][i], truth[0][i], name=name, dtype=dtype)
    scale = truth[1].abs().amax(-1, keepdim=True)
    assert_scaled(actual[1], plain[1], truth[1], scale, name="gradient", dtype=grad_dtype or dtype)


# Vocabularies: one token; a tile - 1, a tile, a tile + 1; several tiles with a tail.
@pytest.mark.parametrize("vocab", [1, TILE - 1, TILE, TILE + 1, 2 * TILE + 1, 3 * TILE - 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_rows_at_tile_edges(vocab: int, dtype: torch.dtype) -> None:
    assert_rows(make_rows(vocab), dtype, **ALL_TERMS)


@pytest.mark.parametrize("kind", ["peaked", "large", "offset", "-inf"])
@pytest.mark.parametrize("options", [{}, ALL_TERMS], ids=["bare", "all terms"])
def test_policy_rows_on_awkward_logits(kind: str, options: dict[str, float]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_rows(make_rows(2 * TILE + 5, kind=kind), dtype, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_low": 1.0, "clip_high": 5.0},
        {"dual_clip": float("inf")},
        {"dual_clip": 1.01},
        {"entropy_coef": -0.2},
        {"kl_coef": 0.5, "kl_estimator": 1},
        {"kl_coef": 0.5, "kl_estimator": 2},
        {"kl_coef": 0.5, "kl_estimator": 3},
    ],
    ids=str,
)
def test_each_term_of_the_loss(options: dict[str, float]) -> None:
    """Each term and each setting of the clips keeps the error rule; some rows clip."""
    rows = make_rows(131)
    assert_rows(rows, torch.float32, **options)
    assert_rows(rows, torch.float64, **options)
    clipped = triton_rows(rows, torch.float32, **options)[0][4].tolist()
    assert 0 < sum(clipped) < 12 or options.get("clip_high") in (0.0, 5.0)


# SmolLM2's, GPT-2's, which is odd, and Qwen3's.
@pytest.mark.parametrize("vocab", [49152, 50257, 151936])
def test_policy_rows_over_real_vocabularies(vocab: int) -> None:
    assert_rows(make_rows(vocab, num_rows=2), torch.float32, **ALL_TERMS)


def test_a_ratio_on_a_bound_passes_its_gradient() -> None:
    """A ratio exactly on a bound is not clipped, at either clip and at the dual clip."""
    rows = make_rows(131)
    logprobs = triton_rows(rows, torch.float32)[0][1]
    rows = rows._replace(old=logprobs)  # so the ratio is exactly 1
    values, _ = triton_rows(rows, torch.float32, clip_low=0.0, clip_high=0.0)
    assert values[3].tolist() == [1.0] * 12 and values[4].tolist() == [0.0] * 12
    assert_bitwise_equal(values[5], -rows.advantages * rows.weights, name="coefficient")

    one_row = make_rows(1, num_rows=1)  # its log-prob is 0, so the ratio is 2
    one_row = one_row._replace(
        old=torch.tensor([-0.6931471805599453]), advantages=torch.tensor([-1.5])
    )
    values, _ = triton_rows(one_row, torch.float32, clip_high=0.2, dual_clip=2.0)
    assert values[3].tolist() == [2.0] and values[4].tolist() == [0.0]
    assert_bitwise_equal(values[5], 3.0 * one_row.weights, name="coefficient")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter's, of NaN
def test_rows_without_coefficient_get_exact_zeros() -> None:
    """A row of weight 0 or advantage 0 has loss and gradient exactly 0, whatever it holds.

    With an entropy term a row of advantage 0 has a gradient, as the entropy needs no advantage.
    """
    rows = make_rows(131)
    rows.weights[:3] = 0.0
    rows.old[0] = torch.nan
    rows.ref[1] = torch.inf
    rows.logits[2] = torch.nan
    rows.advantages[3] = 0.0
    values, grad = triton_rows(rows, torch.float32)
    assert_bitwise_equal(grad[:4], torch.zeros(4, 131), name="gradient")
    assert (grad[8] != 0).all()  # inside both clips
    for i in (0, 4, 5):
        assert (values[i, :4] == 0).all(), i
    assert (triton_rows(rows, torch.float32, entropy_coef=0.1)[1][3] != 0).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # the interpreter's, of NaN
def test_nan_stays_nan() -> None:
    """NaN in the logits, old or reference log-probs of a row gives NaN in that row only."""
    rows = make_rows(TILE + 3, num_rows=4)
    rows.logits[0, 7] = torch.nan
    rows.old[1] = torch.nan
    rows.ref[2] = torch.nan
    values, grad = triton_rows(rows, torch.float32, kl_coef=0.1)
    assert values[0].isnan().tolist() == [True, True, True, False]
    assert grad.isnan().any(-1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_a_narrow_dtype(grad_dtype: torch.dtype) -> None:
    rows = make_rows(131)
    assert_rows(rows, torch.float32, grad_dtype, **ALL_TERMS)
    # Triton's interpreter truncates to bf16 instead of rounding.
    if grad_dtype == torch.float16 or DEVICE != "cpu":
        wide = triton_rows(rows, torch.float32)[1]
        narrow = triton_rows(rows, torch.float32, grad_dtype)[1]
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1.0)
        rounded = wide.to(grad_dtype)
        assert_equal_across_variants(narrow, rounded, device=DEVICE, name="rounded", scale=scale)


def test_in_place_strided_and_without_a_gradient() -> None:
    """Three other ways to call the row pass give the same values.

    Without a gradient; in place in a wider tensor, whose other columns stay; and without entropy.
    """
    rows = Rows(*(x.to(DEVICE) for x in make_rows(TILE + 3)))
    values, grad = triton_rows(rows, torch.float32)
    wide = torch.full((12, TILE + 10), 7.0, device=DEVICE)
    wide[:, : TILE + 3] = rows.logits
    view = wide[:, : TILE + 3]
    attempts = torch.arange(12, device=DEVICE).flip(0)
    row_inputs = (
        rows.targets,
        rows.old,
        rows.advantages.flip(0),
        attempts,
        rows.weights,
        rows.inv_temperature,
    )
    tail = (0.2, 0.2, 3.0, 0.0, None, 0.0, 3, True)
    scale = values.abs().clamp(min=1.0)  # a ratio may be exp(20)
    compare = partial(assert_equal_across_variants, device=DEVICE)
    compare(policy_rows(view, None, *row_inputs, *tail), values, name="no gradient", scale=scale)
    in_place = policy_rows(view, view, *row_inputs, *tail)
    compare(in_place, values, name="in place, advantages by attempt", scale=scale)
    scale = grad.abs().amax(-1, keepdim=True).clamp(min=1.0)
    compare(view, grad, name="gradient", scale=scale)
    assert (wide[:, TILE + 3 :] == 7).all()
    no_entropy = policy_rows(rows.logits, None, *row_inputs, *tail[:-1], False)
    assert no_entropy[2].isnan().all()
    compare(no_entropy[1], values[1], name="logprob", scale=values[1].abs().clamp(min=1.0))


def test_batch_invariant() -> None:
    rows = make_rows(2 * TILE + 5)
    values, grad = triton_rows(rows, torch.float32, **ALL_TERMS)
    for n in (0, 7):
        one_row = Rows(*(x[n : n + 1].clone() for x in rows))  # a clone is aligned, as the batch is
        alone_values, alone_grad = triton_rows(one_row, torch.float32, **ALL_TERMS)
        assert_bitwise_equal(alone_values[:, 0], values[:, n], name="values")
        assert_bitwise_equal(alone_grad[0], grad[n], name="gradient")


def test_no_rows() -> None:
    empty = torch.empty(0, 7, device=DEVICE)
    index = torch.empty(0, dtype=torch.int64, device=DEVICE)
    row = empty[:, 0]
    values = policy_rows(
        empty, empty, index, row, row, None, row, row, 0.2, 0.2, 3.0, 0.0, None, 0.0, 3, True
    )
    assert values.shape == (6, 0)
    assert logprob_rows(empty, index, row).shape == (3, 0)
    logprob_rows_backward(empty, empty, index, row, row, row, row, None)
