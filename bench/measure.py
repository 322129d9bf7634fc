"""Measures calls for every bench: seconds, rounds of contenders, memory; prints aligned rows.

    timed(run, device)    time_rounds(runs, ..)    spread(seconds)    extra_peak_mib(run, device)

On a card a call's seconds are those between two CUDA events around it, on a CPU those of the clock.
Contenders are timed in rounds, and each runs once a round. If the machine slows down, it slows all
of them. Ratios are therefore only quoted within one set of rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd.profiler import profile

Result = TypeVar("Result")

CPU = torch.device("cpu")
MIB = 1 << 20
SHORT_S = 2.0  # in a shorter first run, warming up is a visible part of the time


class Spread(NamedTuple):
    """The seconds of several calls: median and percentiles."""

    median_s: float
    p20_s: float
    p80_s: float
    num_samples: int


class PeakMib(NamedTuple):
    """The most memory held at once."""

    tensors: float  # from torch's record of allocations
    # The rise of resident memory. Unlike `tensors` it sees the scratch memory of GEMM libraries,
    # but also free heap that was not given back. None on a card, or if the system is not Linux.
    resident: float | None


def timed(run: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, float]:
    """Returns a call's result and seconds; on a card from its first kernel to its last."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = run()
        return result, time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return result, 1e-3 * begin.elapsed_time(end)


def seconds_of(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Returns a call's seconds."""
    return timed(run, device)[1]


def first_seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Returns the seconds of a first call; calls again on a card or if the first was short.

    A card's first call compiles kernels and fills the allocator's cache, so it does not count.
    """
    seconds = seconds_of(run, device)
    if device.type == "cuda":
        return seconds_of(run, device)
    return min(seconds, seconds_of(run, device)) if seconds < SHORT_S else seconds


def time_rounds(
    runs: Sequence[Callable[[], Any]], num_rounds: int, device: torch.device = CPU
) -> list[list[float]]:
    """Returns [run][round] seconds; within a round every run is called once, in order.

    On a card one more round comes first and is not counted.
    """
    if device.type == "cuda" and num_rounds > 0:
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(num_rounds):
        for run, samples in zip(runs, seconds, strict=True):
            samples.append(seconds_of(run, device))
    return seconds


def spread(seconds: Sequence[float]) -> Spread:
    """Returns median, 20th and 80th percentile."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles).tolist()
    return Spread(median, low, high, len(seconds))


def free_gib(device: torch.device = CPU) -> float:
    """Returns the memory that can be allocated; on a CPU without swapping, inf if not known."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + reusable) / 2**30
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available[0] / MIB if available else float("inf")


def extra_peak_mib(run: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, PeakMib]:
    """Returns a call's result, and the most memory that it held beyond what was live before.

    The memory of the result counts as well.
    """
    gc.collect()
    if device.type == "cuda":
        before_mib = torch.cuda.memory_allocated(device) / MIB
        result, peak_mib = _card_peak_mib(run, device)
        return result, PeakMib(peak_mib - before_mib, None)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    base_mib = _reset_high_water_mib()
    with profile(use_cpu=True, profile_memory=True) as memory:
        result = run()
    resident = None if base_mib is None else max(0.0, _status_mib("VmHWM") - base_mib)
    events = [event for event in memory.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, PeakMib(max(accumulate(changes, initial=0)) / MIB, resident)


def peak_held_mib(
    run: Callable[[], Result], device: torch.device = CPU
) -> tuple[Result, float | None]:
    """Returns a call's result, and the most memory held while it ran, with what was live before.

    On a CPU that is this process's resident memory (None where the system is not Linux), on a card
    the memory of all tensors.
    """
    gc.collect()
    if device.type == "cuda":
        return _card_peak_mib(run, device)
    base_mib = _reset_high_water_mib()
    result = run()
    return result, None if base_mib is None else _status_mib("VmHWM")


def milliseconds(seconds: float) -> str:
    """Formats seconds as milliseconds, with at least three digits."""
    return f"{1e3 * seconds:.{max(0, 2 - math.floor(math.log10(1e3 * seconds)))}f}"


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Prints one aligned row: a positive width pads on the left, a negative one on the right."""
    pairs = zip(cells, widths, strict=True)
    padded = (f"{c:>{w}}" if w > 0 else f"{c:<{-w}}" for c, w in pairs)
    print("  ".join(padded).rstrip(), flush=True)


def _card_peak_mib(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) / MIB


def _reset_high_water_mib() -> float | None:
    """Resets the kernel's high-water mark VmHWM; returns resident memory, or None if it cannot."""
    try:
        # Gives free heap back first. Otherwise a call that reuses it would seem to need nothing.
        ctypes.CDLL(None).malloc_trim(0)
        # Writing 5 to clear_refs sets VmHWM to the current resident memory (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_mib("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
