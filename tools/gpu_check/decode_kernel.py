"""Launches the decode kernel by itself: one layer's attention of a batch, as shipped and varied.

A variant changes numbers that a launch usually takes from its tables: keys of a tile, split,
pipeline depth, warps. Nothing is tuned here; later work can choose from the figures of stage
`rates`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from socpo_fast.kernels import _attend, paged_attention, paged_decode
from socpo_fast.model import ModelConfig
from socpo_fast.ops.prefix_groups import prefix_groups, ungrouped
from tools.gpu_check.check import Check
from tools.gpu_check.models import MODELS
from tools.gpu_check.rooflines import attention_bytes
from tools.gpu_check.timing import median_ms

PAGE_SIZE = 32
SHARED_PROMPT = 256  # a whole split of the decode kernel: only whole splits can be shared


@dataclass(frozen=True)
class DecodeShape:
    """A decode batch. Groups share their prompt's pages; their rows are adjacent or scattered."""

    model: str
    batch: int
    context: int
    group: int = 1
    is_scattered: bool = False

    @property
    def sharing(self) -> str:
        if self.group == 1:
            return ""
        return f", {'scattered ' if self.is_scattered else ''}groups of {self.group}"


DECODE = (
    *(DecodeShape("Qwen3-0.6B", b, c) for c in (512, 2048) for b in (1, 16, 64, 256)),
    *(DecodeShape("Qwen3-0.6B", 256, 512, group=8, is_scattered=s) for s in (False, True)),
    *(DecodeShape("Qwen3-4B", b, 1024) for b in (16, 64)),
)
TINY_DECODE = (
    DecodeShape("tiny", 3, 40),
    DecodeShape("tiny", 8, 70, group=8),
    DecodeShape("tiny", 16, 70, group=8, is_scattered=True),
)
# The shapes on which variants are tried: many sequences (bound by bytes) and few (by latency).
VARIED = (DecodeShape("Qwen3-0.6B", 256, 1024), DecodeShape("Qwen3-0.6B", 16, 1024))
VARIANTS: dict[str, dict[str, int]] = {
    "as shipped": {},
    "no cascade": {"cascade": 0},
    "split 64": {"split": 64},
    "split 128": {"split": 128},
    "8 warps": {"num_warps": 8},
    "16 rows": {"rows": 16},
    "64 rows": {"rows": 64},
    "3 stages": {"num_stages": 3},
    "64 keys": {"keys": 64},
    "64 keys, 3 stages": {"keys": 64, "num_stages": 3},
    "split 512": {"split": 512},
    "split 512, 64 keys": {"split": 512, "keys": 64},
}


class DecodeCall:
    """One layer's decode attention of a batch, ready to launch."""

    def __init__(self, check: Check, shape: DecodeShape):
        self.check = check
        self.shape = shape
        self.config = MODELS[shape.model]
        self.num_shared = SHARED_PROMPT if shape.group > 1 and not check.tiny else 0
        self.cascade = True
        self.tensors = decode_inputs(check, self.config, shape, self.num_shared)
        table, seq_lens, _ = (x.cpu().numpy() for x in self.tensors[3:])
        groups = prefix_groups(table, seq_lens, PAGE_SIZE)
        self.groups = torch.from_numpy(groups).to(check.device)
        # Groups in which each sequence is alone: the kernel then shares nothing ("no cascade").
        self.ungrouped = torch.from_numpy(ungrouped(len(groups))).to(check.device)

    def run(self) -> Tensor:
        return paged_attention.paged_attention_triton(
            *self.tensors,
            scale=self.config.head_dim**-0.5,
            max_seqlen_q=1,
            max_seqlen_k=self.shape.context,
            groups_BG=self.groups if self.cascade else self.ungrouped,
        )

    def gb_s(self) -> float:
        """Returns the rate in GB/s, of the bytes that must be read if nothing is read twice."""
        ms = median_ms(self.run, self.check.device, in_graph=True)
        seq_lens = [self.shape.context] * self.shape.group
        itemsize = self.tensors[0].itemsize
        num_bytes = attention_bytes(self.config, seq_lens, self.num_shared, itemsize)
        # attention_bytes counts one group; all groups are alike.
        num_groups = self.shape.batch // self.shape.group
        return 1e-6 * num_groups * num_bytes / ms


def decode_inputs(
    check: Check, config: ModelConfig, shape: DecodeShape, num_shared: int
) -> tuple[Tensor, ...]:
    """Makes q, pages in random order, and block tables whose groups share a prompt's pages."""
    pages_per_row = -(-shape.context // PAGE_SIZE)
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(shape.batch * pages_per_row, generator=generator).view(
        -1, shape.group, pages_per_row
    )
    shared_pages = num_shared // PAGE_SIZE
    table[:, :, :shared_pages] = table[:, :1, :shared_pages].clone()
    heads = config.num_kv_heads, config.head_dim
    k, v = (
        check.randn(shape.batch * pages_per_row, PAGE_SIZE, *heads, seed=seed) for seed in (1, 2)
    )
    q = check.randn(shape.batch, config.num_heads, config.head_dim, seed=3)
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32)
    cu_seqlens = torch.arange(shape.batch + 1, dtype=torch.int32)
    table = table.flatten(0, 1).int()
    if shape.is_scattered:
        # In a real batch siblings end and start at different times, so their rows are not adjacent.
        table = table[torch.randperm(shape.batch, generator=generator)]
    index = (x.to(check.device) for x in (table, seq_lens, cu_seqlens))
    return (q, k, v, *index)


@contextmanager
def variant(
    *, rows: int = 0, keys: int = 0, split: int = 0, num_stages: int = 0, num_warps: int = 0
) -> Iterator[None]:
    """Launches the decode kernel with other numbers than it ships with; 0 keeps a number."""
    tiles = paged_decode.DECODE_TILES
    launch_for = _attend.launch_for
    numbers = {"rows": rows, "keys": keys, "split": split, "num_stages": num_stages}
    changes = {name: number for name, number in numbers.items() if number}

    def launch_with_warps(*arguments: Any) -> _attend.Launch:
        launch = launch_for(*arguments)
        return launch._replace(num_warps=num_warps or launch.num_warps)

    try:
        # The launch reads both from module globals, so they are replaced for the time of the block.
        paged_decode.DECODE_TILES = {
            architecture: {dtype: tile._replace(**changes) for dtype, tile in by_dtype.items()}
            for architecture, by_dtype in tiles.items()
        }
        paged_attention.launch_for = launch_with_warps
        yield
    finally:
        paged_decode.DECODE_TILES = tiles
        paged_attention.launch_for = launch_for


class WithOptions:
    """A Triton kernel that adds options to every launch."""

    def __init__(self, kernel: Any, **options: int | None):
        self.kernel = kernel
        self.options = options

    def __getitem__(self, grid: Any) -> Any:
        launch = self.kernel[grid]
        return lambda *tensors, **settings: launch(*tensors, **settings | self.options)
