"""Tests which sequences are grouped because they share pages, and what that saves."""

from __future__ import annotations

import pytest
import torch

from socpo_fast.ops.prefix_groups import MAX_MEMBERS, prefix_groups, ungrouped
from tools.kv_reads import CASES, Lengths, keys_read, saved_share


def test_who_is_grouped() -> None:
    """Sequences with the same first page are grouped, at most 16 together.

    They share as many pages as are full and the same in all of them.
    """
    table = torch.randperm(400).view(20, 20).int().numpy()
    siblings_ = [1, 3, 4, 7, 19]
    table[siblings_, :5] = table[1, :5]
    table[7, 3] = 399  # so only three pages are the same in all siblings
    lens = torch.full((20,), 200).numpy()
    groups = prefix_groups(table, lens, 16)
    assert groups[siblings_, 0].tolist() == [1] * 5 and groups[siblings_, 1].tolist() == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert groups[siblings_, 2].tolist() == [3 * 16] * 5
    assert groups[1, 3:9].tolist() == [*siblings_, -1]
    other_rows = [row for row in range(20) if row not in siblings_]
    assert (groups[other_rows] == ungrouped(20)[other_rows]).all()
    lens[4] = 47  # two full pages
    assert prefix_groups(table, lens, 16)[siblings_, 2].tolist() == [32] * 5
    lens[4] = 15
    assert prefix_groups(table, lens, 16)[[4, 1], 2].tolist() == [0, 3 * 16]
    table[:, 0] = 7  # now all 20 rows share their first page
    by_leader = prefix_groups(table, lens, 16)
    assert (by_leader[:, 3:] >= 0).sum(1).max() == MAX_MEMBERS == 16
    assert (
        sorted(row for group in by_leader for row in group[3:] if row >= 0 and group[1] == 0)[-1]
        == 19
    )
    assert len(prefix_groups(table[:0], lens[:0], 16)) == 0


def test_keys_are_counted_by_hand() -> None:
    """Three siblings share 96 tokens in splits of 32, and a fourth sequence shares none.

    Tiles take all three siblings, or two.
    """
    table = torch.arange(40).view(4, 10).int().numpy()
    table[1:3, :6] = table[0, :6]
    lens = torch.tensor([100, 97, 130, 50]).numpy()
    groups = prefix_groups(table, lens, 16)
    assert keys_read(groups, lens, 32, 16) == 100 + 1 + 34 + 50
    assert keys_read(groups, lens, 32, 2) == 100 + 1 + 130 + 50
    assert keys_read(ungrouped(4), lens, 32, 16) == lens.sum()


# An earlier design, in which only neighbours in aligned blocks of eight shared, saved 28, 13.4, 6.1
# and 0.5 % in a simulation of these cases.
@pytest.mark.parametrize(("case", "least"), list(zip(CASES, (0.27, 0.23, 0.15, 0.09), strict=True)))
def test_groups_save_keys(case: tuple[Lengths, bool], least: float) -> None:
    kind, has_second_attempts = case
    assert saved_share(kind, has_second_attempts=has_second_attempts) > least
