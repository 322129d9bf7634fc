"""Runs one planned step: packs the pending tokens, writes their KV into pages, attends over the pages.

The weights are the trainer's own parameters, read where they are. Rows are padded to at least MIN_ROWS: below about a
dozen rows library GEMMs switch to kernels that sum in another order, and a row's bits would depend on its company.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import paged_attention
from socpo_fast.ops._head import MIN_ROWS


class Runner:
    def __init__(self, student: Decoder, *, num_pages: int, page_size: int):
        config, weight = student.config, student.lm_head.weight
        self.student, self.page_size, self.device = student, page_size, weight.device
        shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        try:
            self.k_cache_LPSKE = torch.zeros(shape, dtype=weight.dtype, device=self.device)
            self.v_cache_LPSKE = torch.zeros(shape, dtype=weight.dtype, device=self.device)
        except RuntimeError as error:  # torch's, over several lines
            gib = num_pages * self.page_bytes(student, page_size) / 2**30
            raise ValueError(f"Engine: kv_cache_gib must fit into memory, got {gib:.4g}; lower it") from error

    @staticmethod
    def page_bytes(student: Decoder, page_size: int) -> int:
        config = student.config
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return per_token * page_size * student.lm_head.weight.element_size()

    @torch.no_grad()
    def forward(self, plan: list[tuple[Sequence, int]]) -> Tensor:
        """Forward the planned tokens; returns the last one's hidden state of each sequence, [B, D]."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        cu_seqlens, seq_lens, size = [0], [], self.page_size
        for sequence, num_tokens in plan:
            start, stop = sequence.num_cached, sequence.num_cached + num_tokens
            token_ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
            slots += [sequence.pages[p // size] * size + p % size for p in range(start, stop)]
            seq_lens.append(stop)
            cu_seqlens.append(cu_seqlens[-1] + num_tokens)
        num_pages = max(len(sequence.pages) for sequence, _ in plan)
        block_table = [sequence.pages + [0] * (num_pages - len(sequence.pages)) for sequence, _ in plan]
        num_rows = len(token_ids)
        padding = [0] * (MIN_ROWS - num_rows)
        slots_T = self._tensor(slots, torch.int64)
        tables = tuple(self._tensor(values, torch.int32) for values in (block_table, seq_lens, cu_seqlens))
        scale = self.student.config.head_dim**-0.5

        def attend(layer_idx: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
            k_cache, v_cache = self.k_cache_LPSKE[layer_idx], self.v_cache_LPSKE[layer_idx]
            k_cache.flatten(0, 1).index_copy_(0, slots_T, k_TKE[:num_rows])
            v_cache.flatten(0, 1).index_copy_(0, slots_T, v_TKE[:num_rows])
            out_THE = paged_attention(q_THE[:num_rows], k_cache, v_cache, *tables, scale=scale)
            return pad_rows(out_THE)

        hidden_TD = self.student(
            self._tensor(token_ids + padding, torch.int64), self._tensor(positions + padding, torch.int64), attend
        )
        return hidden_TD[tables[2][1:].long() - 1]

    def copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to) each, in every layer."""
        if copies:
            source, target = self._tensor(copies, torch.int64).unbind(1)
            self.k_cache_LPSKE[:, target] = self.k_cache_LPSKE[:, source]
            self.v_cache_LPSKE[:, target] = self.v_cache_LPSKE[:, source]

    def _tensor(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def pad_rows(x: Tensor) -> Tensor:
    """x with zero rows appended up to MIN_ROWS."""
    missing = MIN_ROWS - x.shape[0]
    return x if missing <= 0 else F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))


@torch.no_grad()
def warn_unless_rows_invariant(student: Decoder) -> bool:
    """Check on this machine's GEMM library that a row's bits depend neither on its place nor on the number of rows."""
    generator = torch.Generator().manual_seed(0)
    weights = {layer.weight.shape: layer.weight for layer in student.modules() if isinstance(layer, nn.Linear)}
    for (rows_out, width), weight in weights.items():
        x = torch.randn((61, width), generator=generator).to(weight)
        whole = F.linear(x, weight)
        if not all(torch.equal(F.linear(x[i:j], weight), whole[i:j]) for i, j in ((0, MIN_ROWS), (3, 20), (7, 40))):
            warnings.warn(
                f"engine: rows of a [.., {width}] x [{width}, {rows_out}] GEMM are not bit-invariant on this machine; "
                "sampled tokens may depend on batch composition in the last bit",
                stacklevel=3,
            )
            return False
    return True
