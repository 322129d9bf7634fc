"""A long run with a teacher that mostly fails: what a process holds must not grow with it."""

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
    """Raises, says nothing, or answers."""
    chance = random.Random(f"{request.key} {request.rollout_idx}").random()
    if chance < 1 / 3:
        raise KeyError("x")
    return None if chance < 2 / 3 else "Check the products of the last line."


def steadiness(faults: Faults) -> list[Promise]:
    """Counts after every batch: those at the end against those after a quarter."""
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
    seen: list[dict[str, float]] = []
    run_batch = trainer.Trainer.run_batch

    def counting(self: trainer.Trainer) -> None:
        run_batch(self)
        gc.collect()
        seen.append(
            {
                "threads": threading.active_count(),
                "descriptors": len(os.listdir("/proc/self/fd")),
                "pages": self.engine.stats.pages_total - self.engine.stats.pages_free,
                "objects": len(gc.get_objects()),
                "resident MB": resident_mb(),
            }
        )

    trainer.Trainer.run_batch = counting  # type: ignore[method-assign]
    try:
        ended = faults.train("steady", **changes)
    finally:
        trainer.Trainer.run_batch = run_batch  # type: ignore[method-assign]
    fault = ended.must_end(0, saying="teacher: no guidance, exception")
    if fault:
        promise.check("failed guidances", fault)
        return [promise]
    grown = [growth(seen, name) for name in seen[0]]
    failed = sum(row["guidance/failed"] for row in batch_rows(faults.folder / "steady"))
    lost = faults.audit("steady", **changes)
    promise.check(f"{failed:.0f} failed guidances", lost, *grown)
    first = seen[len(seen) // 4]
    last = seen[-1]
    promise.figure = ", ".join(f"{name} {first[name]:.0f} -> {last[name]:.0f}" for name in first)
    return [promise]


def growth(seen: list[dict[str, float]], name: str) -> str | None:
    """Whether the last tenth of the batches holds more than the tenth after the first quarter did.

    Objects may grow by what a batch is recorded with and by what is made once, at first use; memory
    by what an allocator leaves.
    """
    tenth = max(len(seen) // 10, 1)
    start = len(seen) // 4
    before = max(counts[name] for counts in seen[start : start + tenth])
    after = max(counts[name] for counts in seen[-tenth:])
    allowed = {"objects": 300.0 + 2.0 * len(seen), "resident MB": 40.0}.get(name, 0.0)
    return f"{name} {before:.0f} -> {after:.0f}" if after > before + allowed else None


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
