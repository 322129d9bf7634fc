"""Computes how evenly work is divided among the programs of tree attention's dK and dV.

Everything follows from the plan of a launch; nothing is run. The length of a program is the number
of query blocks that it visits, one tile product each, for one KV head. Two ratios are printed:
- the longest program over the mean one says how uneven the programs are;
- the time of all programs on a card's multiprocessors, over that of an even division, says whether
  this matters. Programs start longest first, so uneven ones often fill the gaps.

A microbatch is a row of groups, each a prompt and the answers that share it:

    p p p p a a b b b | p p p a a
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK, tiles_per_program
from socpo_fast.ops import TreeMask
from socpo_fast.ops.tree_attention import num_pairs

MULTIPROCESSORS = 132  # of an H100
KV_HEADS = 8  # of Qwen3
# Eight answers of 100 to 300 tokens.
_ANSWERS = [round(100 + idx * 200 / 7) for idx in range(8)]
# Name -> groups, each (tokens of the prompt, tokens of its answers).
MICROBATCHES = {
    "prompt 300, 8 answers of 100 to 300": [(300, _ANSWERS)],
    "prompt 1000, 8 answers of 300": [(1000, [300] * 8)],
    "8 groups of prompt 300, answers of 100 to 300": [(300, _ANSWERS)] * 8,
}


def visible_until_of_groups(groups: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Returns visible_until_T of groups packed in a row, each a prompt and its answers."""
    until: list[int] = []
    for prompt, answers in groups:
        # A prompt is seen by every later row of its group, an answer only by its own later rows.
        until += [len(until) + prompt + sum(answers)] * prompt
        for answer in answers:
            until += [len(until) + answer] * answer
    return torch.tensor(until, dtype=torch.int32)


def makespan(program_lens: Sequence[int], num_workers: int) -> int:
    """Returns when the last worker is done, if each takes the next program when it is free."""
    free_at = [0] * num_workers
    for program_len in program_lens:
        heapq.heapreplace(free_at, free_at[0] + program_len)
    return max(free_at)


def balance_of(lengths_P: Tensor) -> dict[str, float]:
    """Returns the two ratios of the module's docstring; both are 1 at best."""
    program_lens = [program_len for program_len in lengths_P.tolist() for _ in range(KV_HEADS)]
    mean = sum(program_lens) / len(program_lens)
    even_time = sum(program_lens) / MULTIPROCESSORS
    total_time = makespan(program_lens, MULTIPROCESSORS)
    return {"longest_over_mean": max(program_lens) / mean, "time_over_even": total_time / even_time}


def tile_shares(mask: TreeMask) -> dict[str, float]:
    """Returns the shares of visited tiles that need a mask, and of their pairs that are seen."""
    num_masked = int(mask.key_blocks_NM[:, 1].sum())
    num_tiles = int(mask.key_blocks_NM[:, 2].sum())
    seen_share = num_pairs(mask.visible_until_T) / (num_tiles * ROWS_PER_BLOCK**2)
    return {"masked": num_masked / num_tiles, "pairs_seen": seen_share}


def tree_balances() -> list[dict[str, object]]:
    """Prints a row for each microbatch, and returns the numbers."""
    print(f"dK and dV of tree attention on {MULTIPROCESSORS} multiprocessors, {KV_HEADS} KV heads:")
    balances: list[dict[str, object]] = []
    for name, groups in MICROBATCHES.items():
        until_T = visible_until_of_groups(groups)
        mask = TreeMask.of(until_T)
        # As shipped, a key block with many queries is cut into several programs; then without cuts.
        cut_P, whole_N = tiles_per_program(mask.query_ranges_P7)
        cut = balance_of(cut_P)
        uncut = balance_of(whole_N)
        label = f"  {name} ({len(until_T)} rows)"
        ratios = ", ".join(
            f"{key.replace('_over_', ' / ')} {cut[key]:.2f} (uncut {uncut[key]:.2f})" for key in cut
        )
        shares = tile_shares(mask)
        tiles = f"{shares['masked']:.0%} of tiles masked, {shares['pairs_seen']:.0%} of pairs seen"
        print(f"{label:62}{ratios}; {tiles}")
        numbers = {"rows": len(until_T), "cut": cut, "uncut": uncut, "tiles": shares}
        balances.append({"microbatch": name, **numbers})
    return balances
