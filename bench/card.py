"""What every bench prints and measures alike: the header card, peak memory of a call, interleaved rounds, aligned rows.

    print_card(measure_card(num_threads))    extra_peak_mib(run)    time_rounds(runs, ..)    spread(seconds)

Contenders are timed in rounds, one run of each a round, so that a machine which slows down slows all of them; ratios
are quoted within one such set of rounds only.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from socpo_fast.device import set_threads
from socpo_fast.ops._impl import extension_is_built
from socpo_fast.report.environment import environment

Result = TypeVar("Result")

_MIB = 1 << 20
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
    # rise of resident memory, which sees GEMM libraries' scratch, but also what the heap keeps; None: not Linux
    resident: float | None


def measure_card(num_threads: int) -> dict[str, Any]:
    """Set the threads, measure the machine's peaks and say where this runs."""
    set_threads(num_threads)
    peaks = {f"{library}_gflop_s": peak_gflop_s(library) for library in matmuls()}
    return environment() | peaks | {"peak_gb_s": peak_gb_s(), "free_gib": free_gib()}


def print_card(card: Mapping[str, Any]) -> None:
    for name, value in card.items():
        print(f"  {name:16}{f'{value:.1f}' if isinstance(value, float) else value}")
    print(flush=True)


def matmuls() -> dict[str, Callable[[Tensor, Tensor, Tensor, bool], object]]:
    """The GEMMs there are, as f(out, a, b, accumulate): torch's own, and the one our ops call where it is built."""

    def torch_mm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> Tensor:
        return torch.addmm(out, a, b, beta=float(accumulate), out=out)

    built = {"socpo": torch.ops.socpo.matmul_} if extension_is_built() else {}
    return {"torch": torch_mm} | built


def peak_gflop_s(library: str, size: int = 2048, num_runs: int = 5) -> float:
    """Rate of the best of a few square fp32 GEMMs."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    matmul_ = matmuls()[library]
    return 2e-9 * size**3 / min(_seconds(lambda: matmul_(out, a, b, False)) for _ in range(num_runs))


def peak_gb_s(num_mib: int = 256, num_runs: int = 5) -> float:
    """Rate of the best of a few copies far larger than any cache; bytes read and bytes written both count."""
    source, target = torch.ones(num_mib * _MIB // 4), torch.zeros(num_mib * _MIB // 4)
    return 2e-9 * num_mib * _MIB / min(_seconds(lambda: target.copy_(source)) for _ in range(num_runs))


def free_gib() -> float:
    """Memory that can be had without swapping; infinite where Linux does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.is_file() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return available[0] / _MIB if available else float("inf")


def extra_peak_mib(run: Callable[[], Result]) -> tuple[Result, PeakMib]:
    """A call's result, and the most memory it held at once, its result included, beyond what was live before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    gc.collect()
    before = _reset_high_water_mib()
    with profile(use_cpu=True, profile_memory=True) as memory:
        result = run()
    resident = None if before is None else max(0.0, _status_mib("VmHWM") - before)
    events = [event for event in memory.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, PeakMib(max(accumulate(changes, initial=0)) / _MIB, resident)


def peak_resident_mib(run: Callable[[], Result]) -> tuple[Result, float | None]:
    """A call's result, and the most memory this process held meanwhile, all of it; None: not Linux."""
    gc.collect()
    before = _reset_high_water_mib()
    result = run()
    return result, None if before is None else _status_mib("VmHWM")


def time_rounds(runs: Sequence[Callable[[], Any]], num_rounds: int) -> list[list[float]]:
    """Seconds of each run in each round; within a round every run is called once, in order."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(num_rounds):
        for run, samples in zip(runs, seconds, strict=True):
            samples.append(_seconds(run))
    return seconds


def first_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the first call, or of a second one where the first was short."""
    seconds = _seconds(run)
    return min(seconds, _seconds(run)) if seconds < SHORT_S else seconds


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def spread(seconds: Sequence[float]) -> Spread:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    return Spread(median, low, high, len(seconds))


def milliseconds(seconds: float) -> str:
    """At least three digits of it."""
    return f"{1e3 * seconds:.{max(0, 2 - math.floor(math.log10(1e3 * seconds)))}f}"


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """One aligned row: a positive width pads on the left, a negative one on the right."""
    padded = (f"{c:>{w}}" if w > 0 else f"{c:<{-w}}" for c, w in zip(cells, widths, strict=True))
    print("  ".join(padded).rstrip(), flush=True)


def _seconds(run: Callable[[], Any]) -> float:
    return timed(run)[1]


def _reset_high_water_mib() -> float | None:
    """Resident memory, from which the kernel's high-water mark VmHWM starts again when 5 is written to clear_refs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # a call that fills free heap again would seem to need nothing
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_mib("VmRSS")
    except (OSError, AttributeError):
        return None


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
