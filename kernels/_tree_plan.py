"""Which tiles of (queries, keys) the kernels of tree attention visit, found once for a microbatch.

Read top-down: plan_tree -> _plan_queries, _plan_keys. All of it is torch on whatever device the
tree lies on, with sizes that depend on the number of rows only: the host never waits to know what
is in it. Rows are taken in blocks of ROWS_PER_BLOCK. A tile is a block of queries and one of keys.

    keys:        prompt    attempt 0   attempt 1
    prompt       \\                                \\ masked: causal, or somebody's end
    attempt 0    # # # #   \\                      # full: all of it is seen, no mask
    attempt 1    # # # #               \\          the rest is skipped

A tile is skipped when its keys come after its queries or max_until of the keys is at most the first
query. It is full when all keys come before and min_until of the keys is beyond the last query.

The forward and dQ go by rows of this drawing, a program a block of queries. dK and dV go by
columns, a program a block of keys, whose queries are one range. The prompt's columns are as long as
the microbatch. So a column of more than a chunk of queries is cut, and the sums of its parts are
added in order. The size of a chunk follows from the tree alone; cuts add NUM_EXTRA parts at most.
"""

import torch
from torch import Tensor

ROWS_PER_BLOCK = 64
HEAD_DIMS = (32, 64, 128)  # that the kernels know
NUM_EXTRA = 64  # parts that cuts add at most, over all columns
MIN_CHUNK = 8  # blocks of queries; a partial sum of fewer costs more than it gains


def plan_tree(visible_until_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the work of each program, longest first.

    Returns:
        key_blocks_NM:   int32 [N, 4 + N], N = ceil(T / ROWS_PER_BLOCK): a block of queries; how
                         many blocks of keys it visits with a mask, and how many altogether; these
                         blocks, masked ones first. The last entry means nothing: it is there for
                         the kernels, which read the number of the next block ahead.
        query_ranges_P7: int32 [N + NUM_EXTRA, 7], in blocks: a block of keys; its first query and
                         the one behind its last; the same of those that need no mask; the slot of
                         its partial sum, -1 if there is one part; the number of parts. Rows that
                         are left over have no queries.
    """
    num_rows = visible_until_T.shape[0]
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    if num_rows == 0:
        no_blocks = visible_until_T.new_empty((0, 4))
        return no_blocks, visible_until_T.new_zeros((NUM_EXTRA, 7))
    extremes = []
    for reduce, neutral in ((torch.amin, num_rows), (torch.amax, 0)):
        padded = visible_until_T.new_full((num_blocks * ROWS_PER_BLOCK,), neutral)
        padded[:num_rows] = visible_until_T
        extremes.append(reduce(padded.view(num_blocks, ROWS_PER_BLOCK), dim=1))
    min_until_N, max_until_N = extremes
    blocks_N = torch.arange(num_blocks, device=visible_until_T.device)
    key_blocks_NM = _plan_queries(blocks_N, min_until_N, max_until_N)
    return key_blocks_NM, _plan_keys(blocks_N, min_until_N, max_until_N)


def _plan_queries(blocks_N: Tensor, min_until_N: Tensor, max_until_N: Tensor) -> Tensor:
    first_query = ROWS_PER_BLOCK * blocks_N[:, None]
    is_seen = (blocks_N <= blocks_N[:, None]) & (max_until_N > first_query)
    is_full = (blocks_N < blocks_N[:, None]) & (min_until_N >= first_query + ROWS_PER_BLOCK)
    is_masked = is_seen & ~is_full
    num_masked = is_masked.sum(1, keepdim=True)
    num_seen = is_seen.sum(1, keepdim=True)
    # Where a visited block stands in its list; all others go into the last column.
    column = torch.where(is_full, num_masked + is_full.cumsum(1), is_masked.cumsum(1)) - 1
    column = column.where(is_seen, blocks_N.shape[0])
    lists = column.new_zeros((column.shape[0], column.shape[1] + 1), dtype=torch.int32)
    lists = lists.scatter(1, column, blocks_N.int().expand_as(column))
    table = torch.cat((blocks_N[:, None].int(), num_masked.int(), num_seen.int(), lists), 1)
    return table[num_seen[:, 0].argsort(descending=True, stable=True)]


def _plan_keys(blocks_N: Tensor, min_until_N: Tensor, max_until_N: Tensor) -> Tensor:
    num_blocks = blocks_N.shape[0]
    lengths_N = -(-max_until_N.long() // ROWS_PER_BLOCK) - blocks_N
    chunk = (-(-lengths_N.sum() // NUM_EXTRA)).clamp(min=MIN_CHUNK)
    # A row of the table is a part: which block of keys it is of, and which one of its parts.
    num_parts_N = -(-lengths_N // chunk)
    ends_N = num_parts_N.cumsum(0)
    parts_P = torch.arange(num_blocks + NUM_EXTRA, device=blocks_N.device)
    keys_P = torch.searchsorted(ends_N, parts_P, right=True).clamp(max=num_blocks - 1)
    part_P = parts_P - (ends_N - num_parts_N)[keys_P]
    num_parts_P = num_parts_N[keys_P]
    stop_P = keys_P + lengths_N[keys_P]
    size_P = -(-lengths_N[keys_P] // num_parts_P)
    begin_P = torch.minimum(keys_P + part_P * size_P, stop_P)  # of rows left over: the stop
    end_P = torch.minimum(begin_P + size_P, stop_P)
    # The keys' own block is causal. From where the first key is left on, a mask is needed again.
    full_begin_P = torch.minimum(torch.maximum(begin_P, keys_P + 1), end_P)
    is_cut_N = num_parts_N > 1
    cut_ends_N = (num_parts_N * is_cut_N).cumsum(0)
    slots_P = (cut_ends_N - num_parts_N)[keys_P] + part_P
    table = torch.stack(
        (
            keys_P,
            begin_P,
            end_P,
            full_begin_P,
            torch.minimum(min_until_N[keys_P] // ROWS_PER_BLOCK, end_P).maximum(full_begin_P),
            torch.where(is_cut_N[keys_P], slots_P, -1),
            num_parts_P,
        ),
        1,
    )
    return table[(begin_P - end_P).argsort(stable=True)].int()


def max_slots(num_rows: int) -> int:
    """Partial sums that a tree of so many rows has at most, whatever it looks like.

    Column j is at most N - j blocks long, and cut only where it is longer than MIN_CHUNK. A cut
    into two parts adds one, so that all cuts have twice as many parts as they add, at most.
    """
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    parts = (-(-length // MIN_CHUNK) for length in range(MIN_CHUNK + 1, num_blocks + 1))
    return min(2 * NUM_EXTRA, sum(parts))


def program_lengths(query_ranges_P7: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of each program of dK and dV, longest first: as planned, and without any cut."""
    lengths_P = query_ranges_P7[:, 2] - query_ranges_P7[:, 1]
    keys_P = query_ranges_P7[:, 0].long()
    whole_N = lengths_P.new_zeros(int(keys_P.max()) + 1).index_add(0, keys_P, lengths_P)
    return lengths_P[lengths_P > 0], whole_N.sort(descending=True).values
