"""LM head and draw in one pass on a GPU: the [N, V] logits exist only as tiles.

Read top-down: linear_sample_triton launches _sample_tile_kernel, where a program multiplies a tile
of rows by a tile of the vocabulary and reduces each row of it to six numbers, and
_merge_tiles_kernel, which reduces those; where there are filters the logits are kept, and
filtered_draw.py draws again. _noise.py has the draw's noise, ops/sample.py says what is drawn.

Departures from the textbook. The noise is a hash of row key and token id, bit for bit that of
ops/sample.py. A tile of the vocabulary is a split of its own, so nothing runs on from tile to tile;
tiles are merged in order and the lowest of equal scores wins. What a row gives depends on that row
alone.
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
    """Rows, tokens and hidden units that a program multiplies at once."""

    rows: int
    tokens: int
    width: int
    num_warps: int
    merged_rows: int = 1  # of one program that merges tiles; the interpreter is slow by the program
    max_registers: int | None = None  # of a thread, at sizes that are multiples of 16; None: any


_FP32 = {torch.float32: SampleTile(32, 64, 32, 4)}
_HALVES = dict.fromkeys((torch.float16, torch.bfloat16), SampleTile(64, 128, 64, 8))
# With 128 registers two programs share an SM, so that one multiplies while the other draws.
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
    """Token ids [B] int64; log-probs, entropies and kept mass [B] fp32, of draws from the LM head.

    Args: hidden fp32, bf16 or fp16 [T, D]; weight [V, D], the same or another of these, converted
    after it is read; the last stride of both is 1; temperature fp32, 0 is greedy; rows int64, each
    draw's row of hidden (None: its own number); filters as of filtered_draw, None: no draw has one.
    Rows whose filters are off draw the same either way.
    """
    num_draws = row_keys_B.numel()
    (vocab, width) = weight_VD.shape
    tile = TILES[architecture_of(hidden_TD)][hidden_TD.dtype]
    num_tiles = triton.cdiv(vocab, tile.tokens)
    # At other sizes addresses take more registers, and a bound would spill them.
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
    """Both kernels: with and without rows, even and odd sizes, fp32 over a head in bf16; merging at
    V = 262144.
    """
    results: dict[str, torch.dtype | None] = {"ids_ptr": torch.int32, "values_ptr": torch.float32}
    for architecture in ARCHITECTURES:
        for dtype, tile in TILES[architecture].items():
            low = torch.bfloat16 if dtype == torch.float32 else dtype
            for label, weight, rows, odd, kept in (
                ("even sizes", dtype, None, False, None),
                ("even sizes, filters", dtype, None, False, torch.float32),
                ("rows, even sizes", dtype, torch.int64, False, None),
                ("rows, 16-bit head", low, torch.int64, False, None),
                ("odd sizes", dtype, None, True, None),
            ):
                pointers = results | {
                    "hidden_ptr": dtype,
                    "weight_ptr": weight,
                    "rows_ptr": rows,
                    "z_ptr": kept,
                }
                yield AotConfig(
                    _sample_tile_kernel,
                    architecture,
                    dtype,
                    label,
                    tile.num_warps,
                    pointers | {"row_keys_ptr": torch.int64, "temperature_ptr": torch.float32},
                    {"BLOCK_B": tile.rows, "BLOCK_V": tile.tokens, "BLOCK_D": tile.width},
                    odd,
                    options={"maxnreg": None if odd else tile.max_registers},
                )
            pointers = results | {
                "token_ids_ptr": torch.int64,
                "logprobs_ptr": torch.float32,
                "entropy_ptr": torch.float32,
            }
            constants = {
                "BLOCK_B": tile.merged_rows,
                "BLOCK_N": triton.next_power_of_2(triton.cdiv(262144, tile.tokens)),
            }
            of = (_merge_tiles_kernel, architecture, dtype)
            for label, kept in (("V = 262144", None), ("V = 262144, filters", torch.float32)):
                yield AotConfig(*of, label, _MERGE_WARPS, pointers | {"sums_ptr": kept}, constants)


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
    """Values of a row of the tile: largest z, sum of exp(d), sum of d exp(d) for d = z - largest;
    best score, its z.
    """
    draws = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    is_draw = draws < num_draws
    rows = draws if rows_ptr is None else tl.load(rows_ptr + draws, is_draw, other=0)
    token_ids = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_token = token_ids < vocab
    units = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hb + units[None, :]
    weight_ptrs = weight_ptr + token_ids.to(tl.int64)[:, None] * stride_wv + units[None, :]
    # As in kernels/_attend.py: only fp32 minds, and a weight in 16 bits is exact in tf32.
    PRECISION: tl.constexpr = (
        "tf32x3" if weight_ptr.dtype.element_ty != hidden_ptr.dtype.element_ty else "ieee"
    )
    z = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, width, BLOCK_D):
        inside = (start + units < width)[None, :]
        hidden = tl.load(hidden_ptrs + start, is_draw[:, None] & inside, other=0.0)
        weight = tl.load(weight_ptrs + start, is_token[:, None] & inside, other=0.0).to(
            hidden.dtype
        )
        z = tl.dot(hidden, tl.trans(weight), z, input_precision=PRECISION)

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
    highest = tl.max(z, 1)
    below = z - tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    terms = tl.exp(below)
    total = tl.sum(terms, 1)
    weighted = tl.sum(terms * tl.where(below == float("-inf"), 0.0, below), 1)

    noise = gumbel(tl.load(row_keys_ptr + draws, is_draw, other=0), token_ids)
    scores = z + tl.where(is_greedy[:, None], 0.0, noise)
    best = tl.max(scores, 1)
    none = (tl.program_id(1) + 1) * BLOCK_V
    best_id = tl.min(
        tl.where(is_token[None, :] & (scores == best[:, None]), token_ids[None, :], none), 1
    )
    best_id = tl.where(best_id == none, none - BLOCK_V, best_id)  # NaN: some token
    best_z = tl.max(tl.where(token_ids[None, :] == best_id[:, None], z, float("-inf")), 1)

    places = draws.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    step = tl.num_programs(1).to(tl.int64) * num_draws
    tl.store(ids_ptr + places, best_id, is_draw)
    tl.store(values_ptr + places, highest, is_draw)
    tl.store(values_ptr + places + step, total, is_draw)
    tl.store(values_ptr + places + 2 * step, weighted, is_draw)
    tl.store(values_ptr + places + 3 * step, best, is_draw)
    tl.store(values_ptr + places + 4 * step, best_z, is_draw)


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
    draws = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tiles = tl.arange(0, BLOCK_N)
    is_draw = draws < num_draws
    begins = tl.minimum(draws, num_draws - 1).to(tl.int64) * num_tiles
    places = begins[:, None] + tiles[None, :]
    wanted = (tiles < num_tiles)[None, :]
    step = tl.cast(num_tiles, tl.int64) * num_draws
    highest_of_tile = tl.load(values_ptr + places, wanted, other=float("-inf"))
    total_of_tile = tl.load(values_ptr + places + step, wanted, other=0.0)
    weighted_of_tile = tl.load(values_ptr + places + 2 * step, wanted, other=0.0)
    highest = tl.max(highest_of_tile, 1)
    below = highest_of_tile - tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    factors = tl.exp(below)
    total = tl.sum(factors * total_of_tile, 1)
    below = tl.where(below == float("-inf"), 0.0, below)
    log_total = tl.log(total)
    entropy = log_total - tl.sum(factors * (weighted_of_tile + below * total_of_tile), 1) / total

    best_of_tile = tl.load(values_ptr + places + 3 * step, wanted, other=float("-inf"))
    is_best = wanted & (best_of_tile == tl.max(best_of_tile, 1)[:, None])
    winner = tl.min(tl.where(is_best, tiles[None, :], num_tiles), 1)
    place = begins + tl.where(winner == num_tiles, 0, winner)  # NaN: some token
    tl.store(token_ids_ptr + draws, tl.load(ids_ptr + place).to(tl.int64), is_draw)
    tl.store(
        logprobs_ptr + draws,
        (tl.load(values_ptr + place + 4 * step) - highest) - log_total,
        is_draw,
    )
    tl.store(entropy_ptr + draws, entropy, is_draw)
    if sums_ptr is not None:
        tl.store(sums_ptr + draws, highest, is_draw)
        tl.store(sums_ptr + num_draws + draws, log_total, is_draw)
