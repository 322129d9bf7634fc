"""Multiplies by the LM head and draws tokens on a GPU; the [B, V] logits exist only as tiles.

Read top-down: linear_sample_triton launches two kernels. _noise.py has the noise of a draw,
ops/sample.py defines what is drawn.

    vocabulary ->     tile 0      tile 1      tile 2    ..
    row 0           6 numbers   6 numbers   6 numbers   ..  -> token id, log-prob, entropy
    row 1           6 numbers   6 numbers   6 numbers   ..  -> token id, log-prob, entropy
                    <------- _sample_tile_kernel ------->   _merge_tiles_kernel

A program of the first kernel multiplies a tile of rows by a tile of the vocabulary. If there are
filters, it also stores the logits, and filtered_draw.py draws again for the rows that have one.

Departures from the textbook. The noise is a hash of row key and token id, bit for bit that of
ops/sample.py. Tiles of the vocabulary are independent of one another. They are merged in order, and
of equal scores the one with the lowest token id wins. So results are batch-invariant.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from socpo_fast.kernels._launch import (
    ARCHITECTURES,
    INTERPRETER,
    AotConfig,
    AotConfigs,
    architecture_of,
)
from socpo_fast.kernels._noise import gumbel
from socpo_fast.kernels.filtered_draw import Filters, filtered_draw


class SampleTile(NamedTuple):
    """The numbers of rows, tokens and hidden units that a program multiplies at once."""

    rows: int
    tokens: int
    width: int
    num_warps: int
    # Rows of a program that merges. The interpreter has many: its time depends on the number of
    # programs.
    merged_rows: int = 1
    max_registers: int | None = (
        None  # of a thread, if all sizes are multiples of 16; None: no limit
    )


_FP32 = {torch.float32: SampleTile(32, 64, 32, 4)}
_HALVES = dict.fromkeys((torch.float16, torch.bfloat16), SampleTile(64, 128, 64, 8))
# With at most 128 registers, two programs fit on an SM: one multiplies while the other draws.
_HALVES_90 = {dtype: tile._replace(max_registers=128) for dtype, tile in _HALVES.items()}
TILES: dict[int, dict[torch.dtype, SampleTile]] = {
    INTERPRETER: dict.fromkeys((*_FP32, *_HALVES), SampleTile(128, 64, 32, 1, merged_rows=128)),
    **dict.fromkeys(ARCHITECTURES, _FP32 | _HALVES),
    90: _FP32 | _HALVES_90,
}
_MERGE_WARPS = 8


def linear_sample_triton(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    row_keys_B: Tensor,
    temperature_B: Tensor,
    rows_B: Tensor | None,
    filters: Filters | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns token ids [B] int64 drawn from the LM head; log-probs, entropies, kept mass [B] fp32.

    Args:
        hidden_TD:     [T, D] fp32, bf16 or fp16; the last stride is 1.
        weight_VD:     [V, D], the same or another of these dtypes, converted after it is read; the
                       last stride is 1.
        row_keys_B:    [B] int64, the noise key of each draw.
        temperature_B: [B] fp32, 0 is greedy.
        rows_B:        [B] int64, the row of hidden_TD of each draw; None: draw b uses row b.
        filters:       None: no draw has a filter. A row whose filters are off draws the same token
                       with and without them.
    """
    num_draws = row_keys_B.numel()
    (vocab, width) = weight_VD.shape
    tile = TILES[architecture_of(hidden_TD)][hidden_TD.dtype]
    num_tiles = triton.cdiv(vocab, tile.tokens)
    # At other sizes, addresses take more registers, and a limit would make a thread spill.
    is_even = all(n % 16 == 0 for n in (vocab, width, hidden_TD.stride(0), weight_VD.stride(0)))
    ids_BN = row_keys_B.new_empty((num_draws, num_tiles), dtype=torch.int32)
    values_5BN = row_keys_B.new_empty((5, num_draws, num_tiles), dtype=torch.float32)
    token_ids_B = row_keys_B.new_empty(num_draws)
    logprobs_B = values_5BN.new_empty(num_draws)
    entropy_B = values_5BN.new_empty(num_draws)
    kept_mass_B = torch.ones_like(logprobs_B)
    draws = token_ids_B, logprobs_B, entropy_B, kept_mass_B
    if num_draws == 0:
        return draws
    z_BV = None if filters is None else values_5BN.new_empty((num_draws, vocab))
    sums_2B = None if filters is None else values_5BN.new_empty((2, num_draws))
    row_keys_B = row_keys_B.contiguous()
    temperature_B = temperature_B.contiguous()
    with torch.cuda.device_of(hidden_TD):
        _sample_tile_kernel[triton.cdiv(num_draws, tile.rows), num_tiles](
            hidden_TD,
            weight_VD,
            row_keys_B,
            temperature_B,
            None if rows_B is None else rows_B.contiguous(),
            ids_BN,
            values_5BN,
            z_BV,
            num_draws,
            vocab,
            width,
            hidden_TD.stride(0),
            weight_VD.stride(0),
            BLOCK_B=tile.rows,
            BLOCK_V=tile.tokens,
            BLOCK_D=tile.width,
            num_warps=tile.num_warps,
            maxnreg=tile.max_registers if is_even else None,
        )
        _merge_tiles_kernel[(triton.cdiv(num_draws, tile.merged_rows),)](
            ids_BN,
            values_5BN,
            token_ids_B,
            logprobs_B,
            entropy_B,
            sums_2B,
            num_draws,
            num_tiles,
            BLOCK_B=tile.merged_rows,
            BLOCK_N=triton.next_power_of_2(num_tiles),
            num_warps=_MERGE_WARPS,
        )
        if filters is not None and z_BV is not None and sums_2B is not None:
            filtered_draw(
                z_BV,
                sums_2B,
                row_keys_B,
                temperature_B,
                filters,
                (token_ids_B, logprobs_B, kept_mass_B),
            )
    return draws


def aot_configs() -> AotConfigs:
    """Yields both kernels: with and without rows, even and odd sizes, a 16-bit head; V = 262144."""
    result_pointers: dict[str, torch.dtype | None] = {
        "ids_ptr": torch.int32,
        "values_ptr": torch.float32,
    }
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            low_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
            for label, weight, rows, odd_sizes, z_dtype in (
                ("even sizes", dtype, None, False, None),
                ("even sizes, filters", dtype, None, False, torch.float32),
                ("rows, even sizes", dtype, torch.int64, False, None),
                ("rows, 16-bit head", low_dtype, torch.int64, False, None),
                ("odd sizes", dtype, None, True, None),
            ):
                pointers = result_pointers | {
                    "hidden_ptr": dtype,
                    "weight_ptr": weight,
                    "rows_ptr": rows,
                    "z_ptr": z_dtype,
                }
                yield AotConfig(
                    _sample_tile_kernel,
                    architecture,
                    dtype,
                    label,
                    tile.num_warps,
                    pointers | {"row_keys_ptr": torch.int64, "temperature_ptr": torch.float32},
                    {"BLOCK_B": tile.rows, "BLOCK_V": tile.tokens, "BLOCK_D": tile.width},
                    odd_sizes,
                    options={"maxnreg": None if odd_sizes else tile.max_registers},
                )
            pointers = result_pointers | {
                "token_ids_ptr": torch.int64,
                "logprobs_ptr": torch.float32,
                "entropy_ptr": torch.float32,
            }
            constants = {
                "BLOCK_B": tile.merged_rows,
                "BLOCK_N": triton.next_power_of_2(triton.cdiv(262144, tile.tokens)),
            }
            kernel_and_dtype = (_merge_tiles_kernel, architecture, dtype)
            for label, z_dtype in (("V = 262144", None), ("V = 262144, filters", torch.float32)):
                yield AotConfig(
                    *kernel_and_dtype,
                    label,
                    _MERGE_WARPS,
                    pointers | {"sums_ptr": z_dtype},
                    constants,
                )


@triton.jit(
    do_not_specialize=["num_draws"],
    do_not_specialize_on_alignment=["row_keys_ptr", "temperature_ptr", "rows_ptr"],
)
def _sample_tile_kernel(
    hidden_ptr,
    weight_ptr,
    row_keys_ptr,
    temperature_ptr,
    rows_ptr,
    ids_ptr,
    values_ptr,
    z_ptr,
    num_draws,
    vocab,
    width,
    stride_hb,
    stride_wv,
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores six numbers for each row of a tile: the id of the best token and five values.

        z = hidden . weight / temperature      d = z - largest z      score = z + noise

    The values [5, B, tiles]: largest z; sum of exp(d); sum of d exp(d); best score; z of the best.
    """
    draws = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_draw = draws < num_draws
    rows = draws if rows_ptr is None else tl.load(rows_ptr + draws, is_draw, other=0)
    token_ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = token_ids < vocab
    offs_d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hb + offs_d[None, :]
    weight_ptrs = weight_ptr + token_ids.to(tl.int64)[:, None] * stride_wv + offs_d[None, :]
    # This matters for fp32 only. As in kernels/_attend.py, tf32 holds a 16-bit weight exactly.
    PRECISION: tl.constexpr = (
        "tf32x3" if weight_ptr.dtype.element_ty != hidden_ptr.dtype.element_ty else "ieee"
    )
    z = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        is_unit = (start + offs_d < width)[None, :]
        hidden = tl.load(hidden_ptrs + start, is_draw[:, None] & is_unit, other=0.0)
        weight = tl.load(weight_ptrs + start, is_token[:, None] & is_unit, other=0.0).to(
            hidden.dtype
        )
        z = tl.dot(hidden, tl.trans(weight), z, input_precision=PRECISION)

    # Tokens beyond the vocabulary become -inf, so that they win no draw and add nothing to a sum.
    temperature = tl.load(temperature_ptr + draws, is_draw, other=1.0)
    is_greedy = temperature == 0
    z = tl.where(
        is_token[None, :],
        z * tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))[:, None],
        float("-inf"),
    )
    if z_ptr is not None:
        z_ptrs = z_ptr + draws.to(tl.int64)[:, None] * vocab + token_ids[None, :]
        tl.store(z_ptrs, z, is_draw[:, None] & is_token[None, :])
    m_i = tl.max(z, 1)
    d = z - tl.where(m_i == float("-inf"), 0.0, m_i)[:, None]
    exp_d = tl.exp(d)
    l_i = tl.sum(exp_d, 1)
    weighted = tl.sum(exp_d * tl.where(d == float("-inf"), 0.0, d), 1)

    noise = gumbel(tl.load(row_keys_ptr + draws, is_draw, other=0), token_ids)
    scores = z + tl.where(is_greedy[:, None], 0.0, noise)
    # The lowest id of equal scores wins. The id behind the tile stands for none, which is the case
    # only if the scores hold NaN: then the tile's first token is taken.
    best = tl.max(scores, 1)
    no_id = (tl.program_id(1) + 1) * BLOCK_V
    best_id = tl.min(
        tl.where(is_token[None, :] & (scores == best[:, None]), token_ids[None, :], no_id), 1
    )
    best_id = tl.where(best_id == no_id, no_id - BLOCK_V, best_id)
    best_z = tl.max(tl.where(token_ids[None, :] == best_id[:, None], z, float("-inf")), 1)

    offs = draws.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    stride_values = tl.num_programs(1).to(tl.int64) * num_draws
    tl.store(ids_ptr + offs, best_id, is_draw)
    tl.store(values_ptr + offs, m_i, is_draw)
    tl.store(values_ptr + offs + stride_values, l_i, is_draw)
    tl.store(values_ptr + offs + 2 * stride_values, weighted, is_draw)
    tl.store(values_ptr + offs + 3 * stride_values, best, is_draw)
    tl.store(values_ptr + offs + 4 * stride_values, best_z, is_draw)


@triton.jit(do_not_specialize=["num_draws", "num_tiles"])
def _merge_tiles_kernel(
    ids_ptr,
    values_ptr,
    token_ids_ptr,
    logprobs_ptr,
    entropy_ptr,
    sums_ptr,
    num_draws,
    num_tiles,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merges the tiles of a row; all of them are held at once, BLOCK_N is the next power of two."""
    draws = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tiles = tl.arange(0, BLOCK_N)
    is_draw = draws < num_draws
    row_offs = tl.minimum(draws, num_draws - 1).to(tl.int64) * num_tiles
    offs = row_offs[:, None] + tiles[None, :]
    mask = (tiles < num_tiles)[None, :]
    stride_values = tl.cast(num_tiles, tl.int64) * num_draws
    m_tiles = tl.load(values_ptr + offs, mask, other=float("-inf"))
    l_tiles = tl.load(values_ptr + offs + stride_values, mask, other=0.0)
    weighted_tiles = tl.load(values_ptr + offs + 2 * stride_values, mask, other=0.0)
    # Rescales the sums of each tile from its own largest z to that of the row. A tile whose logits
    # are all -inf has the factor 0.
    m_i = tl.max(m_tiles, 1)
    d = m_tiles - tl.where(m_i == float("-inf"), 0.0, m_i)[:, None]
    alpha = tl.exp(d)
    l_i = tl.sum(alpha * l_tiles, 1)
    d = tl.where(d == float("-inf"), 0.0, d)
    log_total = tl.log(l_i)
    entropy = log_total - tl.sum(alpha * (weighted_tiles + d * l_tiles), 1) / l_i

    best_tiles = tl.load(values_ptr + offs + 3 * stride_values, mask, other=float("-inf"))
    is_best = mask & (best_tiles == tl.max(best_tiles, 1)[:, None])
    # The first tile with the best score has the lowest token id of those with it.
    winner = tl.min(tl.where(is_best, tiles[None, :], num_tiles), 1)
    winner_offs = row_offs + tl.where(winner == num_tiles, 0, winner)  # all scores NaN: tile 0
    tl.store(token_ids_ptr + draws, tl.load(ids_ptr + winner_offs).to(tl.int64), is_draw)
    tl.store(
        logprobs_ptr + draws,
        (tl.load(values_ptr + winner_offs + 4 * stride_values) - m_i) - log_total,
        is_draw,
    )
    tl.store(entropy_ptr + draws, entropy, is_draw)
    if sums_ptr is not None:
        tl.store(sums_ptr + draws, m_i, is_draw)
        tl.store(sums_ptr + num_draws + draws, log_total, is_draw)
