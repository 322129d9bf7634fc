"""Sizes the KV cache. Read kv_cache_size, then auto_kv_cache_size, which does the sum.

    card    | weights | gradients, moments | activations | KV cache | free      |
                        optimizer_bytes      0.3 of card   the rest, up to max_pages

Departure from a serving engine: the cache is not a fixed share of the card, because the trainer
needs the card too. The cache is allocated once, before the first update. So this leaves free all
that an update will need. Otherwise the run would fail at its first update instead of at its start.
A run counts more exactly, with its own lengths (report/memory_plan.py). The rule here is for an
Engine that is made without such a plan.
"""

from math import inf
from typing import Literal, NamedTuple

import torch

from socpo_fast.engine.runner import Runner
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._checks import check_rule

GIB = 2**30
CPU_GIB = 1.0
# Bytes for each trained parameter: its gradient and two moments in fp32, 3 * 4. A bf16 parameter
# also has the low half of its fp32 master, 2 bytes.
OPTIMIZER_BYTES = {torch.float32: 12, torch.bfloat16: 14}
# Kept free for the activations of a microbatch, the policy head, what rollouts allocate beside the
# pages, and the gaps that an allocator leaves. On an H100 it is 23.7 GiB.
ACTIVATION_SHARE = 0.3


class KVCacheSize(NamedTuple):
    """The size of a KV cache, and one line that says where the number comes from."""

    gib: float
    note: str


def kv_cache_size(
    student: Decoder, kv_cache_gib: float | Literal["auto"], page_size: int, max_running: int
) -> KVCacheSize:
    """Returns the requested size; for "auto" 1 GiB on a CPU, what updates leave free on a GPU.

    Free memory is what the driver reports, plus what PyTorch's allocator holds without using it.
    Gradients and moments are counted for every parameter that requires grad. Those that exist
    already are counted twice, which errs on the safe side.

    Raises:
        ValueError: kv_cache_gib is neither a number > 0 nor "auto", or the card has too little.
    """
    if kv_cache_gib != "auto":
        check_rule(
            "Engine",
            "kv_cache_gib",
            kv_cache_gib,
            not isinstance(kv_cache_gib, str) and 0 < kv_cache_gib < inf,
            'GiB > 0 or "auto"',
        )
        return KVCacheSize(kv_cache_gib, f"KV cache {kv_cache_gib:.3g} GiB")
    weight = student.lm_head.weight
    device = weight.device
    if device.type != "cuda":
        return KVCacheSize(CPU_GIB, f"KV cache {CPU_GIB:.3g} GiB (auto)")
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # The driver counts these as taken, but a new tensor can have them.
    unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    num_trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return auto_kv_cache_size(
        free_bytes + unused_bytes,
        total_bytes,
        optimizer_bytes=OPTIMIZER_BYTES.get(weight.dtype, 0) * num_trained,
        page_bytes=Runner.page_bytes(student, page_size),
        max_pages=max_running * -(-student.config.max_position_embeddings // page_size),
    )


def auto_kv_cache_size(
    free_bytes: int,
    total_bytes: int,
    *,
    optimizer_bytes: int,
    page_bytes: int,
    max_pages: int,
) -> KVCacheSize:
    """Returns how much of a card's free memory the KV cache may take, once the weights are loaded.

        min(free - optimizer - ACTIVATION_SHARE * total, max_pages * page)

    Args:
        optimizer_bytes: of the gradients and moments that updates will allocate.
        max_pages:       that max_running sequences of the model's longest context fill.

    Raises:
        ValueError: less than a page is left.
    """
    reserve_bytes = int(ACTIVATION_SHARE * total_bytes)
    left_bytes = free_bytes - optimizer_bytes - reserve_bytes
    note = (
        f"{free_bytes / GIB:.1f} free, {optimizer_bytes / GIB:.1f} for gradients and moments, "
        f"{reserve_bytes / GIB:.1f} kept for activations"
    )
    if left_bytes < page_bytes:
        raise ValueError(
            f"Engine: kv_cache_gib auto must leave a page of KV, got {left_bytes / GIB:.1f} GiB: "
            f"{note}; set engine.kv_cache_gib, or use a smaller model, bfloat16 or a larger card"
        )
    if left_bytes > max_pages * page_bytes:
        left_bytes = max_pages * page_bytes
        note += ", no more than max_running contexts can fill"
    return KVCacheSize(left_bytes / GIB, f"KV cache {left_bytes / GIB:.3g} GiB (auto): {note}")
