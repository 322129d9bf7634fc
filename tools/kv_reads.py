"""Counts the keys that decode reads, and how many of them prefix groups save.

    python -m tools.kv_reads

The batch has 32 questions with 8 rollouts each and prompts of 300 tokens in pages of 32. Rollouts
of one question share their prompt's pages; the host passes such groups to the kernel, which then
reads their common keys once. Every 16th decode step is counted from the block table, the lengths
and the groups, in the way in which kernels/paged_decode.py visits them. A second attempt follows
130 tokens of guidance. Nothing is timed. Read saved_share, then keys_read.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from socpo_fast.kernels.paged_decode import DECODE_TILES
from socpo_fast.ops.prefix_groups import prefix_groups

QUESTIONS = 32
GROUP_SIZE = 8
PROMPT = 300
PAGE_SIZE = 32
GUIDANCE = 130
EVERY = 16  # count one decode step in so many
Lengths = Literal["equal", "uniform", "exponential"]
CASES: tuple[tuple[Lengths, bool], ...] = (
    ("equal", False),
    ("uniform", False),
    ("uniform", True),
    ("exponential", True),
)


def keys_read(
    groups_BG: np.ndarray, seq_lens_B: np.ndarray, split: int, members_of_tile: int
) -> int:
    """Returns how many keys the programs of one KV head read in one decode step."""
    # Column 1 is a row's index in its group, column 2 the number of tokens that the group shares. A
    # tile takes `members_of_tile` rows: the first one reads the shared splits, the others skip
    # them.
    skips_shared_B = groups_BG[:, 1] % members_of_tile != 0
    num_shared_splits_B = groups_BG[:, 2] // split
    return int((seq_lens_B - skips_shared_B * num_shared_splits_B * split).sum())


def saved_share(kind: Lengths, *, has_second_attempts: bool, members_of_tile: int = 16) -> float:
    """Returns the share of a batch's keys that need not be read, as a sibling has read them."""
    rng = np.random.default_rng(0)
    rows = QUESTIONS * GROUP_SIZE
    draws = {
        "equal": lambda: np.full(rows, 1000),
        "uniform": lambda: rng.integers(500, 1501, rows),
        "exponential": lambda: np.clip(rng.exponential(600, rows), 20, 2000).astype(int),
    }
    totals_B = PROMPT + draws[kind]()
    if has_second_attempts:
        totals_B += rng.integers(0, 2, rows) * (GUIDANCE + draws[kind]())
    num_pages = -(-int(totals_B.max()) // PAGE_SIZE)
    table_BM = np.arange(rows * num_pages, dtype=np.int32).reshape(QUESTIONS, GROUP_SIZE, num_pages)
    # Siblings share the pages that their prompt fills; each has its own copy of the last, partly
    # filled one.
    table_BM[:, :, : PROMPT // PAGE_SIZE] = table_BM[:, :1, : PROMPT // PAGE_SIZE].copy()
    table_BM = table_BM.reshape(rows, num_pages)
    split = DECODE_TILES[90][torch.bfloat16].split
    num_read = num_all = 0
    for length in range(PROMPT + 1, int(totals_B.max()) + 1, EVERY):
        live = np.flatnonzero(totals_B >= length)
        seq_lens_B = np.full(len(live), length)
        groups_BG = prefix_groups(table_BM[live], seq_lens_B, PAGE_SIZE)
        num_read += keys_read(groups_BG, seq_lens_B, split, members_of_tile)
        num_all += int(seq_lens_B.sum())
    return 1 - num_read / num_all


def main() -> None:
    for kind, has_second_attempts in CASES:
        share = saved_share(kind, has_second_attempts=has_second_attempts)
        print(f"{kind}{', second attempts' if has_second_attempts else ''}: {share:.1%} saved")


if __name__ == "__main__":
    main()
