"""Tests the Triton row passes of linear_logprob: log-prob, entropy and their gradient."""

from __future__ import annotations

import pytest
import torch

from socpo_fast.kernels.linear_policy_loss import logprob_rows, logprob_rows_backward
from tests.helpers.error_rule import assert_bitwise_equal, assert_equal_across_variants
from tests.helpers.head_rows import DEVICE, TILE, assert_scaled, logprobs_and_entropy, make_rows


@pytest.mark.parametrize("vocab", [1, TILE, TILE + 1, 2 * TILE + 7])
@pytest.mark.parametrize("kind", ["noise", "peaked", "large", "offset", "-inf"])
def test_logprob_rows_and_their_backward(kind: str, vocab: int) -> None:
    """Values and gradients keep the error rule, in fp32 and fp64, at the ends of tiles.

    A row without an upstream gradient has a gradient of exactly 0.
    """
    if vocab == 1 and kind in ("peaked", "-inf"):
        return
    rows = make_rows(vocab, num_rows=6, kind=kind)
    upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    upstream[0, 1] = upstream[1, 1] = 0.0
    if kind == "-inf":
        upstream[0, 0] = 0.0  # its log-prob is -inf
    results = {}
    for dtype in (torch.float32, torch.float64):
        logits = rows.logits.to(dtype, copy=True).requires_grad_()
        scale = rows.inv_temperature.to(dtype)
        logprobs, entropy = logprobs_and_entropy(logits, rows.targets, scale)
        (grad,) = torch.autograd.grad([logprobs, entropy], logits, list(upstream.to(dtype)))
        logsumexp = (logits * scale[:, None]).logsumexp(-1)
        results[dtype] = (*(x.detach() for x in (logprobs, entropy, logsumexp)), grad)
    for dtype in results:
        logits, targets, scale = (
            x.to(DEVICE) for x in (rows.logits.to(dtype), rows.targets, rows.inv_temperature)
        )
        scale = scale.to(dtype)
        values = logprob_rows(logits, targets, scale)
        grads = upstream.to(DEVICE, dtype)
        grad = logits.clone()
        logprob_rows_backward(grad, grad, targets, scale, values[2], values[1], grads[0], grads[1])
        for name, *triple in zip(
            ("logprob", "entropy", "logsumexp", "gradient"),
            (*values.cpu(), grad.cpu()), results[dtype], results[torch.float64], strict=True,
        ):  # fmt: skip
            assert_scaled(*triple, name=name, dtype=dtype)
        assert_bitwise_equal(grad[1], torch.zeros_like(grad[1]), name="no upstream gradient")
        without_entropy = torch.empty_like(logits, dtype=torch.float16)
        logprob_rows_backward(
            logits, without_entropy, targets, scale, values[2], values[1], grads[0], None
        )
        zero = torch.zeros_like(grads[1])
        logprob_rows_backward(logits, grad, targets, scale, values[2], values[1], grads[0], zero)
        scale = grad.abs().amax(-1, keepdim=True).clamp(min=1.0)
        # Without an entropy to subtract a zero may be -0; adding 0 makes it 0.
        without_entropy = without_entropy + 0
        with_zero_entropy = grad.half() + 0
        assert_equal_across_variants(
            without_entropy, with_zero_entropy, device=DEVICE, name="no entropy", scale=scale
        )
