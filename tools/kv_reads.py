"""How many keys decode reads, and how many groups named by the host save; counted, not timed.

    python -m tools.kv_reads

32 questions with 8 rollouts each, prompts of 300 tokens in pages of 32; every 16th step is counted
from the block table, the lengths and the groups, as kernels/paged_decode.py goes through them. A
second attempt goes on behind 130 tokens of guidance.
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
EVERY = 16  # steps
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
    """Keys that one KV head's programs read in a step."""
    leaves_B = groups_BG[:, 1] % members_of_tile != 0  # where its split is shared
    num_shared_splits_B = groups_BG[:, 2] // split
    return int((seq_lens_B - leaves_B * num_shared_splits_B * split).sum())


def saved_share(kind: Lengths, *, has_second_attempts: bool, members_of_tile: int = 16) -> float:
    """The share of all keys of a batch that siblings do not read again."""
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
    width = -(-int(totals_B.max()) // PAGE_SIZE)
    table_BM = np.arange(rows * width, dtype=np.int32).reshape(QUESTIONS, GROUP_SIZE, width)
    table_BM[:, :, : PROMPT // PAGE_SIZE] = table_BM[:, :1, : PROMPT // PAGE_SIZE].copy()
    table_BM = table_BM.reshape(rows, width)
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
