"""Times calls: by CUDA events on a card, by the clock on a CPU.

On a card, L2 is emptied before each run: in a real step, too, a layer's weights are not in it.
Small kernels are timed inside a CUDA graph: launched one by one from Python they would wait for the
host.
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
TIME_S = 0.25  # all timed runs together, unless MIN_RUNS needs longer

Run = Callable[[], object]


def median_ms(run: Run, device: torch.device, *, in_graph: bool = False) -> float:
    """Returns the median of some runs, after one to compile and one to choose their number."""
    if device.type != "cuda":
        run()
        return statistics.median(wall_ms(run) for _ in range(3))
    run()
    torch.cuda.synchronize(device)
    timed_call = _captured(run, device) if in_graph else run
    # Fast calls are repeated often, slow ones three times.
    estimate = wall_ms(timed_call, device)
    num_runs = max(MIN_RUNS, min(MAX_RUNS, int(1e3 * TIME_S / max(estimate, 1e-3))))
    flush = torch.zeros(FLUSH_MIB << 20, dtype=torch.int8, device=device).view(torch.float32)
    events = []
    for _ in range(num_runs):
        flush.zero_()
        flush.sum()  # L2 then holds clean lines; dirty ones would be written back during the call
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Events are recorded without waiting: the host stays ahead of the card.
        begin.record()
        timed_call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Sets how a card computes products of fp32 matrices: "ieee" or "tf32"."""
    backend = torch.backends.cuda.matmul
    old_precision, backend.fp32_precision = backend.fp32_precision, precision
    try:
        yield
    finally:
        backend.fp32_precision = old_precision


def peak_gib(run: Run, device: torch.device) -> float:
    """Returns the peak memory of a call beyond what was held before; 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0.0
    torch.cuda.synchronize(device)
    old_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - old_bytes) / 2**30


def profile_table(run: Run, device: torch.device, *, num_rows: int = 15) -> tuple[str, int]:
    """Returns (a table of a call's kernels by device time, the number of launches)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    averages = profile.key_averages()
    on_device = [row for row in averages if device.type == "cpu" or row.device_time_total > 0]
    # The profile also has rows of CPU ops with device time, which would count kernels twice.
    is_kernel = [row for row in on_device if "CUDA" in str(row.device_type)]
    order = sorted(is_kernel or on_device, key=lambda row: -time_us(row, device))
    lines = [
        f"{1e-3 * time_us(row, device):9.3f} ms {row.count:6}x  {row.key[:110]}"
        for row in order[:num_rows]
    ]
    return "\n".join(lines), sum(row.count for row in order)


def time_us(row: object, device: torch.device) -> float:
    """Returns a profiler row's own time on the device, microseconds."""
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return float(getattr(row, name))


def wall_ms(run: Run, device: torch.device | None = None) -> float:
    """Times one call by the clock, until its work on the device has ended."""
    started = time.perf_counter()
    run()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _captured(run: Run, device: torch.device) -> Run:
    """Captures a call in a CUDA graph; returns the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        run()
    return graph.replay
