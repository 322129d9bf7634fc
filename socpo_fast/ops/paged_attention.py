"""Computes causal attention over keys and values in pages: prefill, chunked prefill and decode.

Read paged_attention_ref for the mathematics, then paged_attention.

Departs from the textbook. One op serves prompts and single tokens, and both give bitwise the same
result, since the arithmetic of a query row depends on its position and its keys only. Keys are
attended in fixed splits, whose results are merged in order:

    keys of a sequence    | split 0 | split 1 | split 2 ..|
    siblings A, B, C      | the same pages    | A's, B's, C's own

With cascade, a split whose pages siblings share is read once for all of them. That changes no bit
either. On a GPU the host says who shares what (prefix_groups.py). The package flash-attn is
available as an implementation, but only by name.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from socpo_fast.ops._checks import FLOATS, TensorChecker, check_rule, has_no_values
from socpo_fast.ops._impl import kernels_of, pick_impl
from socpo_fast.ops._register import define_op
from socpo_fast.ops.prefix_groups import prefix_groups, ungrouped


def paged_attention_ref(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Computes `paged_attention`, unchecked, one sequence at a time."""
    dtype = torch.promote_types(q_THE.dtype, torch.float32)
    group = q_THE.shape[1] // k_cache_PSKE.shape[2]
    o_THE = torch.empty_like(q_THE)
    for pages_M, seq_len, begin, end in zip(
        block_table_BM,
        seq_lens_B.tolist(),
        cu_seqlens_q[:-1].tolist(),
        cu_seqlens_q[1:].tolist(),
        strict=True,
    ):
        pages_M = pages_M[: -(-seq_len // k_cache_PSKE.shape[1])]
        k_LHE, v_LHE = (
            cache[pages_M].flatten(0, 1)[:seq_len].to(dtype).repeat_interleave(group, dim=1)
            for cache in (k_cache_PSKE, v_cache_PSKE)
        )
        scores_HQL = torch.einsum("qhe,lhe->hql", q_THE[begin:end].to(dtype), k_LHE) * scale
        # The queries are the last tokens, so query q sees keys up to seq_len - num_queries + q.
        future_QL = torch.ones_like(scores_HQL[0], dtype=torch.bool).triu(
            seq_len - (end - begin) + 1
        )
        probs_HQL = scores_HQL.masked_fill(future_QL, -torch.inf).softmax(-1)
        o_THE[begin:end] = torch.einsum("hql,lhe->qhe", probs_HQL, v_LHE).to(o_THE.dtype)
    return o_THE


def paged_attention(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    cascade: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Computes attention of each sequence's last tokens over all of its tokens, read from pages.

        o[t, h]     = sum over j of p[j] v[j, h']                     h' = h // (H / K)
        p           = softmax over j <= position(t) of scale q[t, h] . k[j, h']
        position(t) = seq_lens[b] - cu_seqlens_q[b + 1] + t
                      for cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1]

    Args:
        q_THE:          [T, H, E] floating point (cpp: fp32), packed by sequence. H a multiple of K.
        k_cache_PSKE:   [P, S, K, E], q's dtype, or bf16 with fp32 queries; contiguous; E a multiple
                        of 4, at most 256. The keys of the query tokens are already in it.
        v_cache_PSKE:   like k_cache_PSKE.
        block_table_BM: [B, M] int32. Token j of sequence b is in page block_table[b, j // S], slot
                        j % S; entries after the last token's page are never read.
        seq_lens_B:     [B] int32, tokens of sequence b including the query tokens, which are its
                        last ones; <= M * S.
        cu_seqlens_q:   [B + 1] int32, query tokens before sequence b; from 0 to T. A sequence may
                        have none.
        scale:          usually E ** -0.5; no default, since a wrong one goes unnoticed.
        cascade:        whether sequences with one query token each read the keys of a split once
                        if their pages are the same (cpp: consecutive sequences; triton: sequences
                        that begin with the same pages). The result is bitwise the same.
        impl:           "auto", "ref", "cpp", "triton" or "flash" (flash-attn: pages of 256, fp16 or
                        bf16).

    Returns:
        o_THE [T, H, E], q's dtype. Softmax and sums in fp32.

    Raises:
        ValueError: a shape, dtype, stride, length or page number breaks the rules above.

    Gradient: none, it serves the engine. Memory: ref gathers one sequence's keys and scores; cpp
    has E + 2 floats for each head and split of 128 keys of a single query token, and about 100 KiB
    a thread. Bitwise (cpp): batch-invariant and thread-invariant; the number of query tokens, the
    pages that hold the keys and cascade do not matter either.
    Source: PagedAttention (Kwon et al. 2023); online softmax (Milakov and Gimelshein 2018);
    cascade: Hydragen (Juravsky et al. 2024).
    """
    _check(q_THE, k_cache_PSKE, v_cache_PSKE, block_table_BM, seq_lens_B, cu_seqlens_q)
    impl = pick_impl("paged_attention", impl, q_THE)
    # Grids of GPU kernels need the longest lengths on the host. Upper bounds do as well.
    max_seqlens = len(q_THE), block_table_BM.shape[1] * k_cache_PSKE.shape[1]
    if not has_no_values(q_THE) and len(q_THE):
        max_seqlens = int(cu_seqlens_q.diff().max()), int(seq_lens_B.max())
    groups_BG = None
    if impl == "triton" and cascade and max_seqlens[0] == 1 and not has_no_values(q_THE):
        groups = prefix_groups(
            block_table_BM.cpu().numpy(), seq_lens_B.cpu().numpy(), k_cache_PSKE.shape[1]
        )
        groups_BG = torch.from_numpy(groups).to(q_THE.device)
    tensors = q_THE, k_cache_PSKE, v_cache_PSKE, block_table_BM, seq_lens_B, cu_seqlens_q
    return paged_attention_op(
        *(x.contiguous() for x in tensors), *max_seqlens, groups_BG, scale, cascade, impl
    )


def _check(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
) -> None:
    """Checks all that the C++ relies on: it uses these numbers as addresses without checking."""
    check = TensorChecker("paged_attention")
    check("q_THE", q_THE, FLOATS)
    dtypes = (torch.float32, torch.bfloat16) if q_THE.dtype == torch.float32 else (q_THE.dtype,)
    check("k_cache_PSKE", k_cache_PSKE, dtypes)
    check("v_cache_PSKE", v_cache_PSKE, (k_cache_PSKE.dtype,))
    check.each((torch.int32,), block_table_BM=block_table_BM, seq_lens_B=seq_lens_B)
    num_tokens, heads, head_dim, pages, page_size, kv_heads, num_seqs, width = (
        check.sizes[c] for c in "THEPSKBM"
    )
    check_rule(
        check.where,
        "strides of the caches",
        (k_cache_PSKE.stride(), v_cache_PSKE.stride()),
        k_cache_PSKE.is_contiguous() and v_cache_PSKE.is_contiguous(),
        "contiguous",
    )
    check_rule(check.where, "H", heads, heads % kv_heads == 0, f"a multiple of K={kv_heads}")
    check_head_dim(check.where, head_dim)
    if has_no_values(q_THE):
        return
    q_lens_B = cu_seqlens_q.diff()
    is_rising = (
        cu_seqlens_q.dtype == torch.int32
        and cu_seqlens_q.shape == (num_seqs + 1,)
        and bool((q_lens_B >= 0).all())
        and cu_seqlens_q[0].item() == 0
        and cu_seqlens_q[-1].item() == num_tokens
    )
    check_rule(
        check.where,
        "cu_seqlens_q",
        cu_seqlens_q,
        is_rising,
        f"int32 [B + 1 = {num_seqs + 1}] rising from 0 to {num_tokens}",
    )
    check_rule(
        check.where,
        "seq_lens_B",
        seq_lens_B.tolist(),
        bool(((seq_lens_B >= q_lens_B) & (seq_lens_B <= width * page_size)).all()),
        f"in [query tokens, M * S = {width * page_size}] with query tokens {q_lens_B.tolist()}",
    )
    used_pages = block_table_BM[
        torch.arange(0, width * page_size, page_size, device=seq_lens_B.device)
        < seq_lens_B[:, None]
    ]
    check.index_range("block_table_BM", used_pages, pages)


def check_head_dim(where: str, head_dim: int) -> None:
    """Refuses a head width that the kernels would read wrongly."""
    is_readable = head_dim % 4 == 0 and 0 < head_dim <= 256
    check_rule(where, "head_dim E", head_dim, is_readable, "a multiple of 4 in [4, 256]")


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
    """Computes `paged_attention` with the package flash-attn; its tensors are not checked.

    impl "auto" never picks it. Departs from our kernels: the page size is a multiple of 256, dtypes
    are fp16 and bf16 only, siblings do not share reads, and prefill and decode are not bitwise
    equal. Decode uses a single split, so that it is batch-invariant. Nothing is read back from the
    device.

    Raises:
        ValueError: pages or a dtype that flash-attn cannot do.
        RuntimeError: flash-attn is not installed.
    """
    where = "paged_attention"
    size = k_cache_PSKE.shape[1]
    check_rule(where, "page_size", size, size % 256 == 0, "a multiple of 256 for impl='flash'")
    if q_THE.dtype not in (torch.float16, torch.bfloat16) or k_cache_PSKE.dtype != q_THE.dtype:
        raise ValueError(
            f"{where}: queries and pages must be both fp16 or both bf16 for impl='flash', got "
            f"{q_THE.dtype} and pages in {k_cache_PSKE.dtype}"
        )
    try:
        flash = importlib.import_module("flash_attn")
    except ModuleNotFoundError as error:
        advice = "pip install --no-build-isolation '.[flash]' in a checkout, or take another impl"
        raise RuntimeError(f"{where}: impl 'flash' needs flash-attn; {advice}") from error
    options = {"softmax_scale": scale, "causal": True, "block_table": block_table_BM}
    if max_seqlen_q == 1 and len(q_THE) == len(seq_lens_B):
        options |= {"cache_seqlens": seq_lens_B, "num_splits": 1}
        return flash.flash_attn_with_kvcache(
            q_THE[:, None], k_cache_PSKE, v_cache_PSKE, **options
        ).squeeze(1)
    cu_seqlens_k = F.pad(seq_lens_B.cumsum(0, dtype=torch.int32), (1, 0))
    return flash.flash_attn_varlen_func(
        q_THE,
        k_cache_PSKE,
        v_cache_PSKE,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        **options,
    )


def _kernel(
    q_THE: Tensor,
    k_cache_PSKE: Tensor,
    v_cache_PSKE: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    groups_BG: Tensor | None,
    scale: float,
    cascade: bool,
    impl: str,
) -> Tensor:
    tensors = q_THE, k_cache_PSKE, v_cache_PSKE, block_table_BM, seq_lens_B, cu_seqlens_q
    if impl == "cpp":
        return torch.ops.socpo.paged_attention(*tensors, scale, cascade)
    if impl == "ref" or len(q_THE) == 0:
        return paged_attention_ref(*tensors, scale=scale)
    # The decode kernel needs a table of groups, even if no sequences share pages.
    if max_seqlen_q == 1 and groups_BG is None:
        groups_BG = torch.from_numpy(ungrouped(len(seq_lens_B))).to(q_THE.device)
    launch_options = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "scale": scale}
    if impl == "flash":
        return paged_attention_flash(*tensors, **launch_options)  # type: ignore[arg-type]
    return kernels_of("paged_attention", impl).paged_attention_triton(
        *tensors,
        groups_BG=groups_BG,
        **launch_options,
    )


# max_seqlen_*: upper bounds of the query tokens and of the tokens of a sequence, known on the host.
# groups: from prefix_groups, for decode on a GPU.
paged_attention_op = define_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, "
    "Tensor seq_lens, Tensor cu_seqlens_q, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? groups, float scale, bool cascade, str impl) -> Tensor",
    _kernel,
    fake=lambda q, *_: q.new_empty(q.shape),
)
