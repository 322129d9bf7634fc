"""Trains for many batches with a teacher that mostly fails: no resource may grow with them."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

from socpo_fast import trainer
from socpo_fast.types import GuidanceRequest
from tools.faults.run import Faults, Promise, batch_rows


def fails_two_of_three(request: GuidanceRequest) -> str | None:
    """Raises, gives no guidance, or gives guidance: a third of the calls each."""
    chance = random.Random(f"{request.key} {request.rollout_idx}").random()
    if chance < 1 / 3:
        raise KeyError("x")
    return None if chance < 2 / 3 else "Check the products of the last line."


def steadiness(faults: Faults) -> list[Promise]:
    """Counts resources after every batch, and compares the end with the first quarter."""
    num_batches = 30 if faults.short else 200
    promise = Promise(
        f"{num_batches} batches with a teacher that fails two of three calls: threads, "
        "descriptors, pages, objects and resident memory stay flat",
        "tests/test_faults.py",
    )
    changes = {
        "run__num_batches": num_batches,
        "run__checkpoint_every_updates": 20,
        "teacher__rule": f"{__name__}:fails_two_of_three",
        "teacher__on_silence": "continue",
        "rollout__group_size": 8,
    }
    counts: list[dict[str, float]] = []
    run_batch = trainer.Trainer.run_batch

    def counting(self: trainer.Trainer) -> None:
        run_batch(self)
        # Garbage that is not collected yet would look like a leak.
        gc.collect()
        counts.append(
            {
                "threads": threading.active_count(),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "pages": self.engine.stats.pages_total - self.engine.stats.pages_free,
                "objects": len(gc.get_objects()),
                "resident MB": resident_mb(),
            }
        )

    # The trainer has no hook after a batch, so the method is wrapped for this run.
    trainer.Trainer.run_batch = counting  # type: ignore[method-assign]
    try:
        outcome = faults.train("steady", **changes)
    finally:
        trainer.Trainer.run_batch = run_batch  # type: ignore[method-assign]
    fault = outcome.must_end(0, saying="teacher: no guidance, exception")
    if fault:
        promise.check("failed guidances", fault)
        return [promise]
    growths = [growth(counts, name) for name in counts[0]]
    failed = sum(row["guidance/failed"] for row in batch_rows(faults.folder / "steady"))
    lost = faults.audit("steady", **changes)
    promise.check(f"{failed:.0f} failed guidances", lost, *growths)
    early = counts[len(counts) // 4]
    late = counts[-1]
    promise.figure = ", ".join(f"{name} {early[name]:.0f} -> {late[name]:.0f}" for name in early)
    return [promise]


def growth(seen: list[dict[str, float]], name: str) -> str | None:
    """Returns a message if the last tenth of the batches holds more than an early tenth; else None.

    The early tenth follows the first quarter, when everything is warm. The number of objects may
    grow by a batch's records and by what is made once, at first use. Memory may grow by the gaps
    that an allocator leaves.
    """
    tenth = max(len(seen) // 10, 1)
    start = len(seen) // 4
    early = max(counts[name] for counts in seen[start : start + tenth])
    late = max(counts[name] for counts in seen[-tenth:])
    allowed = {"objects": 300.0 + 2.0 * len(seen), "resident MB": 40.0}.get(name, 0.0)
    return f"{name} {early:.0f} -> {late:.0f}" if late > early + allowed else None


def resident_mb() -> float:
    """Returns the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
