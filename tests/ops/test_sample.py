"""Tests sample: the filters, and that a draw depends on nothing but its own row and key.

test_sample_distribution.py tests the distribution that it draws from.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import available_impls, row_key, row_keys, sample
from socpo_fast.ops.sample import kept_tokens, noise_bits
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule

IMPLS = [
    "ref",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            "cpp" not in available_impls().values(), reason="extension not built"
        ),
    ),
]


def keys(num_rows: int, seed: int = 0) -> Tensor:
    """Returns the keys of some rows, which differ in one field."""
    fields = torch.zeros(num_rows, 6, dtype=torch.int64)
    fields[:, 0] = seed
    fields[:, 5] = torch.arange(num_rows)
    return row_keys(fields)


def settings(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict:
    """Returns the same sampling settings for every row."""
    return {
        "temperature_B": torch.full((num_rows,), temperature),
        "top_k_B": torch.full((num_rows,), top_k, dtype=torch.int64),
        "top_p_B": torch.full((num_rows,), top_p),
        "min_p_B": torch.full((num_rows,), min_p),
    }


# Vocabularies: one token, less than a vector, primes below and above a chunk of 512, whole chunks,
# the largest in use.
@pytest.mark.parametrize("vocab", [1, 7, 509, 1031, 4096, 151936])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_p": 0.95},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
)
@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
def test_cpp_draws_what_ref_draws(vocab: int, filters: dict) -> None:
    """Tokens are equal; log-probs and kept mass keep the error rule."""
    num_rows = 4 if vocab > 10_000 else 64
    generator = torch.Generator().manual_seed(vocab)
    logits_BV = 4 * torch.randn(num_rows, vocab, generator=generator)
    logits_BV[0, 1:] = -torch.inf  # all mass on one token
    logits_BV[1] = 0  # all logits are equal
    logits_BV[2, vocab // 2] += 50  # nearly all mass on one token
    plain = sample(logits_BV, keys(num_rows), **settings(num_rows, **filters), impl="ref")
    actual = sample(logits_BV, keys(num_rows), **settings(num_rows, **filters), impl="cpp")
    assert_bitwise_equal(actual[0], plain[0], name="token_ids")
    z_BV = logits_BV.double() / (filters.get("temperature", 1.0) or 1.0)
    truth_B = z_BV.log_softmax(-1).gather(-1, plain[0][:, None])[:, 0]
    assert_error_rule(actual[1], plain[1], truth_B, name="logprobs", dtype=torch.float32)
    assert_error_rule(actual[2], plain[2], plain[2].double(), name="kept_mass", dtype=torch.float32)


@pytest.mark.parametrize("field", range(6))
def test_rows_of_different_keys_draw_independently(field: int) -> None:
    """Rows whose keys differ in one field draw independent tokens.

    Pairs draw from 16 equal tokens. Chi-square of the 256 pairs has 255 degrees of freedom, and
    exceeds 330 with a probability of 0.001.
    """
    num_pairs = 51_200
    fields = torch.zeros(2 * num_pairs, 6, dtype=torch.int64)
    fields[:, 5 if field == 0 else 0] = torch.arange(num_pairs).repeat_interleave(2)
    fields[1::2, field] += 1 if field == 0 else num_pairs
    draws = sample(torch.zeros(2 * num_pairs, 16), row_keys(fields), **settings(2 * num_pairs))[0]
    pairs = (draws[0::2] * 16 + draws[1::2]).bincount(minlength=256)
    expected = num_pairs / 256
    assert ((pairs - expected) ** 2 / expected).sum() < 330


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}])
def test_batch_invariant(impl: str, filters: dict) -> None:
    logits_BV = torch.randn(9, 1031, generator=torch.Generator().manual_seed(1))
    batch = sample(logits_BV, keys(9), **settings(9, **filters), impl=impl)
    for b in range(9):
        actual = sample(
            logits_BV[b : b + 1], keys(9)[b : b + 1], **settings(1, **filters), impl=impl
        )
        for name, x, y in zip(("token_ids", "logprobs", "kept_mass"), actual, batch, strict=True):
            assert_bitwise_equal(x, y[b : b + 1], name=f"{name} of row {b}")


@pytest.mark.parametrize("impl", IMPLS)
def test_thread_invariant(impl: str) -> None:
    logits_BV = torch.randn(33, 1031, generator=torch.Generator().manual_seed(2))
    old_num_threads = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(sample(logits_BV, keys(33), **settings(33, top_p=0.9), impl=impl))
    torch.set_num_threads(old_num_threads)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert_bitwise_equal(x, y, name="other number of threads")


# Kept tokens worked out by hand. In the last case all are equal, and the lowest ids are kept.
@pytest.mark.parametrize(
    ("probs", "filters", "kept"),
    [
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2}, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3], {"top_p": 0.65}, [1, 3]),  # .4 < .65, .7 reaches it
        # top_p counts within the top_k: .4 is .57 of .4 + .3
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 2, "top_p": 0.55}, [1]),
        ([0.1, 0.4, 0.2, 0.3], {"min_p": 0.45}, [1, 2, 3]),  # at least .18
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 3, "top_p": 0.99, "min_p": 0.6}, [1, 3]),
        ([0.1, 0.4, 0.2, 0.3], {"top_k": 9}, [0, 1, 2, 3]),
        ([0.25, 0.25, 0.25, 0.25], {"top_k": 3}, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_filters_keep_the_right_tokens(
    probs: list[float], filters: dict, kept: list[int], impl: str
) -> None:
    mask_1V = kept_tokens(
        torch.tensor([probs]),
        *[settings(1, **filters)[name] for name in ("top_k_B", "top_p_B", "min_p_B")],
    )
    assert mask_1V.nonzero()[:, 1].tolist() == kept
    num_draws = 2_000
    logits_BV = torch.tensor(probs).log().expand(num_draws, -1)
    token_ids_B, logprobs_B, mass_B = sample(
        logits_BV, keys(num_draws), **settings(num_draws, **filters), impl=impl
    )
    assert token_ids_B.unique().tolist() == kept
    torch.testing.assert_close(mass_B, torch.full((num_draws,), sum(probs[i] for i in kept)))
    # Log-probs are those of the whole vocabulary, whatever the filters keep.
    torch.testing.assert_close(logprobs_B, torch.tensor(probs).log()[token_ids_B])


@pytest.mark.parametrize("impl", IMPLS)
def test_greedy_takes_first_max_at_temperature_1(impl: str) -> None:
    """At temperature 0 the first largest logit is drawn, with its log-prob at temperature 1."""
    logits_BV = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    token_ids_B, logprobs_B, mass_B = sample(
        logits_BV, keys(1), **settings(1, temperature=0.0), impl=impl
    )
    assert token_ids_B.item() == 1 and mass_B.item() == 1
    torch.testing.assert_close(logprobs_B, logits_BV.log_softmax(-1)[:, 1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_broken_row_is_nan_and_others_unchanged(impl: str, bad: float | None) -> None:
    logits_BV = torch.randn(3, 100, generator=torch.Generator().manual_seed(3))
    unbroken = sample(logits_BV, keys(3), **settings(3, top_p=0.9), impl=impl)
    broken_BV = logits_BV.clone()
    broken_BV[1] = -torch.inf
    if bad is not None:
        broken_BV[1, 50] = bad
    for filters in ({"top_p": 0.9}, {}):
        token_ids_B, logprobs_B, _ = sample(broken_BV, keys(3), **settings(3, **filters), impl=impl)
        assert logprobs_B.isnan().tolist() == [False, True, False] and 0 <= token_ids_B[1] < 100
        if filters:
            assert_bitwise_equal(token_ids_B[::2], unbroken[0][::2], name="other rows")


def test_no_two_tokens_of_a_row_share_their_noise() -> None:
    bits_BV = noise_bits(keys(2), 100_000)
    assert bits_BV[0].unique().numel() == 100_000
    assert bits_BV.min() >= 0 and bits_BV.max() < 2**32


def test_keys_and_noise_are_frozen() -> None:
    """Keys and noise never change between versions, as stored rollouts replay only then.

    The expected numbers were computed with Python's unbounded integers.
    """
    key = row_key(1, 2, 3, 4, 5, 6)
    assert key == 846242072549302847
    assert row_keys(torch.tensor([[0] * 6, [1, 2, 3, 4, 5, 6]]))[1] == key
    assert noise_bits(torch.tensor([key]), 3).tolist() == [[804311207, 3330180524, 1381995943]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature_B must be finite and >= 0"),
        ({"top_p": 0.0}, r"top_p_B must be in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p_B must be in \[0, 1\)"),
        ({"top_k": -1}, "top_k_B must be in"),
    ],
)
def test_parameters_out_of_range_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"sample: {message}"):
        sample(torch.zeros(2, 5), keys(2), **settings(2, **change))


def test_unknown_impl_and_narrow_keys_are_refused() -> None:
    with pytest.raises(
        ValueError, match="sample: impl must be one of auto, ref, cpp, got 'triton'"
    ):
        sample(torch.zeros(2, 5), keys(2), **settings(2), impl="triton")
    with pytest.raises(ValueError, match="row_keys_B must be int64"):
        sample(torch.zeros(2, 5), keys(2).int(), **settings(2))


@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
def test_the_registered_op_keeps_its_schema() -> None:
    arguments = (torch.randn(3, 50), keys(3), *settings(3).values())
    torch.library.opcheck(torch.ops.socpo.sample.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("filters", [(0, 1.0), (3, 0.9)])
def test_cold_rows(temperature: float, filters: tuple[int, float]) -> None:
    """At a small temperature the largest logit wins with log-prob 0, however it rounds."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn((8, 3001), generator=generator) * 5
    logits_BV[:, 7] = 30.3
    token_ids, logprobs, kept_mass = sample(
        logits_BV,
        torch.arange(8),
        temperature_B=torch.full((8,), temperature),
        top_k_B=torch.full((8,), filters[0]),
        top_p_B=torch.full((8,), filters[1]),
        min_p_B=torch.zeros(8),
    )
    assert token_ids.tolist() == [7] * 8
    assert logprobs.abs().max() == 0
    assert (kept_mass - 1).abs().max() < 1e-6
