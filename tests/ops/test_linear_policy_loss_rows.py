"""Tests the C++ row passes on logits: values and gradients, awkward logits and every clip.

Also that they are batch-invariant, and how they are registered.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import available_impls, policy_loss
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.helpers.loss_options import gathered

pytestmark = pytest.mark.skipif(
    "cpp" not in available_impls().values(), reason="extension not built"
)

OPTIONS = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 3.0,
    "entropy_coef": 0.0,
    "kl_coef": 0.0,
    "kl_estimator": 3,
}
Inputs = dict[str, Tensor]


def make_rows(kind: str, num_rows: int, vocab: int) -> Inputs:
    """Returns rows of logits in fp64 that fp32 holds exactly.

    Ratios are on both sides of the clips, and every other target is likely.
    """
    rng = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(num_rows, vocab, generator=rng, dtype=torch.float64) * 96).round() / 32
    likely = torch.randint(vocab, (num_rows,), generator=rng)
    if kind == "peaked":
        logits.scatter_(1, likely[:, None], logits.amax(1, keepdim=True) + 24)
    elif kind == "large":
        logits = (logits * 333).round()
    elif kind == "offset":
        logits += 1e4
    elif kind == "minus_infinity":
        logits[torch.rand(num_rows, vocab, generator=rng) < 0.7] = -torch.inf
        logits[:, : min(1100, vocab - 1)] = -torch.inf  # more than a block of the row pass
        likely = logits.argmax(1)
    targets = torch.where(
        torch.arange(num_rows) % 2 == 0, likely, torch.randint(vocab, (num_rows,), generator=rng)
    )
    inv_temperature = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[torch.arange(num_rows) % 3]
    logprobs = (logits * inv_temperature[:, None]).log_softmax(1).gather(1, targets[:, None])[:, 0]
    old = torch.where(logprobs.isfinite(), logprobs, -1.0) + 0.5 * torch.randn(
        num_rows, generator=rng
    )
    return {
        "logits": logits,
        "targets": targets,
        "old": old.float().double(),
        "advantages": torch.randn(num_rows, generator=rng).double(),
        "weights": torch.rand(num_rows, generator=rng).double() * (torch.arange(num_rows) % 5 != 4),
        "inv_temperature": inv_temperature,
        "ref": (old + 0.5 * torch.randn(num_rows, generator=rng)).float().double(),
    }


def run_rows(
    rows: Inputs, dtype: torch.dtype, grad_logits: Tensor | None, **options: Any
) -> Tensor:
    """Runs the row pass; grad_logits None computes no gradient."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in rows.items()}
    options = OPTIONS | options
    return torch.ops.socpo.policy_rows(
        inputs["logits"] if grad_logits is None else grad_logits,
        grad_logits,
        inputs["targets"],
        inputs["old"],
        inputs["advantages"],
        None,
        inputs["weights"],
        inputs["inv_temperature"],
        options["clip_low"],
        options["clip_high"],
        options["dual_clip"],
        options["entropy_coef"],
        inputs["ref"],
        options["kl_coef"],
        options["kl_estimator"],
        True,
    )


def plain_rows(rows: Inputs, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Computes the same by autograd through log_softmax and policy_loss."""
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in rows.items()}
    options = OPTIONS | options
    logits = inputs["logits"].requires_grad_()
    log_softmax = (logits * inputs["inv_temperature"][:, None]).log_softmax(1)
    entropy = -(log_softmax.exp() * log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)).sum(1)
    logprobs = log_softmax.gather(1, inputs["targets"][:, None])[:, 0]
    result = policy_loss(
        logprobs,
        inputs["old"],
        inputs["advantages"],
        weights_N=inputs["weights"],
        entropy_N=entropy,
        ref_logprobs_N=inputs["ref"],
        **gathered(options | {"kl_estimator": f"k{options['kl_estimator']}"}),
    )
    grad = torch.autograd.grad(result.loss, logits)[0]
    return {
        "loss": result.loss.detach(),
        "logprob": logprobs,
        "entropy": entropy,
        "ratio": result.ratio,
        "grad": grad,
    }


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy_coef": 0.1},
    **{f"k{k}": {"kl_coef": 0.2, "kl_estimator": k} for k in (1, 2, 3)},
}


@pytest.mark.parametrize("kind", ["noise", "peaked", "large", "offset", "minus_infinity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
# The vocabulary is a prime: two blocks of 1024 and a tail shorter than a vector.
def test_rows_equal_autograd(kind: str, dtype: torch.dtype, terms: dict[str, Any]) -> None:
    rows = make_rows(kind, 30, 2053)
    grad = rows["logits"].to(dtype, copy=True)
    values = run_rows(rows, dtype, grad, **terms)
    actual = {
        "loss": values[0].sum(),
        "logprob": values[1],
        "entropy": values[2],
        "ratio": values[3],
        "grad": grad,
    }
    plain = plain_rows(rows, dtype, **terms)
    truth = plain_rows(rows, torch.float64, **terms)
    for name, x in truth.items():
        size = max(1.0, x[x.isfinite()].abs().max().item())
        assert_error_rule(
            *(y[name].double() / size for y in (actual, plain, truth)), name=name, dtype=dtype
        )
    if kind == "peaked":
        assert (truth["logprob"] > math.log(0.9995)).sum() > 5


@pytest.mark.parametrize("vocab", [49152, 50257, 151936])
def test_real_vocabularies(vocab: int) -> None:
    rows = make_rows("noise", 4, vocab)
    grad = rows["logits"].float()
    values = run_rows(rows, torch.float32, grad, entropy_coef=0.1)
    plain = plain_rows(rows, torch.float32, entropy_coef=0.1)
    truth = plain_rows(rows, torch.float64, entropy_coef=0.1)
    for name, x in {"logprob": values[1], "entropy": values[2], "grad": grad}.items():
        assert_error_rule(x, plain[name], truth[name], name=name)


def one_row(
    advantage: float, log_ratio: float, **options: Any
) -> tuple[float, float, float, float]:
    """Returns loss, ratio, clipped and coefficient of a row of weight 1, in fp64."""
    rows = {name: x[:1] for name, x in make_rows("noise", 1, 11).items()}
    logprob = run_rows(rows, torch.float64, None)[1]
    rows |= {
        "old": logprob - log_ratio,
        "advantages": torch.tensor([advantage]),
        "weights": torch.ones(1),
    }
    loss, _, _, ratio, clipped, coefficient = run_rows(rows, torch.float64, None, **options)[
        :, 0
    ].tolist()
    return loss, ratio, clipped, coefficient


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "bound"),
    [(2.0, 0.25, "clip_high"), (-2.0, -0.25, "clip_low"), (-2.0, 1.0, "dual_clip")],
)
def test_gradient_passes_exactly_on_a_bound(advantage: float, log_ratio: float, bound: str) -> None:
    """A ratio exactly on a bound is not clipped; just beyond it is, and has no gradient."""
    ratio = one_row(advantage, log_ratio, clip_low=1.0, clip_high=9.0)[1]
    at_bound = {"clip_high": ratio - 1, "clip_low": 1 - ratio, "dual_clip": ratio}[bound]
    passing = -advantage * ratio
    assert one_row(advantage, log_ratio, **{bound: at_bound}) == (passing, ratio, 0.0, passing)
    *_, clipped, coefficient = one_row(advantage, log_ratio, **{bound: at_bound - 1e-9})
    assert (clipped, coefficient) == (1.0, 0.0)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    "log_ratio", [-25.0, -20.0, -1.0, -0.1, 0.0, 0.1, 0.5, 1.0, 1.2, 20.0, 25.0]
)
def test_every_side_of_every_clip(advantage: float, log_ratio: float) -> None:
    """Each side of each clip gives what policy_loss gives at the same log-ratio, in fp64."""
    loss, ratio, clipped, coefficient = one_row(advantage, log_ratio)
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    options = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
    expected = policy_loss(logprobs, zero, zero + advantage, num_loss_tokens=1, **gathered(options))
    expected.loss.backward()
    assert (loss, ratio) == pytest.approx((expected.loss.item(), expected.ratio.item()), rel=1e-12)
    assert clipped == expected.clip_fraction.item()
    if abs(log_ratio) != 20:  # at 20 rounding decides on which side of the clamp it is
        assert coefficient == pytest.approx(logprobs.grad.item(), rel=1e-12)


def test_rows_of_weight_zero_are_exact_zeros() -> None:
    """Rows of weight 0 have loss and gradient exactly 0, also where their inputs are NaN."""
    rows = make_rows("noise", 6, 1031)
    rows["logits"][0] = torch.nan
    rows["old"][1] = torch.nan
    rows["weights"] = torch.zeros(6)
    for dtype in (torch.float32, torch.float64):
        grad = rows["logits"].to(dtype, copy=True)
        values = run_rows(rows, dtype, grad, kl_coef=0.1, entropy_coef=0.1)
        assert not values[[0, 4, 5]].any()
        assert not grad.any()
        assert values[1:4, 2:].isfinite().all()


def test_nan_is_not_hidden() -> None:
    """NaN or only -inf in the logits of a row that counts give NaN, in that row only."""
    rows = make_rows("noise", 3, 1031)
    rows["logits"][0, 7] = torch.nan
    rows["logits"][1] = -torch.inf
    rows["weights"] = torch.ones(3)
    grad = rows["logits"].float()
    values = run_rows(rows, torch.float32, grad)
    assert values[0].isnan().tolist() == [True, True, False]
    assert grad.isnan().all(1).tolist() == [True, True, False]


def test_batch_invariant_in_place_and_strided() -> None:
    """A row computed alone, in place and inside a wider row equals it in the batch bitwise."""
    rows = make_rows("noise", 9, 1031)
    grad = rows["logits"].float()
    values = run_rows(rows, torch.float32, grad, entropy_coef=0.1)
    for n in range(9):
        one_row = {name: x[n : n + 1] for name, x in rows.items()}
        wide = torch.zeros(1, 1500)
        wide[:, :1031] = one_row["logits"]
        assert_bitwise_equal(
            run_rows(one_row, torch.float32, wide[:, :1031], entropy_coef=0.1),
            values[:, n : n + 1],
            name="values",
        )
        assert_bitwise_equal(wide[:, :1031], grad[n : n + 1], name="grad")
        assert not wide[:, 1031:].any()


def test_registration() -> None:
    """torch accepts every op of the extension: schema, mutation, fake tensors and tracing."""
    ops = torch.ops.socpo
    f = torch.randn
    targets = torch.tensor([1, 0, 4])
    row = f(3)
    logits = f(3, 5)
    loss_inputs = (
        targets,
        row,
        f(2),
        torch.tensor([0, 1, 1]),
        row.abs(),
        row.abs() + 0.1,
        0.2,
        0.2,
        3.0,
    )
    for grad in (None, torch.empty(3, 5)):
        torch.library.opcheck(ops.policy_rows, (logits, grad, *loss_inputs, 0.1, row, 0.1, 3, True))
    torch.library.opcheck(ops.logprob_rows, (logits, targets, row.abs() + 0.1))
    backward_inputs = (logits, torch.empty(3, 5), targets, row.abs() + 0.1, row, row, row)
    for grad_entropy in (None, row):
        torch.library.opcheck(ops.logprob_rows_backward, (*backward_inputs, grad_entropy))
    torch.library.opcheck(ops.matmul_, (f(3, 5), f(3, 4), f(4, 5), True))
    token_row = torch.ones(3)
    torch.library.opcheck(
        ops.sample, (logits, targets, token_row, targets * 0, token_row, token_row * 0)
    )
    cache = f(2, 4, 1, 8)
    index = torch.tensor([[1, 0]], dtype=torch.int32)
    seq = (torch.tensor([5], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32))
    torch.library.opcheck(ops.paged_attention, (f(3, 2, 8), cache, cache, index, *seq, 0.3))
