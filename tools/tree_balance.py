"""How evenly the programs of tree attention's dK and dV are long, computed from their plan alone.

A length is a number of tile products: blocks of queries that a program of one KV head goes through.
The longest over the mean says how uneven programs are; what a card with so many multiprocessors
takes, over an even division, says whether that matters, as programs start longest first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK, program_lengths
from socpo_fast.ops import TreeMask
from socpo_fast.ops.tree_attention import num_pairs

MULTIPROCESSORS = 132  # of an H100
KV_HEADS = 8  # of Qwen3
_ANSWERS = [round(100 + idx * 200 / 7) for idx in range(8)]  # 100 to 300
# Name -> groups: the prompt, and its answers.
MICROBATCHES = {
    "prompt 300, 8 answers of 100 to 300": [(300, _ANSWERS)],
    "prompt 1000, 8 answers of 300": [(1000, [300] * 8)],
    "8 groups of prompt 300, answers of 100 to 300": [(300, _ANSWERS)] * 8,
}


def visible_until_of_groups(groups: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """visible_until_T of groups behind one another, each a prompt and its answers."""
    until: list[int] = []
    for prompt, answers in groups:
        until += [len(until) + prompt + sum(answers)] * prompt
        for answer in answers:
            until += [len(until) + answer] * answer
    return torch.tensor(until, dtype=torch.int32)


def makespan(lengths: Sequence[int], num_workers: int) -> int:
    """When the last worker is done, if each takes the next program as it becomes free."""
    busy = [0] * num_workers
    for length in lengths:
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy)


def balance_of(lengths_P: Tensor) -> dict[str, float]:
    """Of programs as they start, each once a KV head: two ratios that are 1 at best."""
    lengths = [length for length in lengths_P.tolist() for _ in range(KV_HEADS)]
    mean = sum(lengths) / len(lengths)
    even = sum(lengths) / MULTIPROCESSORS
    time = makespan(lengths, MULTIPROCESSORS)
    return {"longest_over_mean": max(lengths) / mean, "time_over_even": time / even}


def tile_shares(mask: TreeMask) -> dict[str, float]:
    """Of the tiles that are visited: those with a mask, and how many of their pairs are seen."""
    num_masked = int(mask.key_blocks_NM[:, 1].sum())
    num_tiles = int(mask.key_blocks_NM[:, 2].sum())
    seen = num_pairs(mask.visible_until_T) / (num_tiles * ROWS_PER_BLOCK**2)
    return {"masked": num_masked / num_tiles, "pairs_seen": seen}


def tree_balances() -> list[dict[str, object]]:
    """Prints a row a microbatch, and returns the numbers."""
    print(f"dK and dV of tree attention on {MULTIPROCESSORS} multiprocessors, {KV_HEADS} KV heads:")
    balances: list[dict[str, object]] = []
    for name, groups in MICROBATCHES.items():
        until_T = visible_until_of_groups(groups)
        mask = TreeMask.of(until_T)
        cut_P, whole_N = program_lengths(mask.query_ranges_P7)
        cut = balance_of(cut_P)
        whole = balance_of(whole_N)
        rows = f"  {name} ({len(until_T)} rows)"
        ratios = ", ".join(
            f"{what.replace('_over_', ' / ')} {cut[what]:.2f} (uncut {whole[what]:.2f})"
            for what in cut
        )
        shares = tile_shares(mask)
        tiles = f"{shares['masked']:.0%} of tiles masked, {shares['pairs_seen']:.0%} of pairs seen"
        print(f"{rows:62}{ratios}; {tiles}")
        numbers = {"rows": len(until_T), "cut": cut, "uncut": whole, "tiles": shares}
        balances.append({"microbatch": name, **numbers})
    return balances
