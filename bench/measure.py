"""What every bench measures alike: seconds of a call, rounds, memory of a call; and aligned rows.

    timed(run, device)    time_rounds(runs, ..)    spread(seconds)    extra_peak_mib(run, device)

A card's seconds are those between two CUDA events around the call, a CPU's are the clock's.
Contenders are timed in rounds, one run of each a round, so that a machine which slows down slows
all of them; ratios are quoted within one such set of rounds only.
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
SHORT_S = 2.0  # below it, a first run's warming up shows


class Spread(NamedTuple):
    """Seconds a call took."""

    median_s: float
    p20_s: float
    p80_s: float
    num_samples: int


class PeakMib(NamedTuple):
    """Most memory held at once."""

    tensors: float  # from torch's record of allocations
    # Rise of resident memory, which sees GEMM libraries' scratch, but also what the heap keeps.
    # None: a card's memory, or a system other than Linux.
    resident: float | None


def timed(run: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, float]:
    """A call's result and seconds; on a card from when it begins there to when it has ended."""
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
    return timed(run, device)[1]


def first_seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of the first call, or of a second one where the first was short or on a card.

    A card's first call compiles kernels and fills the allocator.
    """
    seconds = seconds_of(run, device)
    if device.type == "cuda":
        return seconds_of(run, device)
    return min(seconds, seconds_of(run, device)) if seconds < SHORT_S else seconds


def time_rounds(
    runs: Sequence[Callable[[], Any]], num_rounds: int, device: torch.device = CPU
) -> list[list[float]]:
    """Seconds of each run in each round; within a round every run is called once, in order.

    On a card there is a round before the first one that is not counted.
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
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    return Spread(median, low, high, len(seconds))


def free_gib(device: torch.device = CPU) -> float:
    """Memory that can be had, on a CPU without swapping; infinite where Linux does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) / 2**30
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available[0] / MIB if available else float("inf")


def extra_peak_mib(run: Callable[[], Result], device: torch.device = CPU) -> tuple[Result, PeakMib]:
    """A call's result, and the most memory it held at once beyond what was live before.

    The result is part of it.
    """
    gc.collect()
    if device.type == "cuda":
        before_mib = torch.cuda.memory_allocated(device) / MIB
        result, peak_mib = _card_peak_mib(run, device)
        return result, PeakMib(peak_mib - before_mib, None)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    before = _reset_high_water_mib()
    with profile(use_cpu=True, profile_memory=True) as memory:
        result = run()
    resident = None if before is None else max(0.0, _status_mib("VmHWM") - before)
    events = [event for event in memory.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, PeakMib(max(accumulate(changes, initial=0)) / MIB, resident)


def peak_held_mib(
    run: Callable[[], Result], device: torch.device = CPU
) -> tuple[Result, float | None]:
    """A call's result, and the most memory held meanwhile, all of it.

    Resident memory of this process, None where that is not Linux'; on a card that of all tensors.
    """
    gc.collect()
    if device.type == "cuda":
        return _card_peak_mib(run, device)
    before = _reset_high_water_mib()
    result = run()
    return result, None if before is None else _status_mib("VmHWM")


def milliseconds(seconds: float) -> str:
    """At least three digits of it."""
    return f"{1e3 * seconds:.{max(0, 2 - math.floor(math.log10(1e3 * seconds)))}f}"


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """One aligned row: a positive width pads on the left, a negative one on the right."""
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
    """Resident memory, from which the kernel's high-water mark VmHWM starts again.

    That is what writing 5 to clear_refs does.
    """
    try:
        # a call that fills free heap again would seem to need nothing
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_mib("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
