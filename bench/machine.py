"""Prepares a bench's machine: the options --device and --dtype, measured peaks, the header card.

    add_options(parser)    settle(parser, args)    print_card(measure_card(threads, device, dtype))

A CPU computes products in fp32, whatever dtype the weights are stored in, since it has no fast bf16
arithmetic. A card computes them in the dtype of the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.measure import CPU, MIB, free_gib, seconds_of
from socpo_fast.device import set_threads
from socpo_fast.ops._head import matmul_
from socpo_fast.ops._impl import extension_is_built
from socpo_fast.report.environment import cpu_name, environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Matmul = Callable[[Tensor, Tensor, Tensor, bool], object]  # out, a, b, whether to add to out


def add_options(parser: argparse.ArgumentParser, *, with_dtype: bool = True) -> None:
    """Adds --device, and --dtype for a bench that makes or loads weights."""
    words = "where tensors are; a card's times are those of CUDA events"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=words)
    if with_dtype:
        words = "of weights and hidden states; default fp32, on a card bf16"
        parser.add_argument("--dtype", choices=tuple(DTYPES), help=words)


def settle(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turns the texts of both options into a torch.device and a torch.dtype.

    Ends the bench with exit status 2 and one line if --device names a card that is not there.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        rule = "--device must be cpu where no CUDA card is found, got cuda"
        parser.exit(2, f"bench: {rule}\n")
    args.device = torch.device(args.device)
    if "dtype" in args:
        args.dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a product's factors on this device, for weights stored in `dtype`."""
    return dtype if device.type == "cuda" else torch.float32


def matmuls(device: torch.device = CPU) -> dict[str, Matmul]:
    """Returns the available GEMMs: torch's own, and on a CPU ours if the extension is built."""

    def torch_mm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        if out.is_cuda:  # dW has bf16 factors and an fp32 sum, which plain addmm refuses
            matmul_(out, a, b, accumulate=accumulate)
        else:
            torch.addmm(out, a, b, beta=float(accumulate), out=out)

    has_ours = device.type == "cpu" and extension_is_built()
    ours: dict[str, Matmul] = {"socpo": torch.ops.socpo.matmul_} if has_ours else {}
    return {"torch": torch_mm} | ours


def peak_gflop_s(
    library: str,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    num_runs: int = 5,
) -> float:
    """Returns the rate of the fastest of a few large square GEMMs."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    matmul = matmuls(device)[library]
    return 2e-9 * size**3 / _best_seconds(lambda: matmul(out, a, b, False), device, num_runs)


def peak_gb_s(
    device: torch.device = CPU, *, num_mib: int | None = None, num_runs: int = 5
) -> float:
    """Returns the rate of the fastest of a few large copies; reads and writes both count."""
    # Far larger than any cache, so that memory is measured.
    num_mib = num_mib or (2048 if device.type == "cuda" else 256)
    source = torch.ones(num_mib * MIB // 4, device=device)
    target = torch.zeros_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device, num_runs)
    return 2e-9 * num_mib * MIB / seconds


def measure_card(
    num_threads: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Sets the number of threads, measures the machine's peaks and describes the machine.

    `peak_gflop_s` is the fastest library's, in the dtype in which products are computed.
    """
    # Before the peaks are measured, as these depend on it.
    set_threads(num_threads)
    is_card = device.type == "cuda"
    names = {"device": torch.cuda.get_device_name(device) if is_card else f"CPU {cpu_name()}"}
    factor_dtype = product_dtype(device, dtype)
    names["dtype"] = str(dtype).removeprefix("torch.")
    names["gemm_dtype"] = str(factor_dtype).removeprefix("torch.")
    rates = {library: peak_gflop_s(library, device, factor_dtype) for library in matmuls(device)}
    peaks = {f"{library}_gflop_s": rate for library, rate in rates.items()}
    peaks |= {"peak_gflop_s": max(rates.values()), "peak_gb_s": peak_gb_s(device)}
    return environment() | names | peaks | {"free_gib": free_gib(device)}


def print_card(card: Mapping[str, Any]) -> None:
    """Prints the header of a bench, a line for each fact."""
    for name, value in card.items():
        print(f"  {name:18}{f'{value:.1f}' if isinstance(value, float) else value}")
    print(flush=True)


def _best_seconds(run: Callable[[], object], device: torch.device, num_runs: int) -> float:
    if device.type == "cuda":  # the first call loads the kernels
        run()
    return min(seconds_of(run, device) for _ in range(num_runs))
