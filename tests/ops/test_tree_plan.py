"""Tests which tiles the kernels of tree attention visit: each that some row sees, once.

The balance of their programs is worked out by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels._tree_plan import (
    MIN_CHUNK,
    NUM_EXTRA,
    ROWS_PER_BLOCK,
    max_slots,
    tiles_per_program,
)
from socpo_fast.ops import TreeMask
from tests.ops.test_tree_attention import int32, random_tree
from tools.tree_balance import balance_of, makespan, tile_shares, visible_until_of_groups

GROUPS = [(300, [100, 150, 200, 290]), (64, [64, 128]), (1000, [300] * 3)]
TREES = {
    "one row": int32([1]),
    "a block": random_tree(ROWS_PER_BLOCK, seed=0),
    "short and long paths": random_tree(1000, seed=1),
    "groups": visible_until_of_groups(GROUPS),
    "one long row": int32([64 * 150] * (64 * 150)),
}


def tiles_of(until_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two [N, N] bool tensors, blocks of queries by blocks of keys.

    They say where some row sees some key, and where all rows see all keys.
    """
    num_blocks = -(-len(until_T) // ROWS_PER_BLOCK)
    size = num_blocks * ROWS_PER_BLOCK
    padded = torch.cat((until_T.long(), until_T.new_zeros(size - len(until_T)).long()))
    rows = torch.arange(size)
    rows[len(until_T) :] = -1  # padding sees nothing
    is_seen = (torch.arange(size) <= rows[:, None]) & (rows[:, None] < padded)
    tiles = is_seen.view(num_blocks, ROWS_PER_BLOCK, num_blocks, ROWS_PER_BLOCK).transpose(1, 2)
    return tiles.flatten(2).any(-1), tiles.flatten(2).all(-1)


@pytest.mark.parametrize("name", TREES)
def test_queries_visit_what_they_see_once(name: str) -> None:
    """Each block of queries lists every block of keys that it sees once, masked ones first."""
    sees_any, sees_all = tiles_of(TREES[name])
    table = TreeMask.of(TREES[name]).key_blocks_NM
    assert sorted(table[:, 0].tolist()) == list(range(len(sees_any)))
    assert table[:, 2].diff().le(0).all(), "longest first"
    for query, num_masked, num_seen, *keys in table.tolist():
        masked = keys[:num_masked]
        full = keys[num_masked:num_seen]
        assert sorted(masked + full) == sees_any[query].nonzero().flatten().tolist()
        assert all(sees_all[query, key] for key in full)


@pytest.mark.parametrize("name", TREES)
def test_keys_are_visited_once_by_all_who_see_them(name: str) -> None:
    """All programs of a block of keys together visit each block of queries that sees it once.

    A block of keys that is cut into parts has a slot for the partial sum of each part.
    """
    sees_any, sees_all = tiles_of(TREES[name])
    num_blocks = len(sees_any)
    num_slots = 0
    ranges = TreeMask.of(TREES[name]).query_ranges_P7
    assert len(ranges) == num_blocks + NUM_EXTRA
    visits = torch.zeros(sees_any.shape, dtype=torch.int64)
    for key, begin, end, full_begin, full_end, slot, num_parts in ranges.tolist():
        if begin == end:
            continue
        assert key <= begin <= full_begin <= full_end <= end <= num_blocks
        visits[begin:end, key] += 1
        assert sees_all[full_begin:full_end, key].all()
        assert (slot >= 0) == (num_parts > 1)
        num_slots += num_parts > 1
    assert visits.max() == 1 and visits[sees_any].min() == 1
    slots = ranges[ranges[:, 5] >= 0]
    slots = slots[slots[:, 1] < slots[:, 2]]
    assert sorted(slots[:, 5].tolist()) == list(range(num_slots))
    assert num_slots <= max_slots(len(TREES[name]))
    for row in slots.tolist():  # a block's first slot has the block's own queries
        first_slot = row[5] - slots[(slots[:, 0] == row[0]) & (slots[:, 5] <= row[5])].shape[0] + 1
        assert slots[slots[:, 5] == first_slot][0, 1] == row[0]
    assert (ranges[:, 2] - ranges[:, 1]).diff().le(0).all(), "longest first"


def test_a_plan_by_hand() -> None:
    """Three blocks: a prompt that all see, an answer that ends with its block, one of one row."""
    until_T = int32([129] * 64 + [128] * 64 + [129])
    mask = TreeMask.of(until_T)
    lists = [(b, m, n, *keys[:n]) for b, m, n, *keys in mask.key_blocks_NM.tolist()]
    # The last row is the only one in its block, so every tile of it needs a mask.
    assert lists == [(1, 1, 2, 1, 0), (2, 2, 2, 0, 2), (0, 1, 1, 0)]
    assert mask.query_ranges_P7[:4].tolist() == [
        [0, 0, 3, 1, 2, -1, 1],
        [1, 1, 2, 2, 2, -1, 1],
        [2, 2, 3, 3, 3, -1, 1],
        [2, 3, 3, 3, 3, -1, 1],
    ]


def test_balance_by_hand() -> None:
    """A prompt of one block and 15 answers of one block each.

    The prompt is seen in 16 tiles, which are cut in two parts; each answer is seen in one.
    """
    until_T = visible_until_of_groups([(64, [64] * 15)])
    assert MIN_CHUNK == 8
    cut_P, whole_N = tiles_per_program(TreeMask.of(until_T).query_ranges_P7)
    assert cut_P.tolist() == [8, 8, *[1] * 15]
    assert whole_N.tolist() == [16, *[1] * 15]
    # With 8 KV heads on 132 multiprocessors the longest program takes more than an even share.
    balance = balance_of(cut_P)
    assert balance["longest_over_mean"] == pytest.approx(8 / (31 / 17))
    assert balance["time_over_even"] == pytest.approx(8 / (8 * 31 / 132))
    assert balance_of(whole_N)["longest_over_mean"] == pytest.approx(16 / (31 / 16))
    assert makespan([5, 4, 3, 3], 2) == 8


def test_slots_are_no_more_than_cuts_can_need() -> None:
    """With 9 blocks only the first column is longer than a chunk, so it alone needs slots.

    With many blocks the number of cuts is bounded.
    """
    assert max_slots(0) == max_slots(MIN_CHUNK * ROWS_PER_BLOCK) == 0
    assert max_slots(MIN_CHUNK * ROWS_PER_BLOCK + 1) == 2
    assert max_slots((MIN_CHUNK + 1) * ROWS_PER_BLOCK + 1) == 4
    assert max_slots(10**6) == 2 * NUM_EXTRA


def test_shares_of_tiles() -> None:
    """Two blocks of one sequence: two tiles on the diagonal are masked, one below is not."""
    shares = tile_shares(TreeMask.of(int32([128] * 128)))
    assert shares["masked"] == pytest.approx(2 / 3)
    assert shares["pairs_seen"] == pytest.approx(128 * 129 / 2 / (3 * 64 * 64))
