"""Groups the sequences of a decode step that begin with the same pages, for kernels on a GPU.

A group is up to MAX_MEMBERS sequences, anywhere in the batch. A kernel reads the keys of their
shared tokens once for all of them. The host writes one row of the table per sequence:

    column    0          1             2                 3 .. 2 + MAX_MEMBERS
              leader     member_idx    shared tokens     members, then -1

    leader        the batch row of the first member; a sequence without a group leads itself
    member_idx    which member the sequence is, counted from 0
    members       batch rows of all members, in the leader's row only

For example, rows 1, 3 and 4 share two pages of 16 tokens, and row 0 shares nothing:

    row 0    0  0   0    0 -1 -1 ..
    row 1    1  0  32    1  3  4 -1 ..
    row 3    1  1  32    3 -1 -1 ..          only leader, member_idx and shared tokens are read
"""

import numpy as np

MAX_MEMBERS = 16
GROUP_WIDTH = 3 + MAX_MEMBERS


def prefix_groups(table_BM: np.ndarray, seq_lens_B: np.ndarray, page_size: int) -> np.ndarray:
    """Returns int32 [B, GROUP_WIDTH]: the group of each sequence, as the module describes it.

    Args:
        table_BM:   [B, M] integers, the pages of a sequence in order.
        seq_lens_B: [B] integers, the tokens in them. A page that is not full is never shared.
        page_size:  tokens of a full page.
    """
    groups_BG = ungrouped(len(table_BM))
    num_full_pages_B = seq_lens_B // page_size
    candidates = np.flatnonzero(num_full_pages_B)
    # Sequences with the same first page come to lie side by side, in the order of the batch.
    first_page = table_BM[candidates, 0]
    order = candidates[first_page.argsort(kind="stable")]
    bounds = np.flatnonzero(np.diff(table_BM[order, 0])) + 1
    for siblings in np.split(order, bounds):
        for start in range(0, len(siblings) - 1, MAX_MEMBERS):
            members = siblings[start : start + MAX_MEMBERS]
            pages = table_BM[members, : num_full_pages_B[members].min()]
            # argmin is the first False; the appended one is found if all pages are the same.
            is_same = np.append((pages == pages[0]).all(0), False)
            groups_BG[members, 0] = members[0]
            groups_BG[members, 1] = np.arange(len(members))
            groups_BG[members, 2] = is_same.argmin() * page_size
            groups_BG[members[0], 3 : 3 + len(members)] = members
    return groups_BG


def ungrouped(num_seqs: int) -> np.ndarray:
    """Returns a table in which every sequence is a group of its own."""
    groups_BG = np.full((num_seqs, GROUP_WIDTH), -1, dtype=np.int32)
    groups_BG[:, 0] = groups_BG[:, 3] = np.arange(num_seqs)
    groups_BG[:, 1:3] = 0
    return groups_BG
