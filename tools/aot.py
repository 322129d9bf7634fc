"""Compiles every Triton kernel for the architectures we ship tiles for, without a GPU.

Usage: python -m tools.aot [--list] (`make aot`). A module of kernels/ joins by having kernels,
functions under @triton.jit named *_kernel: it must then yield each of them from its `aot_configs`
(see kernels/_launch.py).

Triton compiles a kernel anew for all that it specialises on. The configurations cover dtypes,
absent pointers and odd sizes. `variants` adds what else a launch can make of a kernel: each number
that is 1, each number beyond int32, and pointers that start anywhere.

Prints how even the programs of tree attention's backward are (tools/tree_balance.py), a row a
launch, with the registers, spills and shared memory it needs and how many of its blocks (CTAs) a
multiprocessor holds, and one JSON line.
Exit code 1, naming the launch, when it does not compile, when registers spill beyond the allowance,
when shared memory is over what a block of the architecture may have, or when a kernel is in no
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
# CUDA C++ programming guide, appendix on compute capabilities: bytes a block
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# and a multiprocessor
SHARED_OF_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
# Of each block, by CUDA; from sm_90 on cuobjdump counts it among the kernel's own.
RESERVED_SHARED = {80: 1024, 90: 0, 100: 0}
REGISTERS_OF_SM = 65536
WARPS_OF_SM = 64
BLOCKS_OF_SM = 32
REGISTERS_AT_ONCE = 256  # a warp gets multiples of so many
# Bytes a thread may spill. Two versions of ptxas differ by a register or two where a tile just
# fits: one of them keeps on the stack, in cached memory, what the other keeps in a register. Such a
# spill is 8 bytes; that of a tile which is too large is hundreds, and costs more than it gains.
SPILL_ALLOWANCE = 16
# Variants are compiled for one architecture: a type that does not fit fails in every one of them.
VARIANT_ARCHITECTURE = 90


class Resources(NamedTuple):
    """What a cubin asks of the card."""

    registers: int  # a thread
    spill_bytes: int  # a thread: stack and local memory
    shared_bytes: int  # a block: static and dynamic


class Variant(NamedTuple):
    """What Triton specialises a configuration on besides its dtypes and sizes."""

    label: str = ""
    one: str = ""  # the number that is 1, which Triton then takes for a constant
    int64: str = ""  # the number that does not fit in int32
    aligned: bool = True  # pointers are multiples of 16 bytes


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
    """The configurations of all modules of kernels/, and what is missing from them."""
    configs = []
    faults = []
    for path in sorted(KERNELS.glob("*.py")):
        module = importlib.import_module(f"socpo_fast.kernels.{path.stem}")
        kernels = kernels_of(module)
        if not kernels:
            continue
        found = list(module.aot_configs()) if hasattr(module, "aot_configs") else []
        configs += found
        for name in kernels - {config.kernel.__name__ for config in found}:
            where = f"kernels/{path.name}"
            faults.append(f"{where}: aot_configs must yield every kernel, got none for {name}")
    return configs, faults


def kernels_of(module: ModuleType) -> set[str]:
    """Names of the kernels a module defines; others under @triton.jit are parts of these."""
    from triton.runtime.jit import JITFunction

    functions = [(name, f) for name, f in vars(module).items() if isinstance(f, JITFunction)]
    defined = {name for name, f in functions if f.fn.__module__ == module.__name__}
    return {name for name in defined if name.endswith("_kernel")}


def variants(configs: list[AotConfig]) -> list[Launch]:
    """Of each kernel, the variants of the configuration in which most pointers are given."""
    fullest: dict[str, AotConfig] = {}
    for config in configs:
        name = config.kernel.__name__
        if config.architecture != VARIANT_ARCHITECTURE:
            continue
        if name not in fullest or num_absent(config) < num_absent(fullest[name]):
            fullest[name] = config
    return [Launch(config, v) for config in fullest.values() for v in variants_of(config)]


def num_absent(config: AotConfig) -> int:
    return sum(dtype is None for dtype in config.pointers.values())


def variants_of(config: AotConfig) -> list[Variant]:
    """The variants of one configuration.

    A number whose type is annotated has no others. do_not_specialize keeps a number that is 1 from
    becoming a constant, but not a large one from becoming int64.
    """
    found = [] if config.is_aligned else [Variant("any pointers", aligned=False)]
    for param in config.kernel.params:
        if param.annotation_type or argument_type(config, Variant(), param) != "i32":
            continue
        if not param.do_not_specialize:
            found.append(Variant(f"{param.name} = 1", one=param.name))
        found.append(Variant(f"{param.name} int64", int64=param.name))
    return found


def compile_all(launches: list[Launch], **others: object) -> list[str]:
    """Compile, print the table and the JSON line, others in it; returns what is wrong."""
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
        where = f"{name} ({dtype}, {label}) on {architecture}"
        try:
            used = resources_of(compile_of(launch))
        except (CompilationError, RuntimeError) as error:  # the latter from passes and from ptxas
            faults.append(f"{where}: must compile, got {type(error).__name__}: {error}")
            continue
        num_ctas = ctas_of_sm(used, config.num_warps, config.architecture)
        print_row(architecture, name, dtype, label, config.num_warps, *used, num_ctas)
        case = {"arch": config.architecture, "kernel": name, "dtype": dtype, "launch": label}
        rows.append({**case, "warps": config.num_warps, **used._asdict(), "ctas_of_sm": num_ctas})
        faults += [f"{where}: {fault}" for fault in faults_of(used, config.architecture)]
    seconds = round(time.perf_counter() - started, 1)
    spills = [row["spill_bytes"] for row in rows if row["spill_bytes"]]
    most = f"at most {max(spills, default=0)} bytes a thread (allowed: {SPILL_ALLOWANCE})"
    print(f"{len(rows)} launches in {seconds} s; {len(spills)} spill, {most}")
    print(json.dumps({"bench": "aot", "launches": rows, "seconds": seconds, **others}))
    return faults


def print_row(arch: str, kernel: str, dtype: str, label: str, *numbers: object) -> None:
    widths = (5, 11, 10, 10, 12)
    cells = [f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True)]
    print(f"{arch:8}{kernel:32}{dtype:9}{label:50}", *cells, sep="")


def faults_of(used: Resources, architecture: int) -> list[str]:
    """What keeps a kernel with these needs from being shipped."""
    faults = []
    limit = SHARED_LIMIT[architecture]
    if used.spill_bytes > SPILL_ALLOWANCE:
        rule = f"spills must be <= {SPILL_ALLOWANCE} bytes a thread, got {used.spill_bytes}"
        faults.append(f"{rule}; take a smaller tile or more warps")
    if used.shared_bytes > limit:
        rule = f"shared memory must be <= {limit} bytes, got {used.shared_bytes}"
        faults.append(f"{rule}; take a smaller tile")
    return faults


def ctas_of_sm(used: Resources, num_warps: int, architecture: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at once."""
    by_warp = -(-32 * used.registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return min(
        REGISTERS_OF_SM // by_warp // num_warps,
        WARPS_OF_SM // num_warps,
        SHARED_OF_SM[architecture] // max(1, used.shared_bytes + RESERVED_SHARED[architecture]),
        BLOCKS_OF_SM,
    )


def compile_of(launch: Launch) -> Any:
    """Returns Triton's compiled kernel, which no device has loaded."""
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
    """Types, constants and attributes of the arguments, as Triton finds them at such a launch."""
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
    """Whether Triton compiles for an argument that is a multiple of 16."""
    if param.do_not_specialize_on_alignment:
        return False
    if argument.startswith("*"):
        return launch.variant.aligned
    is_number = argument in ("i32", "i64") and not param.annotation_type
    return is_number and not launch.config.odd_sizes and not param.do_not_specialize


def argument_type(config: AotConfig, variant: Variant, param: Any) -> str:
    """Triton's word for an argument's type."""
    import torch
    from triton.runtime.jit import mangle_type  # takes a tensor

    is_absent = config.pointers.get(param.name, 0) is None
    if param.is_constexpr or is_absent or param.name == variant.one:
        return "constexpr"
    if param.name in config.pointers:
        return mangle_type(torch.empty(0, dtype=config.pointers[param.name]))
    if param.name == variant.int64:
        return "i64"
    return param.annotation_type or "i32"


def resources_of(compiled: Any) -> Resources:
    """Registers, stack and shared memory, as the cuobjdump that comes with Triton tells them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)
    used = {name: int(value) for name, value in pairs}
    spill_bytes = used["STACK"] + used["LOCAL"]
    return Resources(used["REG"], spill_bytes, used["SHARED"] + compiled.metadata.shared)


if __name__ == "__main__":
    sys.exit(main())
