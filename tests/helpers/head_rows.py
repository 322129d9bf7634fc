"""Makes rows of logits for the row passes of the policy head, and compares their results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from socpo_fast.kernels.linear_policy_loss import TILES
from tests.helpers.error_rule import assert_error_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TILES[0][torch.float32].block


class Rows(NamedTuple):
    """Inputs of at most 12 rows in fp32.

    Their log-ratios and advantages reach every branch of the loss.
    """

    logits: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor
    inv_temperature: Tensor
    ref: Tensor


def make_rows(vocab: int, num_rows: int = 12, kind: str = "noise") -> Rows:
    """Returns rows of random logits, which `kind` makes awkward in one way."""
    rng = torch.Generator().manual_seed(vocab + num_rows)
    logits = 3 * torch.randn(num_rows, vocab, generator=rng)
    targets = torch.randint(vocab, (num_rows,), generator=rng)
    rows = torch.arange(num_rows)
    if kind == "peaked":  # p > 0.9995 of the target in even rows, of another token in odd ones
        logits[rows, torch.where(rows % 2 == 0, targets, (targets + 1) % vocab)] = 30.0
    elif kind == "large":
        # The targets are near the largest logit. Far below it the last bit of a logit would change
        # the ratio by most of its value, and nothing could be compared.
        logits *= 1000 / 3
        logits[rows, targets] = logits.amax(-1) - rows / 4
    elif kind == "offset":
        logits += 1e4
    elif kind == "-inf":  # the first tile of each row is all -inf; in row 0 the target is too
        logits[:, : vocab // 2] = -torch.inf
        targets = targets.clamp(min=vocab // 2)
        targets[0] = 0
    inv_temperature = 0.5 + torch.rand(num_rows, generator=rng)
    logprobs, _ = logprobs_and_entropy(logits.double(), targets, inv_temperature.double())
    # Log-ratios inside both clips, beyond each clip, beyond the dual clip, and beyond the clamp of
    # log-ratios, with both signs of the advantage.
    log_ratio = torch.tensor([0.05, -0.05, 0.3, -0.3, 1.5, -1.5, 25.0, -25.0, 0.1, -0.1, 0.3, 3.0])[
        :num_rows
    ]
    sign = torch.tensor([1.0, -1, 1, 1, -1, -1, 1, -1, -1, 1, -1, 1])[:num_rows]
    old = (logprobs.nan_to_num(neginf=-50.0) - log_ratio).float()
    return Rows(
        logits,
        targets,
        old,
        sign * (0.5 + torch.rand(num_rows, generator=rng)),
        0.5 + torch.rand(num_rows, generator=rng),
        inv_temperature,
        old + torch.randn(num_rows, generator=rng),
    )


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, inv_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of each target and the entropy of each row, by log-softmax."""
    log_softmax = (logits * inv_temperature[:, None]).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax.masked_fill(log_softmax == -torch.inf, 0.0)).sum(-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def assert_scaled(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    scale: Tensor | None = None,
    *,
    name: str,
    dtype: torch.dtype,
) -> None:
    """Asserts the error rule, relative to the scale where that is above 1.

    A ratio may be exp(20) and a log-prob -1000; the rule's tolerance is absolute.
    """
    scale = (truth if scale is None else scale).abs().clamp(min=1.0).nan_to_num(posinf=1.0)
    assert_error_rule(*(x.double() / scale for x in (actual, plain, truth)), name=name, dtype=dtype)
