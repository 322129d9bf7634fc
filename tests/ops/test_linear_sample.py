"""Tests linear_sample, which draws without storing the logits.

It must draw what `sample` draws from the same logits, whatever else is drawn beside it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import available_impls, linear, linear_sample, sample
from socpo_fast.ops.sample import kept_tokens
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.ops.test_sample import IMPLS, keys, settings

NAMES = ("token_ids", "logprobs", "entropy", "kept_mass")
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


def problem(
    num_rows: int, vocab: int, width: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Returns hidden states and the weight of an LM head."""
    generator = torch.Generator().manual_seed(vocab + num_rows)
    hidden, weight = (
        torch.randn(shape, generator=generator) for shape in ((num_rows, width), (vocab, width))
    )
    return hidden, (weight * 3 / width**0.5).to(dtype)


def from_logits(logits_V: Tensor) -> tuple[Tensor, Tensor]:
    """Returns hidden and weight of an LM head with exactly these logits in its one row."""
    return torch.ones(1, 1), logits_V[:, None].contiguous()


def mixed_settings(num_draws: int) -> dict[str, Tensor]:
    """Returns all of FILTERS in turn, and two temperatures."""
    each = [settings(1, **FILTERS[b % 4]) for b in range(num_draws)]
    mixed = {
        name: torch.cat([settings_of_draw[name] for settings_of_draw in each]) for name in each[0]
    }
    mixed["temperature_B"][::5] = 1.3
    return mixed


def pick(knobs: dict[str, Tensor], draws: Tensor | slice) -> dict[str, Tensor]:
    """Returns the settings of some draws."""
    return {name: knob[draws] for name, knob in knobs.items()}


# Vocabularies: one token, less than a vector, one less than a tile of 768, a tile, one more, a
# prime, several tiles.
@pytest.mark.parametrize("vocab", [1, 7, 767, 768, 769, 1031, 4096])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_cpp_draws_what_sample_draws(vocab: int, filters: dict, impl: str) -> None:
    """Tokens, log-probs and kept mass are bitwise those of `sample` on the logits of `linear`."""
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = problem(40, vocab, dtype=dtype)
        token_ids, logprobs, _, mass = linear_sample(
            hidden, weight, keys(40), **settings(40, **filters), impl=impl
        )
        expected = sample(
            linear(hidden, weight, impl=impl), keys(40), **settings(40, **filters), impl=impl
        )
        for name, x, y in zip(
            ("token_ids", "logprobs", "mass"), (token_ids, logprobs, mass), expected, strict=True
        ):
            assert_bitwise_equal(x, y, name=name)


@pytest.mark.parametrize("vocab", [7, 769, 1031, 49152])
@pytest.mark.parametrize("filters", [*FILTERS, {"temperature": 1.7}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_cpp_is_as_right_as_torch(vocab: int, filters: dict, impl: str) -> None:
    num_rows = 3 if vocab > 10_000 else 20
    hidden, weight = problem(num_rows, vocab)
    knobs = settings(num_rows, **filters)
    token_ids, *actual = linear_sample(hidden, weight, keys(num_rows), **knobs, impl=impl)
    plain_and_truth = []
    for dtype in (torch.float32, torch.float64):
        z = (hidden.to(dtype) @ weight.T.to(dtype)) / (filters.get("temperature", 1.0) or 1.0)
        logprobs = z.log_softmax(-1)
        keep = kept_tokens(logprobs.exp(), knobs["top_k_B"], knobs["top_p_B"], knobs["min_p_B"])
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        plain_and_truth.append(
            (logprobs.gather(1, token_ids[:, None])[:, 0], entropy, (logprobs.exp() * keep).sum(-1))
        )
    for name, *three in zip(NAMES[1:], actual, *plain_and_truth, strict=True):
        assert_error_rule(*three, name=name, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_batch_and_thread_invariant(impl: str, dtype: torch.dtype) -> None:
    """A draw is the same alone, in another order and beside other draws of its row.

    The rows make several blocks, and run with 1, 2 and 3 threads.
    """
    hidden, weight = problem(300, 1031, dtype=dtype)
    # Some hidden rows are drawn from once, some twice, and row 4 another 70 times.
    rows = torch.cat([torch.arange(300), torch.arange(0, 300, 2), torch.full((70,), 4)])
    num_draws = len(rows)
    knobs = mixed_settings(num_draws)
    row_keys = keys(num_draws)
    all_draws = linear_sample(hidden, weight, row_keys, **knobs, rows_B=rows, impl=impl)
    shuffled = torch.randperm(num_draws, generator=torch.Generator().manual_seed(0))
    selections = [
        shuffled,
        shuffled[:17],
        torch.arange(300, 520),
        *torch.arange(0, num_draws, 40).split(1),
    ]
    for draws in selections:
        result = linear_sample(
            hidden, weight, row_keys[draws], **pick(knobs, draws), rows_B=rows[draws], impl=impl
        )
        for name, x, y in zip(NAMES, result, all_draws, strict=True):
            assert_bitwise_equal(x, y[draws], name=f"{name} of {len(draws)} draws")
    without_rows = linear_sample(
        hidden, weight, row_keys[:300], **pick(knobs, slice(300)), impl=impl
    )
    old_num_threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            result = linear_sample(hidden, weight, row_keys, **knobs, rows_B=rows, impl=impl)
            for name, x, y, z in zip(NAMES, result, all_draws, without_rows, strict=True):
                assert_bitwise_equal(x, y, name=f"{name} with {num_threads} threads")
                assert_bitwise_equal(z, y[:300], name=f"{name} without rows_B")
    finally:
        torch.set_num_threads(old_num_threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_and_impossible_tokens(impl: str) -> None:
    """Greedy takes the first of equal logits of all tiles; tiles of only -inf do not matter."""
    logits = torch.full((3000,), -torch.inf)
    logits[[900, 1700, 2500]] = torch.tensor([1.0, 2.0, 2.0])
    result = linear_sample(*from_logits(logits), keys(1), **settings(1, temperature=0.0), impl=impl)
    truth = logits[[900, 1700, 2500]].double().log_softmax(0)
    assert result[0].item() == 1700
    assert result[1].item() == pytest.approx(truth[1].item(), abs=1e-6)
    assert result[2].item() == pytest.approx(-(truth.exp() * truth).sum().item(), abs=1e-6)
    rows = torch.zeros(200, dtype=torch.int64)
    drawn = linear_sample(*from_logits(logits), keys(200), **settings(200), rows_B=rows, impl=impl)
    assert drawn[0].unique().tolist() == [900, 1700, 2500] and drawn[1].isfinite().all()
    kept = linear_sample(
        *from_logits(logits), keys(200), **settings(200, top_k=1), rows_B=rows, impl=impl
    )
    assert kept[0].unique().tolist() == [1700]
    torch.testing.assert_close(kept[3], truth[1].exp().float().expand(200))


@pytest.mark.parametrize("temperature", [1e-2, 1e-6, 1e-9, 1e-42])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_cold_rows(impl: str, temperature: float) -> None:
    """Near temperature 0 every draw is the largest logit, with log-prob 0."""
    logits = 5 * torch.randn(3001, generator=torch.Generator().manual_seed(0))
    logits[1507] = 30.3
    for filters in ({}, {"top_k": 3, "top_p": 0.9}):
        knobs = settings(8, temperature=temperature, **filters)
        rows = torch.zeros(8, dtype=torch.int64)
        token_ids, *numbers = linear_sample(
            *from_logits(logits), keys(8), **knobs, rows_B=rows, impl=impl
        )
        assert token_ids.tolist() == [1507] * 8
        assert [x.unique().tolist() for x in numbers] == [[0.0], [0.0], [1.0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_broken_row_reports_nan(impl: str, bad: float | None) -> None:
    """A row with NaN, inf or only -inf reports NaN and some token of the vocabulary."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    if bad is None:
        logits[:] = -torch.inf
    else:
        logits[950] = bad
    for filters in FILTERS:
        token_ids, *numbers = linear_sample(
            *from_logits(logits), keys(1), **settings(1, **filters), impl=impl
        )
        assert all(x.isnan().all() for x in numbers) and 0 <= token_ids.item() < 1000


@pytest.mark.parametrize("impl", IMPLS)
def test_broken_row_leaves_other_rows_unchanged(impl: str) -> None:
    hidden, weight = problem(9, 1000)
    unbroken = linear_sample(hidden, weight, keys(9), **mixed_settings(9), impl=impl)
    hidden[4, 3] = torch.nan
    broken = linear_sample(hidden, weight, keys(9), **mixed_settings(9), impl=impl)
    is_other = torch.arange(9) != 4
    for name, x, y in zip(NAMES, broken, unbroken, strict=True):
        assert_bitwise_equal(x[is_other], y[is_other], name=f"{name} of other rows")
    assert broken[1].isnan().tolist() == (~is_other).tolist()


def test_filtered_draws_of_triton_are_those_of_ref() -> None:
    """The public function notices that there are filters and draws what the reference draws."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [x.to(device) for x in (*problem(5, 700), keys(5))]
    options = {name: x.to(device) for name, x in settings(5, top_k=9).items()}
    drawn, plain = (linear_sample(*inputs, **options, impl=impl) for impl in ("triton", "ref"))
    assert_bitwise_equal(drawn[0], plain[0], name="token_ids")
    for name, x, y in zip(NAMES[1:], drawn[1:], plain[1:], strict=True):
        torch.testing.assert_close(
            x, y, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_draws_and_strided_rows(impl: str) -> None:
    hidden, weight = problem(6, 800)
    none = linear_sample(hidden[:0], weight, keys(0), **settings(0), impl=impl)
    assert [x.tolist() for x in none] == [[]] * 4
    none = linear_sample(hidden, weight, keys(0), **settings(0), rows_B=torch.arange(0), impl=impl)
    assert [x.dtype for x in none] == [torch.int64, *[torch.float32] * 3]
    strided = linear_sample(hidden[::2], weight, keys(3), **mixed_settings(3), impl=impl)
    dense = linear_sample(hidden[::2].clone(), weight, keys(3), **mixed_settings(3), impl=impl)
    for name, x, y in zip(NAMES, strided, dense, strict=True):
        assert_bitwise_equal(x, y, name=name)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"weight_VD": torch.zeros(9, 5)}, "weight_VD must be"),
        ({"weight_VD": torch.zeros(9, 8, dtype=torch.float16)}, "float32/bfloat16"),
        ({"weight_VD": torch.zeros(8, 9).t()}, "contiguous"),
        ({"row_keys_B": keys(2)}, "B without rows_B must be T, got 2"),
        ({"rows_B": torch.tensor([0, 1, 3])}, r"rows_B must be in \[0, 3\), got 3 at 2"),
        (
            {"temperature_B": torch.tensor([1.0, -1.0, 1.0])},
            "temperature_B must be finite and >= 0, got -1.0 at 1",
        ),
        ({"top_p_B": torch.tensor([1.0, 0.0, 1.0])}, r"top_p_B must be in \(0, 1\], got 0.0 at 1"),
        ({"impl": "fast"}, "impl must be one of auto, ref, cpp, triton, got 'fast'"),
    ],
)
def test_bad_input_is_named(change: dict, rule: str) -> None:
    good = {
        "hidden_TD": torch.zeros(3, 8),
        "weight_VD": torch.zeros(9, 8),
        "row_keys_B": keys(3),
        **settings(3),
    }
    if "row_keys_B" in change:
        good |= settings(2)
    with pytest.raises(ValueError, match=f"linear_sample: .*{rule}"):
        linear_sample(**(good | change))


@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
def test_opcheck() -> None:
    for dtype, rows in ((torch.float32, None), (torch.bfloat16, torch.tensor([2, 0, 2]))):
        arguments = (*problem(3, 50, dtype=dtype), keys(3), *settings(3).values(), rows)
        torch.library.opcheck(torch.ops.socpo.linear_sample, arguments)
