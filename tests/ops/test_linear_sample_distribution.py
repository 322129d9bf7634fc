"""Tests the distribution of linear_sample's draws.

Frequencies of many draws of one row follow its softmax, and siblings are independent.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import linear_sample, row_keys
from tests.ops.test_sample import IMPLS, keys, settings
from tests.ops.test_sample_distribution import kept_by_hand


def chance(statistic: Tensor, freedom: int) -> float:
    """Returns the probability of a chi-square statistic at least this large."""
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2).item()


# Vocabularies: one tile, and three tiles of which the last is not full. The reference stores all
# logits, so it draws from the small one only.
@pytest.mark.parametrize(
    ("impl", "vocab"),
    [("ref", 24), *[pytest.param("cpp", v, marks=IMPLS[1].marks) for v in (24, 1700)]],
)
@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 1.7}, {"temperature": 0.8, "top_p": 0.9}], ids=str
)
def test_chi_square(vocab: int, filters: dict, impl: str) -> None:
    """120,000 draws of one row follow its distribution, or 20,000 where each is filtered alone.

    One seed in 10,000 would fail this.
    """
    num_draws = 20_000 if filters.get("top_p") and vocab > 100 else 120_000
    logits_V = 0.6 * torch.randn(vocab, generator=torch.Generator().manual_seed(4))
    hidden = torch.ones(1, 1)
    weight = logits_V[:, None].contiguous()
    rows = torch.zeros(num_draws, dtype=torch.int64)
    knobs = settings(num_draws, **filters)
    token_ids, _, _, mass = linear_sample(
        hidden, weight, keys(num_draws, seed=3), **knobs, rows_B=rows, impl=impl
    )
    kept = kept_by_hand(logits_V.double().tolist(), **filters)
    counts = token_ids.bincount(minlength=vocab).double()
    tokens = torch.tensor(sorted(kept))
    probabilities = torch.tensor([kept[token] for token in sorted(kept)], dtype=torch.float64)
    assert counts.sum() == counts[tokens].sum() == num_draws, (
        "nothing that was filtered out is drawn"
    )
    assert (mass - probabilities.sum()).abs().max() < 1e-6
    expected = num_draws * probabilities / probabilities.sum()
    assert expected.min() > 3
    assert chance(((counts[tokens] - expected) ** 2 / expected).sum(), len(kept) - 1) > 1e-4


@pytest.mark.parametrize("impl", IMPLS)
def test_siblings_of_a_row_are_not_correlated(impl: str) -> None:
    """Pairs that share their row and differ in the rollout are independent.

    All pairs of tokens occur as often as the product of their probabilities says.
    """
    num_pairs = 60_000
    vocab = 16
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    fields = torch.zeros(2 * num_pairs, 6, dtype=torch.int64)
    fields[:, 5] = torch.arange(num_pairs).repeat_interleave(2)
    fields[1::2, 3] = 1
    rows = torch.zeros(2 * num_pairs, dtype=torch.int64)
    lm_head = (torch.ones(1, 1), logits_V[:, None].contiguous())
    token_ids = linear_sample(
        *lm_head, row_keys(fields), **settings(2 * num_pairs), rows_B=rows, impl=impl
    )[0]
    pairs = (token_ids[0::2] * vocab + token_ids[1::2]).bincount(minlength=vocab**2).double()
    probs = logits_V.double().softmax(0)
    expected = num_pairs * (probs[:, None] * probs).flatten()
    assert expected.min() > 3
    assert chance(((pairs - expected) ** 2 / expected).sum(), vocab**2 - 1) > 1e-4
