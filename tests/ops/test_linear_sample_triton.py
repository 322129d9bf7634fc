"""Compares linear_sample's Triton kernels with `sample` over fp32 logits.

On a CPU the kernels run in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels import _noise
from socpo_fast.kernels.linear_sample import TILES, linear_sample_triton
from socpo_fast.ops.sample import noise_bits, sample_ref
from tests.helpers.error_rule import (
    assert_bitwise_equal,
    assert_equal_across_variants,
    assert_error_rule,
)
from tests.ops.test_sample import keys, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOKENS, WIDTH = TILES[0][torch.float32][:3]


def make_head(num_rows: int, vocab: int, width: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Returns hidden and weight, which fp16 holds exactly; logits are of size `scale`."""
    rng = torch.Generator().manual_seed(num_rows + vocab + width)
    hidden = torch.randn(num_rows, width, generator=rng) * scale / width**0.5
    return hidden.half().float(), torch.randn(vocab, width, generator=rng).half().float()


def draw(
    hidden: Tensor,
    weight: Tensor,
    row_keys: Tensor,
    temperature: Tensor,
    rows: Tensor | None = None,
) -> tuple:
    """Draws with the kernels; without filters the kept mass is 1."""
    tensors = (hidden, weight, row_keys, temperature, rows)
    *drawn, kept_mass = linear_sample_triton(
        *(None if x is None else x.to(DEVICE) for x in tensors)
    )
    assert (kept_mass == 1).all()
    return tuple(x.cpu() for x in drawn)


def expected(
    logits: Tensor, row_keys: Tensor, temperature: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the reference's tokens, and three values for the tokens that were drawn.

    These are log-probs, entropies, and by how much the best score leads the second best.
    """
    options = settings(row_keys.numel()) | {"temperature_B": temperature}
    drawn = sample_ref(logits, row_keys, **options)[0]
    z = logits / torch.where(temperature == 0, 1.0, temperature).to(logits.dtype)[:, None]
    log_softmax = z.log_softmax(-1)
    v = ((noise_bits(row_keys, logits.shape[1]).double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    scores = z - torch.where((temperature == 0)[:, None], 0.0, torch.log(-torch.log1p(-v)))
    best_two = (
        torch.cat([scores, torch.full_like(scores[:, :1], -torch.inf)], 1).topk(2, dim=1).values
    )
    return (
        drawn,
        log_softmax.gather(1, token_ids[:, None])[:, 0],
        -(log_softmax.exp() * log_softmax).sum(-1),
        best_two[:, 0] - best_two[:, 1],
    )


# Rows: one, a tile, a tile + 1. Vocabularies: one token, a tile, a tile + 1, a prime of many tiles.
# Widths: one, odd, a tile, a tile + 1. Temperatures in each case: 0, small, 1, large. Gathered
# hidden rows repeat and are out of order.
@pytest.mark.parametrize(
    ("num_draws", "vocab", "width"),
    [
        (1, 1, 1),
        (ROWS, TOKENS, WIDTH),
        (ROWS + 1, TOKENS + 1, WIDTH + 1),
        (9, 1031, 67),
        (3, 2 * TOKENS, 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gathered", [False, True])
def test_draws_what_sample_draws_from_the_logits(
    num_draws: int, vocab: int, width: int, dtype: torch.dtype, gathered: bool
) -> None:
    hidden, weight = make_head(num_draws, vocab, width)
    rows = torch.arange(num_draws).flip(0) // 2 if gathered else None
    temperature = torch.tensor([1.0, 0.0, 0.3, 1.7]).repeat(num_draws)[:num_draws]
    actual = draw(hidden.to(dtype), weight.to(dtype), keys(num_draws), temperature, rows)
    hidden = hidden if rows is None else hidden[rows]
    assert_draws(actual, hidden, weight, keys(num_draws), temperature)


def assert_draws(
    actual: tuple,
    hidden: Tensor,
    weight: Tensor,
    row_keys: Tensor,
    temperature: Tensor,
) -> None:
    """Asserts values by the error rule, and the reference's tokens.

    A token may differ where the two best scores are within rounding of each other.
    """
    logits = hidden @ weight.T
    logits_64 = hidden.double() @ weight.double().T
    drawn, *plain, _ = expected(logits, row_keys, temperature, actual[0])
    _, *truth, lead = expected(logits_64, row_keys, temperature, actual[0])
    for name, *triple in zip(("logprobs", "entropy"), actual[1:], plain, truth, strict=True):
        assert_error_rule(*triple, name=name, dtype=torch.float32)
    # Scores within rounding of each other may be in another order in fp32.
    is_clear = lead > 1e-4
    assert is_clear.float().mean() > 0.9
    assert_bitwise_equal(actual[0][is_clear], drawn[is_clear], name="token_ids")


def test_a_head_in_16_bits_is_read_as_fp32() -> None:
    """A 16-bit LM head beside fp32 hidden states computes like the same head in fp32.

    On a card it runs as three products of tf32, which are as right as fp32 but have other bits.
    """
    hidden, weight = make_head(5, 200, 40)
    wide, narrow = (draw(hidden, w, keys(5), torch.ones(5)) for w in (weight, weight.half()))
    assert_draws(narrow, hidden, weight, keys(5), torch.ones(5))
    for name, x, y in zip(("token_ids", "logprobs", "entropy"), narrow, wide, strict=True):
        assert_equal_across_variants(x, y, device=DEVICE, name=name)


@triton.jit
def noise_kernel(keys_ptr, noise_ptr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr):
    rows = tl.arange(0, BLOCK_B)
    token_ids = tl.arange(0, BLOCK_V)
    noise = _noise._noise_bits(tl.load(keys_ptr + rows), token_ids + 151000)
    tl.store(noise_ptr + rows[:, None] * BLOCK_V + token_ids[None, :], noise.to(tl.int64))


def test_noise_is_that_of_sample() -> None:
    noise = torch.empty(32, 128, dtype=torch.int64, device=DEVICE)
    noise_kernel[(1,)](keys(32).to(DEVICE), noise, BLOCK_B=32, BLOCK_V=128)
    assert_bitwise_equal(noise.cpu(), noise_bits(keys(32), 151128)[:, 151000:], name="noise")


def test_noise_near_both_ends() -> None:
    """Between the smallest noise, 2^-33, and the largest below 1 the kernel loses no digit.

    -log(1 - v) is compared with fp64 relatively.
    """
    v = torch.cat(
        [2.0 ** -torch.arange(1.0, 34.0), 1 - 2.0 ** -torch.arange(2.0, 25.0), torch.rand(8)]
    )
    result = torch.empty(64, device=DEVICE)
    minus_log1p_kernel[(1,)](v.to(DEVICE), result, BLOCK_V=64)
    truth = -torch.log1p(-v.double())
    # A compiled kernel divides by div.full, which may be off by two units in the last place.
    bound = 5e-7 if DEVICE == "cuda" else 4e-7
    assert ((result.cpu() - truth) / truth).abs().max() < bound


@triton.jit
def minus_log1p_kernel(v_ptr, result_ptr, BLOCK_V: tl.constexpr):
    lanes = tl.arange(0, BLOCK_V)
    tl.store(result_ptr + lanes, _noise._minus_log1p(tl.load(v_ptr + lanes)))


@pytest.mark.slow
def test_chi_square() -> None:
    """102,400 draws of 24 tokens from one row follow its distribution.

    One seed in 10,000 would fail this.
    """
    num_draws = 102_400
    temperature = 0.7
    hidden, weight = make_head(3, 24, 16, scale=1.0)
    rows = torch.full((num_draws,), 2)
    token_ids, logprobs, _ = draw(
        hidden, weight, keys(num_draws, seed=3), torch.full((num_draws,), temperature), rows
    )
    log_softmax = (hidden[2].double() @ weight.double().T / temperature).log_softmax(-1)
    assert (logprobs - log_softmax[token_ids]).abs().max() < 1e-5
    expected_counts = num_draws * log_softmax.exp()
    assert expected_counts.min() > 5
    statistic = ((token_ids.bincount(minlength=24) - expected_counts) ** 2 / expected_counts).sum()
    assert torch.special.gammaincc(torch.tensor(23 / 2).double(), statistic / 2) > 1e-4


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    hidden = torch.ones(2, 1)
    weight = torch.zeros(5 * TOKENS, 1)
    weight[[TOKENS + 3, TOKENS + 7, 4 * TOKENS]] = 2.0
    token_ids, logprobs, _ = draw(hidden, weight, keys(2), torch.zeros(2))
    assert token_ids.tolist() == [TOKENS + 3] * 2
    torch.testing.assert_close(logprobs, (hidden @ weight.T).log_softmax(-1)[:, TOKENS + 3])
    assert draw(hidden, torch.zeros(5 * TOKENS, 1), keys(2), torch.zeros(2))[0].tolist() == [0, 0]


@pytest.mark.parametrize("at", [0, ROWS + 2])
def test_batch_invariant(at: int) -> None:
    """A row drawn alone equals it in the batch, in the first tile of rows and in the second."""
    hidden, weight = make_head(ROWS + 5, 300, 48)
    temperature = torch.full((ROWS + 5,), 0.8)
    batch = draw(hidden, weight, keys(ROWS + 5), temperature)
    row = slice(at, at + 1)
    actual = draw(hidden[row], weight, keys(ROWS + 5)[row], temperature[row])
    for name, x, y in zip(("token_ids", "logprobs", "entropy"), actual, batch, strict=True):
        assert_bitwise_equal(x, y[row], name=name)


def test_impossible_tokens_are_never_drawn() -> None:
    """Tokens at -inf are never drawn and do not change log-probs and entropies of the others.

    They fill the first tile and much of the second.
    """
    hidden, weight = make_head(8, 4 * TOKENS, 8)
    hidden[:, 0] = 1.0
    weight[:, 0] = 0.0
    weight[: TOKENS + 9, 0] = -torch.inf
    token_ids, logprobs, entropy = draw(hidden, weight, keys(8), torch.ones(8))
    logits = hidden.double() @ weight[TOKENS + 9 :].double().T
    log_softmax = logits.log_softmax(-1)
    assert token_ids.min() >= TOKENS + 9
    assert (
        logprobs - log_softmax.gather(1, (token_ids - TOKENS - 9)[:, None])[:, 0]
    ).abs().max() < 1e-5
    assert (entropy + (log_softmax.exp() * log_softmax).sum(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_row_reports_nan(bad: float) -> None:
    """A row that is not finite has log-prob NaN and some token of the vocabulary."""
    hidden, weight = make_head(3, 130, 8)
    hidden[1, 0] = bad
    weight[:, 0] = 1.0
    token_ids, logprobs, _ = draw(hidden, weight, keys(3), torch.tensor([1.0, 1.0, 0.0]))
    assert logprobs.isnan().tolist() == [False, True, False]
    assert ((token_ids >= 0) & (token_ids < 130)).all()


def test_no_draws() -> None:
    hidden, weight = make_head(3, 10, 8)
    assert [x.shape for x in draw(hidden, weight, keys(0), torch.ones(0), torch.arange(0))] == [
        (0,)
    ] * 3
