"""Milliseconds of a call: by CUDA events on a card, by the clock on a CPU.

A card is timed with its L2 emptied before each run, as the next layer's weights find it, and small
kernels are timed inside a CUDA graph: launched one by one from Python they would wait for the host.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

FLUSH_MIB = 256  # more than any card's L2, and long enough for the host to get ahead
MIN_RUNS = 3
MAX_RUNS = 50
TIME_S = 0.25  # of runs that are timed, as far as MIN_RUNS allows

Run = Callable[[], object]


def median_ms(run: Run, device: torch.device, *, in_graph: bool = False) -> float:
    """The median of a few runs, after one that compiles and one that says how many to take."""
    if device.type != "cuda":
        run()
        return statistics.median(wall_ms(run) for _ in range(3))
    run()
    torch.cuda.synchronize(device)
    call = _captured(run, device) if in_graph else run
    estimate = wall_ms(call, device)
    num_runs = max(MIN_RUNS, min(MAX_RUNS, int(1e3 * TIME_S / max(estimate, 1e-3))))
    flush = torch.zeros(FLUSH_MIB << 20, dtype=torch.int8, device=device).view(torch.float32)
    events = []
    for _ in range(num_runs):
        flush.zero_()
        flush.sum()  # clean lines: dirty ones would be written back while the call is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """What a product of fp32 matrices is computed in on a card: "ieee" or "tf32"."""
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def peak_gib(run: Run, device: torch.device) -> float:
    """Most memory a call held beyond what was held before; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def profile_table(run: Run, device: torch.device, *, num_rows: int = 15) -> tuple[str, int]:
    """(Kernels of a call by their time on the device, how many were launched)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages = profile.key_averages()
    on_device = [row for row in averages if device.type == "cpu" or row.device_time_total > 0]
    is_kernel = [row for row in on_device if "CUDA" in str(row.device_type)]
    order = sorted(is_kernel or on_device, key=lambda row: -time_us(row, device))
    lines = [
        f"{1e-3 * time_us(row, device):9.3f} ms {row.count:6}x  {row.key[:110]}"
        for row in order[:num_rows]
    ]
    return "\n".join(lines), sum(row.count for row in order)


def time_us(row: object, device: torch.device) -> float:
    """A profiler row's own time on the device."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return float(getattr(row, name))


def wall_ms(run: Run, device: torch.device | None = None) -> float:
    """One call by the clock, to its end on the device."""
    started = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _captured(run: Run, device: torch.device) -> Run:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        run()
    return graph.replay
