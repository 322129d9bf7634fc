"""Checks what is handed to flash-attn.

Its two functions are replaced by plain torch, so neither a card nor the package is needed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.ops.paged_attention import paged_attention_flash, paged_attention_ref

SIZE = 256
HEADS = 6
KV_HEADS = 2
HEAD_DIM = 16
SCALE = 0.3  # not the default of E ** -0.5, so a forgotten argument fails


def attend(q_QHE: Tensor, k_LKE: Tensor, v_LKE: Tensor, *, scale: float) -> Tensor:
    """Computes causal attention; the last query sees the last key."""
    mask_QL = torch.ones(len(q_QHE), len(k_LKE), dtype=torch.bool).tril(len(k_LKE) - len(q_QHE))
    q_HQE, k_KLE, v_KLE = (x.transpose(0, 1).float() for x in (q_QHE, k_LKE, v_LKE))
    attention = torch.nn.functional.scaled_dot_product_attention
    return (
        attention(q_HQE, k_KLE, v_KLE, mask_QL, scale=scale, enable_gqa=True)
        .transpose(0, 1)
        .to(q_QHE.dtype)
    )


def in_pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """Returns the first `length` tokens of the cache that these pages hold."""
    return cache[pages.long()].flatten(0, 1)[:length]


class FlashAttn(SimpleNamespace):
    """A stand-in for flash-attn 2.7: its two functions, with their argument names and layouts.

    It notes which of them was called.
    """

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: None = None,
        v: None = None,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
    ) -> Tensor:
        assert q.ndim == 4 and k is v is None and causal and num_splits == 1
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        self.called = "decode"
        rows = zip(q, block_table, cache_seqlens.tolist(), strict=True)
        return torch.stack(
            [
                attend(x, *(in_pages(c, t, n) for c in (k_cache, v_cache)), scale=softmax_scale)
                for x, t, n in rows
            ]
        )

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert causal and dropout_p == 0 and block_table is not None and softmax_scale is not None
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
        self.called = "prefill"
        key_lens = cu_seqlens_k.diff().tolist()
        q_by_sequence = q.split(cu_seqlens_q.diff().tolist())
        assert (
            max(key_lens) <= max_seqlen_k
            and max(len(q_of_sequence) for q_of_sequence in q_by_sequence) <= max_seqlen_q
        )
        rows = zip(q_by_sequence, block_table, key_lens, strict=True)
        return torch.cat(
            [
                attend(x, *(in_pages(c, t, n) for c in (k, v)), scale=softmax_scale)
                for x, t, n in rows
            ]
        )


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    """Puts the stand-in where flash-attn would be imported from."""
    module = FlashAttn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def make_case(
    seq_lens: list[int], q_lens: list[int], dtype: torch.dtype = torch.bfloat16, size: int = SIZE
) -> Any:
    """Returns the arguments of paged attention, with random values in shuffled pages."""
    generator = torch.Generator().manual_seed(0)
    width = -(-max(seq_lens) // size)
    pages = torch.randperm(len(seq_lens) * width, generator=generator).view(-1, width).int()
    caches = [
        torch.randn(pages.numel(), size, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
        for _ in range(2)
    ]
    q_THE = torch.randn(sum(q_lens), HEADS, HEAD_DIM, generator=generator).to(dtype)
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).int()
    return q_THE, *caches, pages, torch.tensor(seq_lens).int(), cu_seqlens_q


# Decode around the end of a page; a sequence without queries; prefill from the start, in a chunk,
# and beside a sequence that decodes.
@pytest.mark.parametrize(
    ("seq_lens", "q_lens", "called"),
    [
        ([1, 256, 257, 40], [1, 1, 1, 1], "decode"),
        ([1, 256, 40], [1, 0, 1], "prefill"),
        ([5, 300, 257], [5, 44, 1], "prefill"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_equals_the_reference(
    flash: FlashAttn, seq_lens: list[int], q_lens: list[int], called: str, dtype: torch.dtype
) -> None:
    case = make_case(seq_lens, q_lens, dtype)
    longest = {"max_seqlen_q": max(q_lens), "max_seqlen_k": max(seq_lens)}
    o_THE = paged_attention_flash(*case, scale=SCALE, **longest)
    assert flash.called == called and o_THE.shape == case[0].shape and o_THE.dtype == dtype
    torch.testing.assert_close(o_THE, paged_attention_ref(*case, scale=SCALE), atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 128}, "page_size must be a multiple of 256 for impl='flash', got 128"),
        (
            {"dtype": torch.float32},
            "must be both fp16 or both bf16 for impl='flash', got torch.float32",
        ),
    ],
)
def test_what_flash_cannot_do_is_refused(
    flash: FlashAttn, options: dict[str, Any], message: str
) -> None:
    """Page sizes and dtypes that flash-attn does not support are refused in our words."""
    with pytest.raises(ValueError, match=message):
        paged_attention_flash(
            *make_case([3], [1], **options), scale=SCALE, max_seqlen_q=1, max_seqlen_k=3
        )


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flash-attn the error says how to install it."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    with pytest.raises(
        RuntimeError, match=r"impl 'flash' needs flash-attn; pip install .* '.\[flash\]' in a"
    ):
        paged_attention_flash(*make_case([3], [1]), scale=SCALE, max_seqlen_q=1, max_seqlen_k=3)
