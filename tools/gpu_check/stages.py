"""Lists the stages, most valuable first.

Stages on which others depend come first, correctness comes before speed, slow tools come last.
`expected_s` is an estimate for an H100. `budget_s` only stops a stage that hangs. The first seven
stages are expected to end within five minutes, all but the last one within eight.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage: the PARTS of `tools/gpu_check/<name>.py`, run in order or all at once."""

    name: str
    expected_s: int
    budget_s: int
    answers: str  # which questions the stage answers
    parts_at_once: bool = False  # each in its own process, where they wait for the CPU

    @property
    def uses_ceilings(self) -> bool:
        """Whether the stage divides by rates that stage `ceilings` has measured."""
        return self.name in ("attention", "training", "rates", "decode", "head", "batch")


STAGES: tuple[Stage, ...] = (
    Stage("machine", 12, 60, "which card, which versions, how much memory is free"),
    Stage("ceilings", 16, 45, "bytes and FLOPs a second; does bf16 add into fp32"),
    Stage(
        "kernels", 50, 90, "every Triton kernel against fp64, Qwen3's heads, 2^31 elements", True
    ),
    Stage("engine", 35, 80, "tokens beside the CPU's, graphs, preemption, host syncs", True),
    Stage("attention", 44, 100, "attention over trees beside one long row, and its peers"),
    Stage("training", 70, 120, "ms an update in bf16, MFU, where the time goes, peak memory"),
    Stage("rates", 42, 90, "each kernel's rate beside the card's"),
    Stage("decode", 57, 110, "ms a decode step, Qwen3-0.6B and 4B, beside their bytes"),
    Stage("head", 45, 80, "the policy head beside three bare GEMMs and the peers"),
    Stage("batch", 30, 100, "a whole batch beside its plan: seconds by phase, and memory"),
    Stage("learning", 50, 90, "the built-in task in bf16 and fp32: it ends, repeats, learns"),
    Stage("profilers", 53, 90, "DRAM per cent and occupancy by ncu; memory errors by sanitizer"),
)
# Exit status of a stage that ran to its end and recorded failed cases. Not 1, which Python uses for
# an uncaught exception.
CASES_FAILED = 3
NAMES = tuple(stage.name for stage in STAGES)
BY_NAME = {stage.name: stage for stage in STAGES}
