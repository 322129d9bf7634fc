"""Holds what all kernels share: tiles keyed by architecture, and how `make aot` finds launches.

A module with kernels has two things:

- a tile table, {architecture: {dtype: Tile}};
- a function `aot_configs`. It yields an AotConfig for each way in which the module launches a
  kernel, for every entry of the table. tools/aot.py compiles these ahead of time.

Tile sizes are constants and are never tuned at run time. They decide the order of every sum, so a
result depends on the architecture and not on what a tuner happened to measure.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The "architecture" of TRITON_INTERPRET=1, whose programs run one after the other on the CPU.
INTERPRETER = 0
ARCHITECTURES = (80, 90, 100)  # compute capabilities that `make aot` compiles for


class Tile(NamedTuple):
    """The number of elements that a program holds at once, and its number of warps."""

    block: int
    num_warps: int


class AotConfig(NamedTuple):
    """One launch that `make aot` compiles.

    Kernel arguments that are neither pointers nor constants here are numbers: int32, or of the type
    that the kernel annotates.
    """

    kernel: Any  # a function under @triton.jit
    architecture: int
    dtype: torch.dtype  # with the architecture, the key into the tile table
    label: str
    num_warps: int
    pointers: Mapping[str, torch.dtype | None]  # dtype of each tensor; None: the launch passes None
    constants: Mapping[str, Any]  # constexpr arguments
    # Triton compiles one variant for sizes and strides that are multiples of 16, and another one
    # for all others, which odd_sizes selects. tools/aot.py adds the variants for numbers that are 1
    # or int64.
    odd_sizes: bool = False
    num_stages: int = 3  # Triton's default
    is_aligned: bool = False  # the launcher passes only pointers that are multiples of 16 bytes
    options: Mapping[str, Any] = {}  # of the launch, beside num_warps and num_stages


AotConfigs = Iterator[AotConfig]


def architecture_of(x: Tensor) -> int:
    """Returns the newest known architecture that the device of x can run; INTERPRETER on a CPU."""
    if x.device.type == "cpu":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(x.device)
    known = [architecture for architecture in ARCHITECTURES if architecture <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"kernels: the GPU must have compute capability {ARCHITECTURES[0] / 10} or more, got "
            f"{major}.{minor}; "
            "use impl='ref'"
        )
    return known[-1]
