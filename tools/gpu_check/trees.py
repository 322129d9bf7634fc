"""Makes the trees of packed rows at which attention is measured, and two other layouts of them.

tree            p p p p a a b b        the prompt once, then each answer
copied rows     p p p p a a            one row for each rollout, as in most trainers
                p p p p b b
ancestors       p p p p | p p p p a a | p p p p b b      keys gathered for queries p p p p a a b b
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.tree_balance import visible_until_of_groups


@dataclass(frozen=True)
class TreeShape:
    """Equal groups, one after the other, each a prompt and its answers; sizes in tokens."""

    name: str
    prompt: int
    answers: tuple[int, ...]
    groups: int = 1

    @property
    def rows_of_a_group(self) -> int:
        return self.prompt + sum(self.answers)

    @property
    def num_rows(self) -> int:
        return self.groups * self.rows_of_a_group

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a visible key, each counted once, as in the tree."""
        segment_lens = (self.prompt, *self.answers)
        # Within a segment attention is causal; every answer row also sees the whole prompt.
        inside = sum(length * (length + 1) // 2 for length in segment_lens)
        return self.groups * (inside + self.prompt * sum(self.answers))


# Uneven answers, as real rollouts have them.
LENGTHS = (100, 128, 157, 185, 214, 242, 271, 300)
SHAPES = (
    TreeShape("8 x 300 behind 1000", 1000, (300,) * 8),
    TreeShape("8 x 1000 behind 1000", 1000, (1000,) * 8),
    TreeShape("8 x 100 to 300 behind 300", 300, LENGTHS),
    TreeShape("8 groups of the last", 300, LENGTHS, groups=8),
)
TINY_SHAPES = (TreeShape("2 x 7 behind 30", 30, (7, 7)), TreeShape("2 groups", 9, (5, 2), 2))


def visible_until_of(shape: TreeShape) -> Tensor:
    """Returns [T] int32: a prompt is visible until its group ends, an answer until it ends."""
    return visible_until_of_groups([(shape.prompt, shape.answers)] * shape.groups)


def segments_of(shape: TreeShape) -> list[tuple[range, range]]:
    """Returns (prompt rows before a segment, its own rows) of each prompt and answer, in order."""
    segments = []
    for group in range(shape.groups):
        group_start = group * shape.rows_of_a_group
        prompt = range(group_start, group_start + shape.prompt)
        segments.append((range(0), prompt))
        start_row = prompt.stop
        for length in shape.answers:
            segments.append((prompt, range(start_row, start_row + length)))
            start_row += length
    return segments


def copied_rows(shape: TreeShape) -> tuple[Tensor, Tensor]:
    """Returns (index_RL: the tree's row of each copy, 0 in padding; once_RL: 1 at first copies)."""
    rows = [[*prompt, *answer] for prompt, answer in segments_of(shape) if prompt]
    longest = max(map(len, rows))
    index_RL = torch.zeros(len(rows), longest, dtype=torch.int64)
    once_RL = torch.zeros(len(rows), longest)
    placed: set[int] = set()
    for number, row in enumerate(rows):
        index_RL[number, : len(row)] = torch.tensor(row)
        once_RL[number, : len(row)] = torch.tensor([float(r not in placed) for r in row])
        placed.update(row)
    return index_RL, once_RL


def ancestors(shape: TreeShape) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Returns (tree index of each key, int32 cu_seqlens of queries and of keys, both maxima)."""
    segments = segments_of(shape)
    keys = [[*prompt, *own_rows] for prompt, own_rows in segments]
    q_lens = [len(own_rows) for _, own_rows in segments]
    k_lens = list(map(len, keys))
    index = torch.tensor([row for rows in keys for row in rows])
    cu_seqlens = [
        torch.tensor([0, *seq_lens]).cumsum(0).to(torch.int32) for seq_lens in (q_lens, k_lens)
    ]
    return index, cu_seqlens[0], cu_seqlens[1], (max(q_lens), max(k_lens))
