"""Compares the filtered draws of the Triton kernel, which sorts nothing, with `sample`.

Both see the same logits. On a CPU the kernel runs in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels.filtered_draw import TILES
from socpo_fast.kernels.linear_sample import linear_sample_triton
from socpo_fast.ops import linear_sample
from socpo_fast.ops.sample import kept_tokens, sample_ref
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.ops.test_linear_sample_distribution import chance
from tests.ops.test_sample import keys, settings
from tests.ops.test_sample_distribution import kept_by_hand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = TILES[0][torch.float32].block
NAMES = ("top_k_B", "top_p_B", "min_p_B")


def draw(
    logits_BV: Tensor, row_keys_B: Tensor, knobs: dict[str, Tensor], factor_B: Tensor | None = None
) -> list[Tensor]:
    """Returns token ids, log-probs, entropies and kept mass from these logits.

    The LM head has exactly these logits, as its hidden states are unit vectors.
    """
    hidden_BD = torch.eye(len(logits_BV))
    if factor_B is not None:  # scales the logits of each row; NaN and inf break the row
        hidden_BD.diagonal().mul_(factor_B)
    lm_head = hidden_BD, logits_BV.T.contiguous(), row_keys_B, knobs["temperature_B"]
    filters = tuple(knobs[name].to(DEVICE) for name in NAMES)
    drawn = linear_sample_triton(*(x.to(DEVICE) for x in lm_head), None, filters)
    return [x.cpu() for x in drawn]


def assert_as_sample(logits_BV: Tensor, knobs: dict[str, Tensor], seed: int = 0) -> None:
    """Asserts the tokens of `sample`, and its log-probs and kept mass by the error rule."""
    row_keys_B = keys(len(logits_BV), seed=seed)
    token_ids_B, logprobs_B, mass_B = sample_ref(logits_BV, row_keys_B, **knobs)
    actual = draw(logits_BV, row_keys_B, knobs)
    assert_bitwise_equal(actual[0], token_ids_B, name="token_ids")
    temperature_B = knobs["temperature_B"].double()
    z_BV = logits_BV.double() / torch.where(temperature_B == 0, 1.0, temperature_B)[:, None]
    truth_B = z_BV.log_softmax(-1).gather(-1, token_ids_B[:, None])[:, 0]
    assert_error_rule(actual[1], logprobs_B, truth_B, name="logprobs", dtype=torch.float32)
    assert_error_rule(actual[3], mass_B, mass_B.double(), name="kept_mass", dtype=torch.float32)


# Vocabularies: one token, less than a block, a block + 1, a prime of several blocks. A top_k beyond
# the vocabulary filters nothing.
@pytest.mark.parametrize("vocab", [1, 7, BLOCK + 1, 5 * BLOCK + 11])
@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.6, "top_p": 0.95},
        {"top_p": 1e-6},
        {"top_k": 5},
        {"top_k": 10_000, "min_p": 0.02},
        {"min_p": 0.999},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.9},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_what_sample_draws(vocab: int, filters: dict) -> None:
    logits_BV = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab))
    logits_BV[0, 1:] = -1e30  # all mass on one token
    logits_BV[1, vocab // 2] += 50  # nearly all of it
    assert_as_sample(logits_BV, settings(6, **filters))


@pytest.mark.parametrize(
    "filters", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": BLOCK + 40, "top_p": 0.9}], ids=str
)
def test_lowest_ids_of_ties_are_kept(filters: dict) -> None:
    """Among equal logits the filters keep the lowest token ids, as the reference does.

    Rows: all equal; three values, whose ties are in several blocks; zeros of both signs.
    """
    vocab = 2 * BLOCK + 5
    logits_BV = torch.zeros(6, vocab)
    logits_BV[2:4] = (torch.arange(vocab) % 3).float()
    logits_BV[4:] = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)
    knobs = settings(6, **filters)
    kept_BV = kept_tokens(logits_BV.double().softmax(-1), *(knobs[name] for name in NAMES))
    for seed in range(2):
        drawn = draw(logits_BV, keys(6, seed=seed), knobs)
        assert kept_BV.gather(1, drawn[0][:, None]).all(), "a token that is not kept was drawn"
        mass_B = (logits_BV.double().softmax(-1) * kept_BV).sum(-1)
        torch.testing.assert_close(drawn[3], mass_B.float(), atol=1e-5, rtol=0)
    assert_as_sample(logits_BV, settings(6, top_k=7))


def test_batch_invariant_beside_any_filters() -> None:
    """Draws do not depend on the filters of other rows.

    Rows without a filter equal those of the kernel without filters bitwise.
    """
    logits_BV = 2 * torch.randn(8, BLOCK + 300, generator=torch.Generator().manual_seed(1))
    knobs = settings(8)
    knobs["top_k_B"] = torch.tensor([0, 5, 0, 9, 0, 0, 3, 0])
    knobs["top_p_B"] = torch.tensor([1.0, 1.0, 0.7, 0.5, 1.0, 1.0, 0.9, 1.0])
    knobs["min_p_B"] = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.3, 0.0, 0.0])
    together = draw(logits_BV, keys(8), knobs)
    for row in range(8):
        order = torch.tensor([row, (row + 3) % 8])
        two_rows = draw(
            logits_BV[order], keys(8)[order], {name: x[order] for name, x in knobs.items()}
        )
        for name, x, y in zip(
            ("ids", "logprobs", "entropy", "mass"), two_rows, together, strict=True
        ):
            assert_bitwise_equal(x[:1], y[row : row + 1], name=f"{name} of row {row}")
    unfiltered = [0, 4, 7]
    lm_head = torch.eye(8), logits_BV.T.contiguous(), keys(8), knobs["temperature_B"]
    plain = linear_sample_triton(*(x.to(DEVICE) for x in lm_head), None)
    for x, y in zip(plain, together, strict=True):
        assert_bitwise_equal(x.cpu()[unfiltered], y[unfiltered], name="without a filter")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_row_reports_nan(bad: float) -> None:
    """A row with NaN or infinite logits reports NaN; its neighbours draw what they drew."""
    logits_BV = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    expected = draw(logits_BV, keys(3), settings(3, top_p=0.5))
    drawn = draw(logits_BV, keys(3), settings(3, top_p=0.5), torch.tensor([1.0, bad, 1.0]))
    assert drawn[1][1].isnan() and 0 <= drawn[0][1] < 40
    assert_bitwise_equal(drawn[0][::2], expected[0][::2], name="its neighbours")


def test_chi_square() -> None:
    """200 draws of one row under three filters follow its distribution.

    One seed in 10,000 would fail this. There are few draws, as the interpreter takes long for each.
    """
    num_draws = 200
    vocab = 60
    logits_V = 0.9 * torch.randn(vocab, generator=torch.Generator().manual_seed(4))
    filters = {"top_k": 12, "top_p": 0.9, "min_p": 0.2}
    rows = torch.zeros(num_draws, dtype=torch.int64)
    knobs = settings(num_draws, **filters)
    drawn = linear_sample(
        torch.ones(1, 1, device=DEVICE),
        logits_V[:, None].contiguous().to(DEVICE),
        keys(num_draws, seed=3).to(DEVICE),
        **{name: x.to(DEVICE) for name, x in knobs.items()},
        rows_B=rows.to(DEVICE),
        impl="triton",
    )
    kept = kept_by_hand(logits_V.double().tolist(), **filters)
    counts = drawn[0].cpu().bincount(minlength=vocab).double()
    tokens = torch.tensor(sorted(kept))
    probabilities = torch.tensor([kept[token] for token in sorted(kept)], dtype=torch.float64)
    assert counts.sum() == counts[tokens].sum() == num_draws
    expected = num_draws * probabilities / probabilities.sum()
    assert chance(((counts[tokens] - expected) ** 2 / expected).sum(), len(kept) - 1) > 1e-4
