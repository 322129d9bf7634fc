"""Which sequences of a decode step read the same pages first: groups that the host names, for
kernels on a GPU.

    row of a sequence:  leader | place | shared tokens | member 0, member 1, .. of the group, -1
    behind the last

A group has the rows of up to MAX_MEMBERS sequences, wherever they stand in the batch, whose block
tables begin with the same pages; leader is its first row, place the sequence's own among the
members. A kernel reads the keys of shared tokens once for all of them.
"""

import numpy as np

MAX_MEMBERS = 16
GROUP_WIDTH = 3 + MAX_MEMBERS


def prefix_groups(table_BM: np.ndarray, seq_lens_B: np.ndarray, page_size: int) -> np.ndarray:
    """Returns int32 [B, GROUP_WIDTH]: each sequence with those that share whole pages with it from
    the start on.

    Args:
        table_BM:   [B, M] integers, pages in order.
        seq_lens_B: [B] integers, tokens that are in them; a page that is not full is nobody's to
                    share.
    """
    groups_BG = alone(len(table_BM))
    num_whole_B = seq_lens_B // page_size
    candidates = np.flatnonzero(num_whole_B)
    first_page = table_BM[candidates, 0]
    order = candidates[first_page.argsort(kind="stable")]
    bounds = np.flatnonzero(np.diff(table_BM[order, 0])) + 1
    for siblings in np.split(order, bounds):
        for start in range(0, len(siblings) - 1, MAX_MEMBERS):
            members = siblings[start : start + MAX_MEMBERS]
            pages = table_BM[members, : num_whole_B[members].min()]
            is_same = np.append((pages == pages[0]).all(0), False)
            groups_BG[members, 0] = members[0]
            groups_BG[members, 1] = np.arange(len(members))
            groups_BG[members, 2] = is_same.argmin() * page_size
            groups_BG[members[0], 3 : 3 + len(members)] = members
    return groups_BG


def alone(num_seqs: int) -> np.ndarray:
    """Returns the groups of sequences that share nothing."""
    groups_BG = np.full((num_seqs, GROUP_WIDTH), -1, dtype=np.int32)
    groups_BG[:, 0] = groups_BG[:, 3] = np.arange(num_seqs)
    groups_BG[:, 1:3] = 0
    return groups_BG
