"""Cards: how much memory they have and how fast they are at best.

Of CARDS the H100's bandwidth and bf16 rate were measured on one: 3.0 TB/s copied, both directions
counted, and 798 TFLOP/s of a matrix product of 8192^3. All other rates are data sheets', dense and
with fp32 sums, which no program reaches. Memory is what drivers usually show; a card that is there
is asked.
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
    """One card, there or not."""

    name: str  # what a driver's name of it contains
    total_gib: float
    tb_s: float = 0  # 0: of no kind that is known
    bf16_tflop_s: float = 0
    fp32_tflop_s: float = 0
    source: str = ""  # of the rates
    others_gib: float = 0  # held by other processes


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
# Kinds that have a known card's name and other rates.
OTHER_KINDS = re.compile(r"\b(MIG|NVL|Laptop|Max-Q|4090 D|H100 PCIe)\b")


def card_named(name: str | None, device: str) -> Card:
    """A card of CARDS; None: that of this machine which run.device names.

    Raises:
        ValueError: there is none of that name, or this machine's cannot be used.
    """
    if name is None:
        try:
            return card_of(select_device(device))
        except ValueError as error:
            reason = str(error).removesuffix("use cpu")
            raise ValueError(
                f"plan: {reason}name a kind of card with --card: {', '.join(CARDS)}"
            ) from None
    wanted = name.lower()
    if wanted in CARDS:
        return CARDS[wanted]
    begun = [known for known in CARDS if known.startswith(wanted)]
    nearest = begun or difflib.get_close_matches(wanted, CARDS, n=1)
    advice = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else "name one; without it, this machine's own is asked"
    )
    raise ValueError(f"plan: --card must be one of {', '.join(CARDS)}, got {name}; {advice}")


def card_of(device: torch.device, context_gib: float = 0) -> Card:
    """A card of this machine, with what other processes hold of it.

    Of what is in use, context_gib are this process's own, outside of PyTorch.
    """
    name = torch.cuda.get_device_name(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    alike = [
        card
        for card in CARDS.values()
        if re.search(rf"\b{card.name}\b", name) and not OTHER_KINDS.search(name)
    ]
    total_gib = total_bytes / GIB
    unknown = Card(name, total_bytes / GIB)
    known = min(alike, key=lambda card: abs(card.total_gib - total_gib), default=unknown)
    others_gib = max(total_gib - free_bytes / GIB - context_gib, 0.0)
    return known._replace(name=name, total_gib=total_gib, others_gib=others_gib)
