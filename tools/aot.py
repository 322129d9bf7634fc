"""Compiles every Triton kernel for the architectures we ship tiles for, without a GPU.

Usage: python -m tools.aot [--list] (`make aot`). Read main, then compile_all, then variants_of.

A module of kernels/ takes part as soon as it has a kernel: a function under @triton.jit whose name
ends in _kernel. The module's `aot_configs` must then yield each of its kernels (see
kernels/_launch.py).

Triton compiles one kernel several times, once for each specialisation. The configurations cover
dtypes, absent pointers and odd sizes. `variants` adds the other specialisations that a launch can
ask for: a number that is 1, a number beyond int32, and pointers that are not aligned.

Output: how evenly work is divided among the programs of tree attention's backward
(tools/tree_balance.py); then one row for each launch with its registers, spills, shared memory and
the number of its blocks (CTAs) that fit on a multiprocessor; then one JSON line.

Exit code 1, with the launch named, when a launch does not compile, spills more registers than
allowed or needs more shared memory than the architecture gives a block, or when a kernel is in no
configuration.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.tree_balance import tree_balances

if TYPE_CHECKING:
    from socpo_fast.kernels._launch import AotConfig

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# Architecture -> bytes of shared memory that one block may have. Source: CUDA C++ programming
# guide, appendix on compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Architecture -> bytes of shared memory on one multiprocessor.
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Bytes that CUDA reserves in each block. From sm_90 on cuobjdump already includes them in the
# kernel's own shared memory, so they must not be added twice.
RESERVED_SHARED = {80: 1024, 90: 0, 100: 0}
REGISTERS_OF_SM = 65536
WARPS_OF_SM = 64
BLOCKS_OF_SM = 32
REGISTERS_AT_ONCE = 256  # registers are allocated to a warp in multiples of this
# Bytes that one thread may spill. Where a tile just fits, two versions of ptxas differ by a
# register or two: one keeps a value on the stack, in cached memory, that the other keeps in a
# register. Such a spill is 8 bytes. A tile that is too large spills hundreds of bytes and costs
# more than it gains.
SPILL_ALLOWANCE = 16
# Variants are compiled for one architecture only: they are there to find type errors, and an
# argument whose type does not fit fails to compile on every architecture.
VARIANT_ARCHITECTURE = 90


class Resources(NamedTuple):
    """The resources that a cubin needs on the card."""

    registers: int  # of one thread
    spill_bytes: int  # of one thread: stack and local memory
    shared_bytes: int  # of one block: static and dynamic


class Variant(NamedTuple):
    """A specialisation of a configuration beyond its dtypes and sizes."""

    label: str = ""
    one: str = ""  # name of the argument that is 1: Triton turns it into a constant
    int64: str = ""  # name of the argument that does not fit in int32
    aligned: bool = True  # whether pointers are multiples of 16 bytes


class Launch(NamedTuple):
    """One compiled form of a kernel."""

    config: AotConfig
    variant: Variant = Variant()

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.config.label, self.variant.label)))


def main() -> int:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=about)
    parser.add_argument("--list", action="store_true", help="name the launches, compile nothing")
    only_list = parser.parse_args().list
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined
    configs, faults = discover()
    launches = [*map(Launch, configs), *variants(configs)]
    if only_list:
        for launch in launches:
            config = launch.config
            row = (config.architecture, config.kernel.__name__, config.dtype, launch.label)
            print(*row, sep="\t")
    else:
        faults += compile_all(launches, tree_balance=tree_balances())
    for fault in faults:
        print(f"aot: {fault}", file=sys.stderr)
    return 1 if faults else 0


def discover() -> tuple[list[AotConfig], list[str]]:
    """Returns the configurations of all kernels, and a message for each kernel without one."""
    configs = []
    faults = []
    for path in sorted(KERNELS.glob("*.py")):
        module = importlib.import_module(f"socpo_fast.kernels.{path.stem}")
        kernels = kernels_of(module)
        if not kernels:
            continue
        module_configs = list(module.aot_configs()) if hasattr(module, "aot_configs") else []
        configs += module_configs
        for name in kernels - {config.kernel.__name__ for config in module_configs}:
            file = f"kernels/{path.name}"
            faults.append(f"{file}: aot_configs must yield every kernel, got none for {name}")
    return configs, faults


def kernels_of(module: ModuleType) -> set[str]:
    """Returns the names of a module's kernels; other @triton.jit functions are their helpers."""
    from triton.runtime.jit import JITFunction

    functions = [(name, f) for name, f in vars(module).items() if isinstance(f, JITFunction)]
    defined = {name for name, f in functions if f.fn.__module__ == module.__name__}
    return {name for name in defined if name.endswith("_kernel")}


def variants(configs: list[AotConfig]) -> list[Launch]:
    """Returns each kernel's variants of its configuration with the fewest absent pointers."""
    fullest: dict[str, AotConfig] = {}
    for config in configs:
        name = config.kernel.__name__
        if config.architecture != VARIANT_ARCHITECTURE:
            continue
        if name not in fullest or num_absent(config) < num_absent(fullest[name]):
            fullest[name] = config
    return [
        Launch(config, variant) for config in fullest.values() for variant in variants_of(config)
    ]


def num_absent(config: AotConfig) -> int:
    """Returns how many optional pointers a configuration leaves out (passes as None)."""
    return sum(dtype is None for dtype in config.pointers.values())


def variants_of(config: AotConfig) -> list[Variant]:
    """Returns the variants of one configuration.

    An argument with an annotated type is never specialised, so it has no variants. For the others
    do_not_specialize prevents that a 1 becomes a constant, but not that a large number becomes
    int64.
    """
    results = [] if config.is_aligned else [Variant("any pointers", aligned=False)]
    for param in config.kernel.params:
        if param.annotation_type or argument_type(config, Variant(), param) != "i32":
            continue
        if not param.do_not_specialize:
            results.append(Variant(f"{param.name} = 1", one=param.name))
        results.append(Variant(f"{param.name} int64", int64=param.name))
    return results


def compile_all(launches: list[Launch], **extra_json: object) -> list[str]:
    """Compiles all launches, prints the table and the JSON line, returns what is wrong."""
    from triton import CompilationError

    started = time.perf_counter()
    rows = []
    faults = []
    numbers = ("warps", "registers", "spills B", "shared B", "CTAs an SM")
    print_row("arch", "kernel", "dtype", "launch", *numbers)
    for launch in launches:
        config = launch.config
        label = launch.label
        architecture = f"sm_{config.architecture}"
        name = config.kernel.__name__.strip("_")
        dtype = str(config.dtype).removeprefix("torch.")
        launch_name = f"{name} ({dtype}, {label}) on {architecture}"
        try:
            needs = resources_of(compile_of(launch))
        except (CompilationError, RuntimeError) as error:  # RuntimeError: from a pass or from ptxas
            faults.append(f"{launch_name}: must compile, got {type(error).__name__}: {error}")
            continue
        num_ctas = ctas_of_sm(needs, config.num_warps, config.architecture)
        print_row(architecture, name, dtype, label, config.num_warps, *needs, num_ctas)
        case = {"arch": config.architecture, "kernel": name, "dtype": dtype, "launch": label}
        rows.append({**case, "warps": config.num_warps, **needs._asdict(), "ctas_of_sm": num_ctas})
        faults += [f"{launch_name}: {fault}" for fault in faults_of(needs, config.architecture)]
    seconds = round(time.perf_counter() - started, 1)
    spills = [row["spill_bytes"] for row in rows if row["spill_bytes"]]
    worst_spill = f"at most {max(spills, default=0)} bytes a thread (allowed: {SPILL_ALLOWANCE})"
    print(f"{len(rows)} launches in {seconds} s; {len(spills)} spill, {worst_spill}")
    print(json.dumps({"bench": "aot", "launches": rows, "seconds": seconds, **extra_json}))
    return faults


def print_row(arch: str, kernel: str, dtype: str, label: str, *numbers: object) -> None:
    widths = (5, 11, 10, 10, 12)
    cells = [f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True)]
    print(f"{arch:8}{kernel:32}{dtype:9}{label:50}", *cells, sep="")


def faults_of(resources: Resources, architecture: int) -> list[str]:
    """Returns the reasons why a kernel with these needs must not be shipped."""
    faults = []
    limit = SHARED_LIMIT[architecture]
    if resources.spill_bytes > SPILL_ALLOWANCE:
        rule = f"spills must be <= {SPILL_ALLOWANCE} bytes a thread, got {resources.spill_bytes}"
        faults.append(f"{rule}; take a smaller tile or more warps")
    if resources.shared_bytes > limit:
        rule = f"shared memory must be <= {limit} bytes, got {resources.shared_bytes}"
        faults.append(f"{rule}; take a smaller tile")
    return faults


def ctas_of_sm(used: Resources, num_warps: int, architecture: int) -> int:
    """Returns how many blocks of a kernel fit on a multiprocessor at the same time."""
    registers_per_warp = -(-32 * used.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return min(
        REGISTERS_OF_SM // registers_per_warp // num_warps,
        WARPS_OF_SM // num_warps,
        SHARED_OF_SM[architecture] // max(1, used.shared_bytes + RESERVED_SHARED[architecture]),
        BLOCKS_OF_SM,
    )


def compile_of(launch: Launch) -> Any:
    """Returns Triton's compiled kernel; no device has loaded it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.config.kernel, *arguments_of(launch))
    target = GPUTarget("cuda", launch.config.architecture, 32)
    options = {
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
        **launch.config.options,
    }
    return triton.compile(source, target=target, options=options)


def arguments_of(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Returns types, constants and attributes of the arguments, as Triton derives them."""
    config, variant = launch
    params = config.kernel.params
    signature = {param.name: argument_type(config, variant, param) for param in params}
    constants: dict[str, Any] = dict(config.constants)
    constants |= {name: None for name, dtype in config.pointers.items() if dtype is None}
    if variant.one:
        constants[variant.one] = 1
    attributes = {
        (param.num,): [["tt.divisibility", 16]]
        for param in params
        if is_divisible(launch, param, signature[param.name])
    }
    return signature, constants, attributes


def is_divisible(launch: Launch, param: Any, argument: str) -> bool:
    """Whether Triton may assume that an argument is a multiple of 16."""
    if param.do_not_specialize_on_alignment:
        return False
    if argument.startswith("*"):
        return launch.variant.aligned
    is_number = argument in ("i32", "i64") and not param.annotation_type
    return is_number and not launch.config.odd_sizes and not param.do_not_specialize


def argument_type(config: AotConfig, variant: Variant, param: Any) -> str:
    """Returns an argument's type in Triton's notation, such as *bf16, i32 or constexpr."""
    import torch
    from triton.runtime.jit import mangle_type  # it takes a tensor, not a dtype

    is_absent = config.pointers.get(param.name, 0) is None
    if param.is_constexpr or is_absent or param.name == variant.one:
        return "constexpr"
    if param.name in config.pointers:
        return mangle_type(torch.empty(0, dtype=config.pointers[param.name]))
    if param.name == variant.int64:
        return "i64"
    return param.annotation_type or "i32"


def resources_of(compiled: Any) -> Resources:
    """Returns registers, stack and shared memory, from the cuobjdump that comes with Triton."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)
    counts = {name: int(value) for name, value in pairs}
    spill_bytes = counts["STACK"] + counts["LOCAL"]
    return Resources(counts["REG"], spill_bytes, counts["SHARED"] + compiled.metadata.shared)


if __name__ == "__main__":
    sys.exit(main())
