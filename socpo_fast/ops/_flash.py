"""paged_attention by the package flash-attn: an implementation to be asked for by name, never chosen by itself.

Departs from our kernels: pages of 256 tokens or a multiple, fp16 and bf16 only, no sharing among siblings, and prefill
and decode differ in their bits. Decode takes one split, so that a row's bits do not depend on its company.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor


def paged_attention_flash(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """`paged_attention` of ops/paged_attention.py, its tensors unchecked; nothing is read back from the device.

    Raises:
        ValueError: pages or a dtype that flash-attn cannot do.
        RuntimeError: it is not installed.
    """
    where, size = "paged_attention", k_cache_PSKE.shape[1]
    if size % 256:
        raise ValueError(f"{where}: page_size must be a multiple of 256 for impl='flash', got {size}")
    if q_THE.dtype not in (torch.float16, torch.bfloat16) or k_cache_PSKE.dtype != q_THE.dtype:
        raise ValueError(
            f"{where}: queries and pages must be both fp16 or both bf16 for impl='flash', got "
            f"{q_THE.dtype} and pages in {k_cache_PSKE.dtype}"
        )
    try:
        flash = importlib.import_module("flash_attn")
    except ModuleNotFoundError as error:
        advice = "pip install --no-build-isolation socpo_fast[flash], or take another impl"
        raise RuntimeError(f"{where}: impl 'flash' needs flash-attn; {advice}") from error
    options = {"softmax_scale": scale, "causal": True, "block_table": block_table_BM}
    if max_seqlen_q == 1 and len(q_THE) == len(seq_lens_B):
        options |= {"cache_seqlens": seq_lens_B, "num_splits": 1}
        return flash.flash_attn_with_kvcache(q_THE[:, None], k_cache_PSKE, v_cache_PSKE, **options).squeeze(1)
    cu_seqlens_k = F.pad(seq_lens_B.cumsum(0, dtype=torch.int32), (1, 0))
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash.flash_attn_varlen_func(q_THE, k_cache_PSKE, v_cache_PSKE, *lengths, **options)
