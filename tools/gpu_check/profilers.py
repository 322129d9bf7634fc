"""Stage `profilers`: runs the vendor's own tools on a few launches. Last, since they are slow.

ncu measures how busy a decode and a sampling launch keep the card; compute-sanitizer looks for
reads and writes out of bounds in every op. Each tool runs this module again in a process of its
own, with one of two workloads.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from socpo_fast.kernels import linear_sample
from socpo_fast.ops import row_keys
from tools.gpu_check.check import ROOT, Check, Part, Skipped
from tools.gpu_check.decode_kernel import VARIED, DecodeCall
from tools.gpu_check.models import MODELS
from tools.gpu_check.op_cases import move, op_cases
from tools.gpu_check.processes import output_of

DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
KERNELS = "regex:_decode_kernel|_sample_tile_kernel"
# Limits of each process, seconds.
WARM_UP_S = 20
NCU_S = 20
SANITIZER_S = 30
# rows, vocabulary, width of the sanitizer's ops
SIZES = (70, 211, 24)
TINY_SIZES = (21, 67, 12)


def workload(name: str, check: Check) -> None:
    """Runs what a tool looks at: "launches" (a few large ones) or "ops" (each op once, small)."""
    if name == "launches":
        call = DecodeCall(check, VARIED[0])
        config = MODELS["Qwen3-0.6B"]
        weight = check.randn(config.vocab_size, config.hidden_size, seed=1)
        hidden = check.randn(256, config.hidden_size, seed=2)
        keys = row_keys(torch.arange(256).repeat(6, 1).t()).to(check.device)
        # ncu reports every launch; parse_ncu keeps the last one of each kernel.
        for _ in range(2):  # the first compiles
            call.run()
            ones = torch.ones(256, device=check.device)
            linear_sample.linear_sample_triton(hidden, weight, keys, ones, None)
    else:
        for run, inputs in op_cases(*(TINY_SIZES if check.tiny else SIZES)).values():
            run(move(inputs, check.dtype, check.device), "triton")
    if check.is_cuda:
        torch.cuda.synchronize()


def under(tool: str, options: list[str], name: str, check: Check, limit_s: float) -> str:
    """Runs a workload under a tool, and returns the tool's output."""
    path = shutil.which(tool)
    if path is None:
        raise Skipped(f"{tool} is not on the PATH")
    command = [path, *options, *command_of(name, check)]
    # Without PyTorch's cache each tensor has its own allocation, so the sanitizer sees its bounds.
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, text = output_of(command, limit_s=limit_s, environ=environ, folder=ROOT)
    # Slow tools are no failure of ours.
    if status is None:
        raise Skipped(f"{tool} took more than {limit_s:g} s")
    print(text[-4000:], flush=True)
    return text


def command_of(name: str, check: Check) -> list[str]:
    """Returns the command that runs this module with one workload."""
    command = [sys.executable, "-m", "tools.gpu_check.profilers", name]
    return command + ["--device", str(check.device)] + ["--tiny"] * check.tiny


def warm_up(check: Check) -> None:
    """Compiles the workloads' kernels: under a tool that would take most of the time."""
    if not any(map(shutil.which, ("ncu", "compute-sanitizer"))):
        raise Skipped("neither ncu nor compute-sanitizer is on the PATH")
    processes = [
        subprocess.Popen(command_of(name, check), cwd=ROOT) for name in ("launches", "ops")
    ]
    for process in processes:
        process.wait(timeout=WARM_UP_S)


def ncu(check: Check) -> None:
    """Measures DRAM traffic and occupancy of a decode and a sampling launch, in % of the peak."""
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--kernel-name", KERNELS]
    options += ["--metrics", f"{DRAM},{OCCUPANCY}"]
    rows = parse_ncu(under("ncu", options, "launches", check, NCU_S))
    if not rows:
        raise Skipped("ncu wrote no row; it may not be allowed to read counters here")
    for kernel, (dram, occupancy) in rows.items():
        check.figure("profilers.dram_share", dram, of=kernel)
        check.figure("profilers.occupancy_share", occupancy, of=kernel)


def parse_ncu(text: str) -> dict[str, tuple[float, float]]:
    """Returns {kernel: (DRAM, occupancy)} of its last launch, from ncu's CSV in the output."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    by_kernel = {}
    for row in csv.DictReader(lines):
        try:
            values = tuple(float(str(row[name]).replace(",", "")) for name in (DRAM, OCCUPANCY))
        except (KeyError, ValueError):
            continue  # the second row holds units
        by_kernel[row["Kernel Name"]] = values
    return {kernel: (dram, occupancy) for kernel, (dram, occupancy) in by_kernel.items()}


def sanitizer(check: Check) -> None:
    """Runs every op once under memcheck: there must be no read or write out of bounds."""
    text = under("compute-sanitizer", ["--tool", "memcheck"], "ops", check, SANITIZER_S)
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if summary is None:
        raise Skipped("compute-sanitizer gave no summary; it may not know this device")
    num_errors = int(summary[1])
    check.figure("profilers.memory_errors", num_errors)
    first = next((line for line in text.splitlines() if "Invalid" in line), "")
    assert num_errors == 0, f"compute-sanitizer found {num_errors} errors, first: {first.strip()}"


PARTS: dict[str, Part] = {"warm up": warm_up, "ncu": ncu, "sanitizer": sanitizer}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.profilers")
    parser.add_argument("workload", choices=("launches", "ops"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    workload(
        given.workload,
        Check(
            "profilers",
            device=torch.device(given.device),
            tiny=given.tiny,
            results=Path(os.devnull),
            peers=None,
        ),
    )
