"""Writes docs/kernels.md: what each Triton kernel needs of a card, and its least time on paper.

Usage: python -m tools.kernels_doc [FILE] (`make kernels-doc`). No GPU is needed: kernels are
compiled for sm_80 and sm_90 as `make aot` does. Nothing in the file was measured on a card. Read
resources_table, which compiles, and work_table, which counts (tools/kernel_work.py).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from tools import aot
from tools.gpu_check.walk import write_between_marks
from tools.kernel_work import CARDS, STUDENT, works

FILE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
BEGIN = "<!-- begin of the tables -->"
END = "<!-- end of the tables -->"
ARCHITECTURES = (80, 90)


class Compiled(NamedTuple):
    """A launch compiled for one architecture."""

    used: aot.Resources
    num_ctas: int  # blocks that fit on a multiprocessor
    buffers: str  # see buffers_of


def main(arguments: list[str]) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined
    path = Path(arguments[0]) if arguments else FILE
    text = "\n".join([*resources_table(), "", *work_table()])
    write_between_marks(path, text, (BEGIN, END))
    return 0


def resources_table() -> Iterator[str]:
    """Yields a row for each launch, with the numbers of sm_80 and sm_90, one where they agree."""
    import triton

    about = "sm_80 / sm_90, one number where both agree; fp16 is as bf16"
    yield f"Triton {triton.__version__}; {about}."
    yield ""
    yield from header(
        "kernel", "dtype", "launch", "warps", "registers", "shared KiB", "CTAs an SM", "buffers"
    )
    launches: dict[tuple[str, str, str], dict[int, Compiled]] = {}
    warps: dict[tuple[str, str, str], dict[int, int]] = {}
    for config in aot.discover()[0]:
        # fp16 is left out: it has the tiles of bf16.
        if config.architecture not in ARCHITECTURES or config.dtype == torch.float16:
            continue
        dtype = str(config.dtype).removeprefix("torch.")
        key = (config.kernel.__name__, dtype, config.label)
        launches.setdefault(key, {})[config.architecture] = compiled_of(aot.Launch(config))
        warps.setdefault(key, {})[config.architecture] = config.num_warps
    for (kernel, dtype, label), by_arch in launches.items():
        cells = [
            by_architecture({a: str(c.used.registers) for a, c in by_arch.items()}),
            by_architecture({a: f"{c.used.shared_bytes / 1024:.3g}" for a, c in by_arch.items()}),
            by_architecture({a: str(c.num_ctas) for a, c in by_arch.items()}),
            by_architecture({a: c.buffers for a, c in by_arch.items()}),
        ]
        # Tiles and warps may differ by architecture, so a cell can hold two numbers.
        num_warps = by_architecture({a: str(n) for a, n in warps[kernel, dtype, label].items()})
        yield row(f"`{kernel.strip('_')}`", dtype, label, num_warps, *cells)


def work_table() -> Iterator[str]:
    """Yields a row for each kernel: bytes, FLOPs, and the least time on each card."""
    cards = ", ".join(f"{c.name} {c.tb_s:g} TB/s and {c.bf16_tflop_s:g} TFLOP/s" for c in CARDS)
    yield f"{STUDENT} in bf16; {cards}."
    yield ""
    yield from header("kernel", "launch", "MB", "GFLOP", *(f"{card.name} us" for card in CARDS))
    for kernel, work in works().items():
        times = (f"{card.us(work):.3g}" for card in CARDS)
        flops = f"{work.num_flops / 1e9:.3g}" if work.num_flops else ""
        megabytes = f"{work.num_bytes / 1e6:.3g}"
        yield row(f"`{kernel.strip('_')}`", work.of, megabytes, flops, *times)


def compiled_of(launch: aot.Launch) -> Compiled:
    """Compiles a launch and returns what it needs."""
    compiled = aot.compile_of(launch)
    used = aot.resources_of(compiled)
    num_ctas = aot.ctas_of_sm(used, launch.config.num_warps, launch.config.architecture)
    return Compiled(used, num_ctas, buffers_of(compiled.asm["ttgir"]))


def buffers_of(ttgir: str) -> str:
    """Returns the shared-memory tiles that hold loads in flight: how many, and of what size.

    A single buffer means that a load does not overlap with the computation on the tile before it.
    """
    # An allocation without an initial value is a buffer of the pipeline. Its type lists the number
    # of stages first, then the tile: <3x64x128xbf16>.
    allocation = (
        r"ttg\.local_alloc\s*(?:\{[^}]*\}\s*)?: \(\) -> !ttg\.memdesc<(\d+)x((?:\d+x)*)(\w+)"
    )
    matches = re.findall(allocation, ttgir)
    tiles = [
        (int(number), f"{sizes.removesuffix('x') or 1} {kind}") for number, sizes, kind in matches
    ]
    return ", ".join(f"{number} of {tile}" for number, tile in dict.fromkeys(tiles))


def by_architecture(values: dict[int, str]) -> str:
    """Returns the one value where all architectures agree, else all of them, "a / b"."""
    different = dict.fromkeys(values.values())
    return next(iter(different)) if len(different) == 1 else " / ".join(values.values())


def header(*names: str) -> Iterator[str]:
    yield row(*names)
    yield row(*("---" for _ in names))


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
