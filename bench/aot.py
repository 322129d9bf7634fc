"""Compiles every Triton kernel for the architectures we ship tiles for, without a GPU, and reads what each one needs.

Usage: python -m bench.aot [--list] (`make aot`). A module of kernels/ joins by having kernels, functions under
@triton.jit named *_kernel: it must then yield each of them from its `aot_configs` (see kernels/_launch.py).

Prints a row a launch and one JSON line. Exit code 1, naming the launch, when registers spill (the cubin then has a
stack), when shared memory is over what a block of the architecture may have, or when a kernel is in no configuration.
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

if TYPE_CHECKING:
    from socpo_fast.kernels._launch import AotConfig

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block; CUDA C++ programming guide, appendix


class Resources(NamedTuple):
    """What a cubin asks of the card."""

    registers: int  # a thread
    spill_bytes: int  # a thread: stack and local memory
    shared_bytes: int  # a block: static and dynamic


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the launches, compile nothing")
    only_list = parser.parse_args().list
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined
    configs, faults = discover()
    if only_list:
        for config in configs:
            print(config.architecture, config.kernel.__name__, config.dtype, config.label, sep="\t")
    else:
        faults += compile_all(configs)
    for fault in faults:
        print(f"aot: {fault}", file=sys.stderr)
    return 1 if faults else 0


def discover() -> tuple[list[AotConfig], list[str]]:
    """The configurations of all modules of kernels/, and what is missing from them."""
    configs, faults = [], []
    for path in sorted(KERNELS.glob("*.py")):
        module = importlib.import_module(f"socpo_fast.kernels.{path.stem}")
        kernels = kernels_of(module)
        if not kernels:
            continue
        found = list(module.aot_configs()) if hasattr(module, "aot_configs") else []
        configs += found
        missing = kernels - {config.kernel.__name__ for config in found}
        faults += [f"kernels/{path.name}: aot_configs must yield every kernel, got none for {name}" for name in missing]
    return configs, faults


def kernels_of(module: ModuleType) -> set[str]:
    """Names of the kernels that a module defines; other functions under @triton.jit are parts of these."""
    from triton.runtime.jit import JITFunction

    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


def compile_all(configs: list[AotConfig]) -> list[str]:
    """Compile, print the table and the JSON line; returns what is wrong."""
    started, rows, faults = time.perf_counter(), [], []
    print(
        f"{'arch':8}{'kernel':32}{'dtype':9}{'launch':42}{'warps':>5}{'registers':>11}{'spills B':>10}{'shared B':>10}"
    )
    for config in configs:
        name, limit = config.kernel.__name__.strip("_"), SHARED_LIMIT[config.architecture]
        dtype = str(config.dtype).removeprefix("torch.")
        registers, spill_bytes, shared_bytes = used = compile_one(config)
        print(
            f"sm_{config.architecture:<5}{name:32}{dtype:9}{config.label:42}"
            f"{config.num_warps:5}{registers:11}{spill_bytes:10}{shared_bytes:10}"
        )
        case = {"arch": config.architecture, "kernel": name, "dtype": dtype, "launch": config.label}
        rows.append({**case, "warps": config.num_warps, **used._asdict()})
        where = f"{name} ({dtype}, {config.label}) on sm_{config.architecture}"
        if spill_bytes:
            faults.append(f"{where}: spills must be 0 bytes, got {spill_bytes}; take a smaller tile or more warps")
        if shared_bytes > limit:
            faults.append(f"{where}: shared memory must be <= {limit} bytes, got {shared_bytes}; take a smaller tile")
    print(json.dumps({"bench": "aot", "launches": rows, "seconds": round(time.perf_counter() - started, 1)}))
    return faults


def compile_one(config: AotConfig) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {param.name: argument_type(config, param) for param in config.kernel.params}
    constants = {**config.constants} | {name: None for name, dtype in config.pointers.items() if dtype is None}
    attributes = {
        (param.num,): [["tt.divisibility", 16]]
        for param in config.kernel.params
        if (signature[param.name].startswith("*") and not param.do_not_specialize_on_alignment)
        or (signature[param.name] == "i32" and not config.odd_sizes and not param.do_not_specialize)
    }
    source = ASTSource(config.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", config.architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": config.num_warps})
    return read_resources(compiled.asm["cubin"], compiled.metadata.shared)


def argument_type(config: AotConfig, param: Any) -> str:
    """Triton's word for an argument's type."""
    import torch
    from triton.runtime.jit import mangle_type  # takes a tensor

    if param.is_constexpr or config.pointers.get(param.name, 0) is None:
        return "constexpr"
    if param.name in config.pointers:
        return mangle_type(torch.empty(0, dtype=config.pointers[param.name]))
    return param.annotation_type or "i32"


def read_resources(cubin: bytes, dynamic_shared_bytes: int) -> Resources:
    """Registers, stack and shared memory, as the cuobjdump that comes with Triton tells them."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"] + dynamic_shared_bytes)


if __name__ == "__main__":
    sys.exit(main())
