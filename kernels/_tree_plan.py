"""Plans which tiles of (queries, keys) tree attention's kernels visit, once for a microbatch.

Read top-down: plan_tree -> _plan_queries, _plan_keys. The plan is computed by torch on the device
of the tree, and all sizes depend on the number of rows only, so the host never waits for the
device. Rows are taken in blocks of ROWS_PER_BLOCK. A tile is one block of queries times one block
of keys. A prompt of three blocks with two attempts of two blocks each:

    queries      keys: prompt   attempt 0   attempt 1
    prompt             M . .    . .         . .
                       F M .    . .         . .      M  masked: some pairs are seen
                       F F M    . .         . .      F  full: all pairs are seen, no mask needed
    attempt 0          F F F    M .         . .      .  skipped: no pair is seen
                       F F F    F M         . .
    attempt 1          F F F    . .         M .      Texts begin anywhere in a block in practice,
                       F F F    . .         F M      which makes more of the tiles masked.

Row k is seen by the queries k .. until - 1, where until is the k-th number of visible_until_T. Of
the numbers of a block of keys, min_until is the smallest and max_until the largest. A tile is
skipped if its keys come after its queries, or if max_until is at most the first query. It is full
if all keys come before the queries and min_until is beyond the last query.

The forward and dQ go along the rows of this drawing: a program has a block of queries. dK and dV go
along the columns: a program has a block of keys, whose queries are one range. A prompt's column is
as long as the microbatch, and one program would still run when all others have ended. So a long
column is cut into chunks, and the sums of its chunks are added in order. The largest chunk follows
from the tree alone, and cutting adds at most NUM_EXTRA chunks.
"""

import torch
from torch import Tensor

ROWS_PER_BLOCK = 64
HEAD_DIMS = (32, 64, 128)  # that the kernels support
NUM_EXTRA = 64  # chunks that cutting adds at most, over all columns
MIN_CHUNK = 8  # blocks of queries; a partial sum of fewer costs more than it gains


def plan_tree(visible_until_T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the work of each program, longest first.

    Returns:
        key_blocks_NM:   int32 [N, 4 + N], N = ceil(T / ROWS_PER_BLOCK). A row: a block of queries;
                         how many blocks of keys it visits with a mask, and how many in all; the
                         list of these, masked ones first. The last entry is padding: kernels read
                         one entry ahead.
        query_ranges_P7: int32 [N + NUM_EXTRA, 7], in blocks. A row: a block of keys; begin and end
                         of its queries; begin and end of those that need no mask; the slot of its
                         partial sum, -1 if the column is not cut; the number of chunks of the
                         column. Rows that are left over have no queries.
    """
    num_rows = visible_until_T.shape[0]
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    if num_rows == 0:
        no_blocks = visible_until_T.new_empty((0, 4))
        return no_blocks, visible_until_T.new_zeros((NUM_EXTRA, 7))
    extremes = []
    for reduce, neutral in ((torch.amin, num_rows), (torch.amax, 0)):
        # The last block may be partly filled: the padding must not change its extremes.
        padded = visible_until_T.new_full((num_blocks * ROWS_PER_BLOCK,), neutral)
        padded[:num_rows] = visible_until_T
        extremes.append(reduce(padded.view(num_blocks, ROWS_PER_BLOCK), dim=1))
    min_until_N, max_until_N = extremes
    blocks_N = torch.arange(num_blocks, device=visible_until_T.device)
    key_blocks_NM = _plan_queries(blocks_N, min_until_N, max_until_N)
    return key_blocks_NM, _plan_keys(blocks_N, min_until_N, max_until_N)


def _plan_queries(blocks_N: Tensor, min_until_N: Tensor, max_until_N: Tensor) -> Tensor:
    """Returns key_blocks_NM: for each block of queries, the blocks of keys that it visits."""
    first_query = ROWS_PER_BLOCK * blocks_N[:, None]
    is_seen = (blocks_N <= blocks_N[:, None]) & (max_until_N > first_query)
    is_full = (blocks_N < blocks_N[:, None]) & (min_until_N >= first_query + ROWS_PER_BLOCK)
    is_masked = is_seen & ~is_full
    num_masked = is_masked.sum(1, keepdim=True)
    num_seen = is_seen.sum(1, keepdim=True)
    # The index of a visited block in its list. Skipped blocks are all written to the last column,
    # which is padding: the size of the result does not depend on how many there are.
    column = torch.where(is_full, num_masked + is_full.cumsum(1), is_masked.cumsum(1)) - 1
    column = column.where(is_seen, blocks_N.shape[0])
    lists = column.new_zeros((column.shape[0], column.shape[1] + 1), dtype=torch.int32)
    lists = lists.scatter(1, column, blocks_N.int().expand_as(column))
    table = torch.cat((blocks_N[:, None].int(), num_masked.int(), num_seen.int(), lists), 1)
    return table[num_seen[:, 0].argsort(descending=True, stable=True)]


def _plan_keys(blocks_N: Tensor, min_until_N: Tensor, max_until_N: Tensor) -> Tensor:
    """Returns query_ranges_P7: for each program of dK and dV, its keys and its range of queries."""
    num_blocks = blocks_N.shape[0]
    num_query_blocks_N = -(-max_until_N.long() // ROWS_PER_BLOCK) - blocks_N
    # Rounding up adds less than one chunk a column. So all cuts together add at most the number of
    # blocks over the size of a chunk, which is NUM_EXTRA.
    max_chunk = (-(-num_query_blocks_N.sum() // NUM_EXTRA)).clamp(min=MIN_CHUNK)
    # A program has one chunk. It needs to know the column of its chunk, and its index in there.
    num_chunks_N = -(-num_query_blocks_N // max_chunk)
    chunk_ends_N = num_chunks_N.cumsum(0)
    programs_P = torch.arange(num_blocks + NUM_EXTRA, device=blocks_N.device)
    key_block_P = torch.searchsorted(chunk_ends_N, programs_P, right=True).clamp(max=num_blocks - 1)
    chunk_idx_P = programs_P - (chunk_ends_N - num_chunks_N)[key_block_P]
    num_chunks_P = num_chunks_N[key_block_P]
    column_end_P = key_block_P + num_query_blocks_N[key_block_P]
    chunk_size_P = -(-num_query_blocks_N[key_block_P] // num_chunks_P)
    # Rows left over get an empty range at the end of the last column.
    begin_P = torch.minimum(key_block_P + chunk_idx_P * chunk_size_P, column_end_P)
    end_P = torch.minimum(begin_P + chunk_size_P, column_end_P)
    # The diagonal tile needs the causal mask. From the first query that does not see every key of
    # the block on, a mask is needed again.
    full_begin_P = torch.minimum(torch.maximum(begin_P, key_block_P + 1), end_P)
    is_cut_N = num_chunks_N > 1
    cut_ends_N = (num_chunks_N * is_cut_N).cumsum(0)
    slot_P = (cut_ends_N - num_chunks_N)[key_block_P] + chunk_idx_P
    table = torch.stack(
        (
            key_block_P,
            begin_P,
            end_P,
            full_begin_P,
            torch.minimum(min_until_N[key_block_P] // ROWS_PER_BLOCK, end_P).maximum(full_begin_P),
            torch.where(is_cut_N[key_block_P], slot_P, -1),
            num_chunks_P,
        ),
        1,
    )
    return table[(begin_P - end_P).argsort(stable=True)].int()


def max_slots(num_rows: int) -> int:
    """Returns how many partial sums a tree of num_rows rows has at most, whatever its shape.

    Column j has at most N - j blocks, and is cut only if it has more than MIN_CHUNK. Cutting it
    into c chunks adds c - 1 of them and takes c <= 2 (c - 1) slots. So the slots of all columns are
    at most twice the chunks that cutting adds, and these are at most NUM_EXTRA.
    """
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    chunks_of_columns = (
        -(-num_query_blocks // MIN_CHUNK)
        for num_query_blocks in range(MIN_CHUNK + 1, num_blocks + 1)
    )
    return min(2 * NUM_EXTRA, sum(chunks_of_columns))


def tiles_per_program(query_ranges_P7: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tiles of each program of dK and dV, longest first: as planned, and uncut."""
    num_tiles_P = query_ranges_P7[:, 2] - query_ranges_P7[:, 1]
    key_block_P = query_ranges_P7[:, 0].long()
    uncut_N = num_tiles_P.new_zeros(int(key_block_P.max()) + 1).index_add(
        0, key_block_P, num_tiles_P
    )
    return num_tiles_P[num_tiles_P > 0], uncut_N.sort(descending=True).values
