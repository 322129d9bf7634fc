"""Rows of logits for the row passes of the policy head, and how results are compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from socpo_fast.kernels.linear_policy_loss import (
    TILES,
)
from tests.helpers.error_rule import (
    assert_error_rule,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


TILE = TILES[0][torch.float32].block


class Rows(NamedTuple):
    """Inputs in fp32 of 12 rows or fewer, whose log-ratios and advantages meet every branch of the
    loss.
    """

    logits: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor
    inv_temperature: Tensor
    ref: Tensor


def make_rows(vocab: int, num_rows: int = 12, kind: str = "noise") -> Rows:
    rng = torch.Generator().manual_seed(vocab + num_rows)
    logits = 3 * torch.randn(num_rows, vocab, generator=rng)
    targets = torch.randint(vocab, (num_rows,), generator=rng)
    rows = torch.arange(num_rows)
    if kind == "peaked":  # p > 0.9995 of the target in even rows, of another token in odd ones
        logits[rows, torch.where(rows % 2 == 0, targets, (targets + 1) % vocab)] = 30.0
    elif (
        kind == "large"
    ):  # targets near the top: far below it, one unit in the last place is most of a ratio
        logits *= 1000 / 3
        logits[rows, targets] = logits.amax(-1) - rows / 4
    elif kind == "offset":
        logits += 1e4
    elif kind == "-inf":  # the first tile of each row holds nothing else; of row 0 the target too
        logits[:, : vocab // 2] = -torch.inf
        targets = targets.clamp(min=vocab // 2)
        targets[0] = 0
    inv_temperature = 0.5 + torch.rand(num_rows, generator=rng)
    logprobs, _ = logprobs_and_entropy(logits.double(), targets, inv_temperature.double())
    # inside both clips, beyond each, beyond the dual clip, beyond what a log-ratio is clamped to;
    # both signs of A
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
    logp = (logits * inv_temperature[:, None]).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def assert_scaled(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    scale: Tensor | None = None,
    *,
    name: str,
    dtype: torch.dtype,
) -> None:
    """The error rule for what is above 1, a ratio of exp(20) or a log-prob of -1000, as a multiple
    of what it is.
    """
    scale = (truth if scale is None else scale).abs().clamp(min=1.0).nan_to_num(posinf=1.0)
    assert_error_rule(*(x.double() / scale for x in (actual, plain, truth)), name=name, dtype=dtype)
