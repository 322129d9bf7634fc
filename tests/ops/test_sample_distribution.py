"""Tests the distribution that each filter of sample draws from, and the mass it reports.

The expected values come from plain Python in fp64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import sample
from tests.helpers.error_rule import assert_bitwise_equal
from tests.ops.test_sample import IMPLS, keys, settings

FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.03},
]


def kept_by_hand(
    logits: list[float],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """Returns {kept token: its probability over the whole vocabulary}.

    It follows the docstring of sample word by word.
    """
    largest = max(logits)
    weights = [math.exp((z - largest) / temperature) for z in logits]
    total = math.fsum(weights)
    ranked = sorted(
        ((weight / total, -token) for token, weight in enumerate(weights)), reverse=True
    )
    ranked = ranked[: top_k or None]
    mass_of_top_k = math.fsum(prob for prob, _ in ranked)
    nucleus = []
    mass_so_far = 0.0
    for prob, token in ranked:
        if top_p < 1 and mass_so_far >= top_p * mass_of_top_k:
            break
        nucleus.append((prob, token))
        mass_so_far += prob
    return {-token: prob for prob, token in nucleus if prob >= min_p * ranked[0][0]}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_chi_square(filters: dict, impl: str) -> None:
    """200,000 draws of 24 tokens are exactly the kept tokens, as often as they should be.

    One seed in 10,000 would fail this.
    """
    num_draws = 200_000
    logits_V = torch.randn(24, generator=torch.Generator().manual_seed(4))
    kept = kept_by_hand(logits_V.double().tolist(), **filters)
    token_ids_B = sample(
        logits_V.expand(num_draws, -1).contiguous(),
        keys(num_draws, seed=3),
        **settings(num_draws, **filters),
        impl=impl,
    )[0]
    counts = token_ids_B.bincount(minlength=24).double()
    tokens = torch.tensor(sorted(kept))
    assert counts.sum() == counts[tokens].sum() == num_draws, (
        "nothing that was filtered out is drawn"
    )
    probabilities = torch.tensor([kept[token] for token in sorted(kept)], dtype=torch.float64)
    expected = num_draws * probabilities / probabilities.sum()
    assert expected.min() > 5
    statistic = ((counts[tokens] - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((len(kept) - 1) / 2).double(), statistic / 2) > 1e-4


# Vocabularies: less than a vector, a prime above a chunk of 512, several chunks. The rows are flat
# to peaked.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab", [7, 1031, 5000])
@pytest.mark.parametrize(
    "filters", [*FILTERS, {"top_p": 1e-6}, {"min_p": 0.999}, {"top_k": 1}], ids=str
)
def test_kept_mass_is_that_of_fp64(filters: dict, vocab: int, impl: str) -> None:
    logits_BV = (
        torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
        * torch.arange(1.0, 7.0)[:, None]
    )
    token_ids_B, logprobs_B, mass_B = sample(
        logits_BV, keys(6), **settings(6, **filters), impl=impl
    )
    for b, logits in enumerate(logits_BV.double().tolist()):
        kept = kept_by_hand(logits, **filters)
        assert int(token_ids_B[b]) in kept
        assert abs(float(mass_B[b]) - math.fsum(kept.values())) < 1e-6
        # The log-prob is that of the whole vocabulary.
        assert abs(float(logprobs_B[b]) - math.log(kept[int(token_ids_B[b])])) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "off", [{"top_k": 50}, {"top_k": 2**31 - 1}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}]
)
def test_a_filter_that_keeps_everything_changes_no_bit(off: dict, impl: str) -> None:
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(6))
    plain = sample(logits_BV, keys(20), **settings(20), impl=impl)
    kept = sample(logits_BV, keys(20), **settings(20, **off), impl=impl)
    for name, x, y in zip(("token_ids", "logprobs"), kept, plain, strict=False):
        assert_bitwise_equal(x, y, name=name)
    assert (kept[2] - 1).abs().max() < 1e-6 and plain[2].eq(1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_a_batch_keep_their_own_filters(impl: str) -> None:
    logits_BV = torch.randn(len(FILTERS), 300, generator=torch.Generator().manual_seed(7))
    each = [settings(1, **filters) for filters in FILTERS]
    mixed = {name: torch.cat([row[name] for row in each]) for name in each[0]}
    batch = sample(logits_BV, keys(len(FILTERS)), **mixed, impl=impl)
    for b, row in enumerate(each):
        actual: tuple[Tensor, ...] = sample(
            logits_BV[b : b + 1], keys(len(FILTERS))[b : b + 1], **row, impl=impl
        )
        for name, x, y in zip(("token_ids", "logprobs", "kept_mass"), actual, batch, strict=True):
            assert_bitwise_equal(x, y[b : b + 1], name=f"{name} of {FILTERS[b]}")
