"""Trees of packed rows at which attention is measured, and the same rows as others lay them out.

tree            p p p p a a b b        prompt once, then each answer
copied rows     p p p p a a            a row a rollout, as most trainers have them
                p p p p b b
ancestors       p p p p | p p p p a a | p p p p b b      keys alone, for queries p p p p a a b b
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.tree_balance import visible_until_of_groups


@dataclass(frozen=True)
class TreeShape:
    """Equal groups side by side: a prompt, and answers behind it."""

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
        """Of a query and a key that it sees, each once however often others compute it."""
        lengths = (self.prompt, *self.answers)
        inside = sum(length * (length + 1) // 2 for length in lengths)
        return self.groups * (inside + self.prompt * sum(self.answers))


LENGTHS = (100, 128, 157, 185, 214, 242, 271, 300)
SHAPES = (
    TreeShape("8 x 300 behind 1000", 1000, (300,) * 8),
    TreeShape("8 x 1000 behind 1000", 1000, (1000,) * 8),
    TreeShape("8 x 100 to 300 behind 300", 300, LENGTHS),
    TreeShape("8 groups of the last", 300, LENGTHS, groups=8),
)
TINY_SHAPES = (TreeShape("2 x 7 behind 30", 30, (7, 7)), TreeShape("2 groups", 9, (5, 2), 2))


def visible_until_of(shape: TreeShape) -> Tensor:
    """[T] int32: a prompt is seen to the end of its group, an answer to its own."""
    return visible_until_of_groups([(shape.prompt, shape.answers)] * shape.groups)


def segments_of(shape: TreeShape) -> list[tuple[range, range]]:
    """(Rows of a prompt that an answer stands behind, its own rows); a prompt is behind nothing."""
    segments = []
    for group in range(shape.groups):
        start = group * shape.rows_of_a_group
        prompt = range(start, start + shape.prompt)
        segments.append((range(0), prompt))
        row = prompt.stop
        for length in shape.answers:
            segments.append((prompt, range(row, row + length)))
            row += length
    return segments


def copied_rows(shape: TreeShape) -> tuple[Tensor, Tensor]:
    """(index_RL: the tree's row at each place, padded behind; once_RL: its first copy)."""
    rows = [[*prompt, *own] for prompt, own in segments_of(shape) if prompt]
    longest = max(map(len, rows))
    index_RL = torch.zeros(len(rows), longest, dtype=torch.int64)
    once_RL = torch.zeros(len(rows), longest)
    seen: set[int] = set()
    for number, row in enumerate(rows):
        index_RL[number, : len(row)] = torch.tensor(row)
        once_RL[number, : len(row)] = torch.tensor([float(r not in seen) for r in row])
        seen.update(row)
    return index_RL, once_RL


def ancestors(shape: TreeShape) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """(index of each key in the tree, int32 ends of queries and of keys, longest of both)."""
    segments = segments_of(shape)
    keys = [[*prompt, *own] for prompt, own in segments]
    lengths_q = [len(own) for _, own in segments]
    lengths_k = list(map(len, keys))
    index = torch.tensor([row for rows in keys for row in rows])
    ends = [
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    return index, ends[0], ends[1], (max(lengths_q), max(lengths_k))
