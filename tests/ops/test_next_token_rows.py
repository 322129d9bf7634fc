"""Compares next_token_rows with the shifted cross entropy of a padded batch, as in transformers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops import linear_logprob, next_token_rows


# A batch, one sequence, the shortest one that predicts anything, one that predicts nothing.
@pytest.mark.parametrize(("batch", "length"), [(3, 7), (1, 5), (2, 2), (2, 1)])
def test_equals_shifted_cross_entropy(batch: int, length: int) -> None:
    rng = torch.Generator().manual_seed(batch)
    hidden = torch.randn(batch, length, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=rng, dtype=torch.float64)
    labels = torch.randint(11, (batch, length), generator=rng)
    labels[:, :2] = torch.where(torch.arange(batch)[:, None] == 0, labels[:, :2], -100)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden_TD, targets_N, rows_N = next_token_rows(hidden, labels)
        logprobs_N, _ = linear_logprob(hidden_TD, weight, targets_N, rows_N=rows_N, temperature=1.0)
        return -logprobs_N.nansum()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(
            (hidden @ weight.T).flatten(0, 1),
            shifted.flatten(),
            reduction="sum",
        )

    for op in (results := {ours: (), plain: ()}):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = op(*leaves)
        results[op] = loss.detach(), *torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(results[ours], results[plain])


def test_shapes_do_not_depend_on_the_labels() -> None:
    """A batch without any label still has a row for each position, so shapes are static."""
    hidden = torch.zeros(2, 4, 3)
    labels = torch.full((2, 4), -100)
    hidden_TD, targets_N, rows_N = next_token_rows(hidden, labels)
    assert hidden_TD.shape == (8, 3)
    assert targets_N.tolist() == [-100] * 6
    assert rows_N.tolist() == [0, 1, 2, 4, 5, 6]


def test_bad_inputs() -> None:
    with pytest.raises(
        ValueError,
        match=r"^next_token_rows: labels_BL must be int64 \[B=2, L=4\], got int64 \[2, 3\]",
    ):
        next_token_rows(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.int64))
