"""Measures whole updates of a student with random weights: gradients of a few groups, then AdamW.

Recorded are the time beside the update's FLOPs at the card's GEMM rate (that share is the MFU, with
the optimizer included), memory, how often the host waits, kernels by time, and whether two equal
updates are bitwise equal.
"""

from __future__ import annotations

import statistics
from collections import Counter

import torch
from torch import Tensor

from socpo_fast.model import Decoder
from socpo_fast.ops.tree_attention import num_pairs
from socpo_fast.report.sizes import num_parameters
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.packing import pack_rollouts
from socpo_fast.training.step import GradientStats, policy_gradients
from socpo_fast.types import Rollout
from tests.helpers.error_rule import assert_bitwise_equal
from tools.gpu_check.check import Check, Part
from tools.gpu_check.engine import host_waits
from tools.gpu_check.groups import GROUP, TINY_GROUP, make_rollouts
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.rooflines import update_flops
from tools.gpu_check.timing import median_ms, peak_gib, profile_table, wall_ms

TOKEN_BUDGET = 16384
LEARNING_RATE = 1e-3  # large enough to change most bf16 weights in a step
NUM_STEPS_TIMED = 3


def flops_of(student: Decoder, rollouts: list[Rollout]) -> float:
    """Counts an update's FLOPs, from its packed microbatches."""
    total = 0.0
    # Packing decides how many tokens and visible pairs an update really computes.
    for batch in pack_rollouts(rollouts, packing="tree", token_budget=TOKEN_BUDGET):
        seen_pairs = num_pairs(batch.visible_until_T)
        counts = batch.tokens_forwarded, batch.targets_N.numel(), seen_pairs
        total += update_flops(student.config, *counts)
    return total


def gradients(
    student: Decoder, rollouts: list[Rollout], *, checkpointing: bool = False
) -> GradientStats:
    """Adds an update's gradients to .grad; the optimizer's step clears them."""
    return policy_gradients(
        student,
        rollouts,
        token_budget=TOKEN_BUDGET,
        temperature=1.0,
        checkpointing=checkpointing,
    )


class Trainee:
    """A student, its optimizer and an update's rollouts; each one made is bitwise the same."""

    def __init__(
        self, check: Check, model: str, dtype: torch.dtype, num_groups: int, checkpointing: bool
    ):
        config = MODELS["tiny" if check.tiny else model]
        # A CPU trains in fp32 only.
        used = dtype if check.is_cuda else torch.float32
        self.device = check.device
        self.checkpointing = checkpointing
        self.student = make_model(config, device=check.device, dtype=used)
        self.optimizer = Optimizer(self.student, lr=LEARNING_RATE, warmup_updates=0)
        shape = TINY_GROUP if check.tiny else GROUP
        self.rollouts = make_rollouts(config.vocab_size, shape, num_groups)

    def update(self) -> None:
        """Makes one whole update."""
        loss_stats_7 = gradients(
            self.student, self.rollouts, checkpointing=self.checkpointing
        ).loss_stats_7
        result = self.optimizer.step(loss_stats_7[0], also_read=loss_stats_7)
        assert not result.skipped, "the gradient is not finite"

    def step_ms(self) -> float:
        """Times the optimizer's step by the clock, which is right as it ends with a host read."""
        times = []
        for _ in range(NUM_STEPS_TIMED):
            gradients(self.student, self.rollouts, checkpointing=self.checkpointing)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(wall_ms(self.optimizer.step, self.device))
        return statistics.median(times)

    def weights(self) -> dict[str, Tensor]:
        """Returns copies of all parameters, by name."""
        return {name: p.detach().clone() for name, p in self.student.named_parameters()}


def update(
    model: str,
    dtype: torch.dtype,
    *,
    num_groups: int = 1,
    checkpointing: bool = False,
    repeats: bool = True,
) -> Part:
    """Returns a part that measures one kind of update, with one group if more do not fit."""

    def part(check: Check) -> None:
        is_too_large = False
        try:
            measure(check, model, dtype, num_groups, checkpointing, repeats)
        except torch.OutOfMemoryError as error:
            if num_groups == 1:
                raise
            check.note(f"{model}, {num_groups} groups: {error}")
            is_too_large = True
        # Not in the handler: its traceback would keep alive the tensors that must be freed.
        if is_too_large:
            check.free_memory()
            measure(check, model, dtype, 1, checkpointing, repeats)

    return part


def measure(
    check: Check,
    model: str,
    dtype: torch.dtype,
    num_groups: int,
    checkpointing: bool,
    repeats: bool,
) -> None:
    """Measures time and memory of an update, and makes two updates twice to compare them."""
    dtype_name = str(dtype).removeprefix("torch.")
    of = f"{model} in {dtype_name}, {num_groups} group{'s' * (num_groups > 1)}"
    trainee = Trainee(check, model, dtype, num_groups, checkpointing)
    first = trainee.weights() if repeats else {}
    check.figure("training.peak_gib", peak_gib(trainee.update, check.device), of=of)
    trainee.update()  # the second starts from moments and low bits that are not zero
    if repeats:
        initial, first = first, trainee.weights()
        assert_moved(initial, first)
        del initial
    limit = check.ceilings.bf16_ms(flops_of(trainee.student, trainee.rollouts))
    key = "training.update_ms" if dtype == torch.bfloat16 else "training.fp32_update_ms"
    check.figure(key, median_ms(trainee.update, check.device), of=of, limit=limit)
    limit = check.ceilings.copy_ms(28 * num_parameters(trainee.student.config))
    check.figure("training.optimizer_ms", trainee.step_ms(), of=of, limit=limit)
    wait_lines = host_waits(check.device, trainee.update)
    check.figure("training.host_waits", len(wait_lines), of=of)
    if wait_lines:
        check.note(f"{of}: the host waits at\n{counted(wait_lines)}")
    if check.is_cuda:
        reserved = torch.cuda.max_memory_reserved(check.device) / 2**30
        check.figure("training.reserved_gib", reserved, of=of)
    if not repeats:
        return
    del trainee
    check.free_memory()
    trainee = Trainee(check, model, dtype, num_groups, checkpointing)
    for _ in range(2):
        trainee.update()
    differing = [
        name for name, x in trainee.student.named_parameters() if not torch.equal(x, first[name])
    ]
    check.figure("training.repeats", float(not differing), of=of)
    # Raises with the first differing element.
    for name in differing[:1]:
        assert_bitwise_equal(trainee.weights()[name], first[name], name=f"{of}: {name}")


def assert_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Asserts that most weights have changed, so that a comparison of updates means something."""
    moved = sum(not torch.equal(before[name], after[name]) for name in after)
    assert moved > len(after) // 2, f"two updates moved {moved} of {len(after)} weights"


def counted(places: list[str]) -> str:
    """Returns each line of code with its count, the most frequent first."""
    return "\n".join(f"{count:4} x {place}" for place, count in Counter(places).most_common())


def kernels_of_an_update(check: Check) -> None:
    """Lists an update's kernels by time. Must come last: the profiler slows down what follows."""
    for model in ("Qwen3-0.6B", "Qwen3-1.7B"):
        trainee = Trainee(check, model, torch.bfloat16, 1, checkpointing=False)
        trainee.update()
        table, num_launches = profile_table(trainee.update, check.device, num_rows=15)
        check.figure("training.launches", num_launches, of=model)
        check.note(f"an update of {model}, kernels by time\n{table}")
        del trainee
        check.free_memory()
