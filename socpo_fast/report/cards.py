"""Lists GPU cards with their memory and their peak rates. Read card_named, then card_of.

The H100's bandwidth and bf16 rate in CARDS were measured on one: 3.0 TB/s for a copy, both
directions counted, and 798 TFLOP/s for a matrix product of 8192^3. All other rates come from data
sheets (dense, fp32 accumulation), and no program reaches them. The memory in CARDS is what drivers
usually report. For a card in this machine, card_of asks the driver instead.
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

import torch

from socpo_fast.device import select_device

GIB = 2**30
SHEET = "data sheet"


class Card(NamedTuple):
    """One card, in this machine or only a kind to plan for."""

    name: str  # a part of the name that the driver reports
    total_gib: float
    tb_s: float = 0  # 0: an unknown kind of card, so no times are computed
    bf16_tflop_s: float = 0
    fp32_tflop_s: float = 0
    source: str = ""  # where the rates come from
    others_gib: float = 0  # memory held by other processes


CARDS = {
    "h100": Card("H100", 79.1, 3.0, 798, 66.9, "measured; fp32: data sheet"),
    "h200": Card("H200", 139.8, 4.8, 989, 66.9, SHEET),
    "b200": Card("B200", 178.3, 8.0, 2250, 75, SHEET),
    "a100-80": Card("A100", 79.1, 2.04, 312, 19.5, SHEET),
    "a100-40": Card("A100", 39.4, 1.555, 312, 19.5, SHEET),
    "a6000": Card("RTX A6000", 47.4, 0.768, 154.8, 38.7, SHEET),
    "l40s": Card("L40S", 44.4, 0.864, 362, 91.6, SHEET),
    "rtx4090": Card("RTX 4090", 23.6, 1.008, 165.2, 82.6, SHEET),
    "rtx3090": Card("RTX 3090", 23.7, 0.936, 71, 35.6, SHEET),
    "l4": Card("NVIDIA L4", 22.0, 0.3, 121, 30.3, SHEET),
}
# These words mark variants whose names contain a known card's name but whose rates differ.
OTHER_KINDS = re.compile(r"\b(MIG|NVL|Laptop|Max-Q|4090 D|H100 PCIe)\b")


def has_card() -> bool:
    """Whether this machine has a card that torch can use."""
    return torch.cuda.is_available()


def card_named(name: str | None, device: str) -> Card:
    """Returns the named card of CARDS; for None, this machine's card that run.device names.

    Raises:
        ValueError: no card has that name, or this machine's card cannot be used.
    """
    if name is None:
        try:
            return card_of(select_device(device))
        except ValueError as error:
            reason = str(error).removesuffix("use cpu")
            raise ValueError(
                f"plan: {reason}name a kind of card with --card: {', '.join(CARDS)}"
            ) from None
    key = name.lower()
    if key in CARDS:
        return CARDS[key]
    # "a100" names two cards, so offer both rather than choosing one.
    with_prefix = [known for known in CARDS if known.startswith(key)]
    nearest = with_prefix or difflib.get_close_matches(key, CARDS, n=1)
    advice = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else "name one; without it, this machine's own is asked"
    )
    raise ValueError(f"plan: --card must be one of {', '.join(CARDS)}, got {name}; {advice}")


def card_of(device: torch.device, context_gib: float = 0) -> Card:
    """Returns a card of this machine, with the memory that other processes hold on it.

    Args:
        context_gib: memory of this process outside PyTorch's allocator (CUDA context and code),
                     which the driver reports as used and which is not the others'.
    """
    name = torch.cuda.get_device_name(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # The allocator's cache counts as used for the driver, but this process can reuse it.
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    candidates = [
        card
        for card in CARDS.values()
        if re.search(rf"\b{card.name}\b", name) and not OTHER_KINDS.search(name)
    ]
    total_gib = total_bytes / GIB
    unknown = Card(name, total_bytes / GIB)
    # Two cards may share a name (A100 with 40 or 80 GiB): the memory tells them apart.
    known = min(candidates, key=lambda card: abs(card.total_gib - total_gib), default=unknown)
    others_gib = max(total_gib - free_bytes / GIB - context_gib, 0.0)
    return known._replace(name=name, total_gib=total_gib, others_gib=others_gib)
