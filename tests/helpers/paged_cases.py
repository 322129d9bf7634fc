"""Makes sequences in shuffled pages for the tests of paged_attention.

Slots that must not be read hold NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from socpo_fast.ops import paged_attention
from socpo_fast.ops.paged_attention import paged_attention_ref
from tests.helpers.error_rule import assert_error_rule

SPLIT = 128  # KEY_SPLIT of csrc/simd/kernels.h


class Case(NamedTuple):
    """Arguments of the op."""

    q_THE: Tensor
    k_cache_PSKE: Tensor
    v_cache_PSKE: Tensor
    block_table_BM: Tensor
    seq_lens_B: Tensor
    cu_seqlens_q: Tensor

    def part(self, b: int, begin: int, end: int, seq_len: int) -> Case:
        """Returns a case of sequence b only, with its first seq_len tokens.

        Rows begin .. end - 1 of q are the queries of the last of these tokens.
        """
        return self._replace(
            q_THE=self.q_THE[begin:end],
            block_table_BM=self.block_table_BM[b : b + 1],
            seq_lens_B=torch.tensor([seq_len]).int(),
            cu_seqlens_q=torch.tensor([0, end - begin]).int(),
        )


def make_case(
    seq_lens: list[int],
    q_lens: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
) -> Case:
    """Returns random queries, and random keys and values in caches of `dtype`.

    The first `shared` tokens of all sequences are in the pages of the first sequence.
    """
    generator = torch.Generator().manual_seed(sum(seq_lens) + head_dim)
    width = -(-max(seq_lens) // page_size) + 1
    num_pages = len(seq_lens) * width
    caches = [
        torch.full((num_pages, page_size, kv_heads, head_dim), torch.nan, dtype=dtype)
        for _ in range(2)
    ]
    table_BM = torch.randperm(num_pages, generator=generator).view(len(seq_lens), width)
    table_BM[:, : shared // page_size] = table_BM[0, : shared // page_size].clone()
    for pages_M, seq_len in zip(table_BM, seq_lens, strict=True):
        for cache in caches:
            slots = torch.arange(seq_len)
            values = torch.randn(seq_len, kv_heads, head_dim, generator=generator).to(dtype)
            cache[pages_M[slots // page_size], slots % page_size] = values
    q_THE = torch.randn(sum(q_lens), heads, head_dim, generator=generator)
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).int()
    return Case(q_THE, *caches, table_BM.int(), torch.tensor(seq_lens).int(), cu_seqlens_q)


def run(case: Case, impl: str = "cpp", *, cascade: bool = True) -> Tensor:
    """Returns the output of the op, with the scale that attention usually has."""
    return paged_attention(*case, scale=case.q_THE.shape[-1] ** -0.5, cascade=cascade, impl=impl)


def assert_cpp_is_right(case: Case) -> None:
    """Asserts the error rule for the C++ output."""
    inputs_64 = [x.double() if x.is_floating_point() else x for x in case]
    truth_THE = paged_attention_ref(*inputs_64, scale=case.q_THE.shape[-1] ** -0.5)
    assert_error_rule(run(case), run(case, "ref"), truth_THE, name="o_THE", dtype=torch.float32)
