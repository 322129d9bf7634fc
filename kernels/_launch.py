"""What the kernels of this folder share: tiles keyed by architecture, and how `make aot` gets to
know a kernel.

A module with kernels has a tile table, {architecture: {dtype: Tile}}, and a function `aot_configs`
that yields an AotConfig for each way in which it launches one of them, for every entry of the
table. Tiles are chosen here and never tuned at run time: the order of every sum, and with it every
bit, depends on the architecture only.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETER = (
    0  # the "architecture" of TRITON_INTERPRET=1, whose programs run one after the other on the CPU
)
ARCHITECTURES = (80, 90, 100)  # compute capabilities that `make aot` compiles for


class Tile(NamedTuple):
    """Elements that a program holds at once, and the warps it holds them with."""

    block: int
    num_warps: int


class AotConfig(NamedTuple):
    """One launch, for `make aot`. Arguments named nowhere here are numbers: int32, or as the kernel
    annotates them.
    """

    kernel: Any  # what @triton.jit made
    architecture: int
    dtype: torch.dtype  # with the architecture, the entry of the tile table
    label: str
    num_warps: int
    pointers: Mapping[str, torch.dtype | None]  # None: not given
    constants: Mapping[str, Any]  # constexpr arguments
    # Triton compiles one variant for sizes and strides that are multiples of 16, and one for these.
    # tools/aot.py adds the variants for numbers that are 1 or int64.
    odd_sizes: bool = False
    num_stages: int = 3  # Triton's own
    is_aligned: bool = False  # the launcher sees to it that pointers are multiples of 16 bytes
    options: Mapping[str, Any] = {}  # of the launch, beside these two


AotConfigs = Iterator[AotConfig]


def architecture_of(x: Tensor) -> int:
    """The newest architecture of the tile tables that the device of `x` can run; INTERPRETER for a
    CPU tensor.
    """
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
