"""Stage `machine`: names the card, the versions, the free memory and the tools at hand."""

from __future__ import annotations

import os
import platform
import shutil

import torch

from socpo_fast.kernels.swiglu import swiglu
from socpo_fast.ops._impl import available_impls, extension_is_built
from socpo_fast.report.environment import environment, installed_version
from tools.gpu_check.check import Check, Part, query_driver
from tools.gpu_check.timing import wall_ms

TOOLS = ("nvidia-smi", "gcc", "ncu", "compute-sanitizer", "nvcc")
PACKAGES = ("numpy", "pydantic", "pytest", "pytest-xdist", "liger-kernel", "trl", "verl")
SMI_FIELDS = "name,driver_version,memory.total,memory.free,power.limit,clocks.max.sm,clocks.max.mem"


def describe(check: Check) -> None:
    """Records versions and tools, as one note."""
    facts = dict(environment())
    facts |= {package: installed_version(package) for package in PACKAGES}
    facts |= {tool: shutil.which(tool) or "not found" for tool in TOOLS}
    facts["extension"] = (
        "built" if extension_is_built() else "not built: the CPU's side is plain torch"
    )
    impls = available_impls(check.device)
    facts["ops"] = ", ".join(f"{op}={impl}" for op, impl in impls.items())
    text = "\n".join(f"{name:20}{value}" for name, value in facts.items())
    check.note(text)
    print(text, flush=True)
    # The cores of this process: a container may have fewer than the machine.
    check.figure("machine.cpu_cores", len(os.sched_getaffinity(0)))


def describe_card(check: Check) -> None:
    """Records what the driver and PyTorch report about the card."""
    if not check.is_cuda:
        check.note(f"rehearsed on {platform.machine()}")
        return
    assert torch.cuda.is_available(), f"torch {torch.__version__} must see the card"
    properties = torch.cuda.get_device_properties(check.device)
    facts = {
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 MiB": properties.L2_cache_size / 2**20,
        "shared KiB a block": properties.shared_memory_per_block / 2**10,
    }
    check.note("\n".join(f"{name:20}{value}" for name, value in facts.items()))
    free, total = torch.cuda.mem_get_info(check.device)
    check.figure("machine.memory_gib", total / 2**30)
    check.figure("machine.memory_free_gib", free / 2**30, limit=total / 2**30)
    if shutil.which("nvidia-smi"):
        check.note(query_driver(SMI_FIELDS))


def first_kernel(check: Check) -> None:
    """Compiles one kernel: without a C compiler or a cache folder every later stage would fail."""
    x = check.randn(3, 8, seed=0)
    check.figure("machine.first_kernel_s", 1e-3 * wall_ms(lambda: swiglu(x), check.device))


PARTS: dict[str, Part] = {
    "describe": describe,
    "describe card": describe_card,
    "first kernel": first_kernel,
}
