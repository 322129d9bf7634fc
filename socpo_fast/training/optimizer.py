"""Wraps AdamW in one call: warm-up, refusal of a non-finite gradient, clipping, step.

Departures from plain torch.optim.AdamW:

- bf16 parameters are the high halves of exact fp32 masters (ops/adamw.py).
- The state is allocated at construction, so that its storage never moves. It is a flat dict of
  named tensors (safetensors, no pickle).
- Weight decay applies to matrices only (ndim >= 2), never to norms and biases.
- A non-finite gradient costs one update, not the run. num_updates counts the skipped update too, so
  that every update has its own number. Learning rate and AdamW count only the steps that were
  taken. The device decides whether a step is taken; the host waits once, at the end.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from socpo_fast.model.accumulate import accumulate_in_fp32
from socpo_fast.ops import adamw
from socpo_fast.ops._checks import check_rule
from socpo_fast.registries import LR_SCHEDULES

COUNTS = ("num_updates", "num_skipped", "num_skipped_in_a_row")
EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of one step."""

    grad_norm: float  # before clipping, over all parameters; a non-finite norm skips the step
    lr: float
    skipped: bool
    also_read: tuple[float, ...] = ()  # the values of the argument of the same name


def gradient_bytes(params: Iterable[Tensor]) -> list[int]:
    """Returns the bytes that the fp32 gradient of each parameter takes within gradients_in."""
    # Rounded up to 256 bytes: kernels and cuBLAS read fastest from so aligned addresses.
    return [-(-4 * param.numel() // 256) * 256 for param in params]


class Optimizer:
    """AdamW with linear warm-up, a schedule of the learning rate, and clipping of the global norm.

        n         = 1, 2, ..: this update, without skipped ones;  peak = max(1, warmup_updates)
        point     = (n - peak) / (total_updates + 1 - peak), in [0, 1]
        lr_n      = lr * min(1, n / peak) * (1 - (1 - min_lr_ratio) * fall_at(point))
        gradient *= min(1, max_grad_norm / norm)

    fall_at belongs to the schedule and goes from 0 to 1. The last update is one step short of
    point 1, so that it still changes the weights if min_lr_ratio is 0. Beyond it the rate is
    lr * min_lr_ratio.

    Args:
        student:        its parameters that require grad, fp32 or bf16, are updated in place. From
                        now on their .grad is fp32, and policy_gradients adds to it in place
                        (model/accumulate.py). The fp32 master of a bf16 parameter starts as the
                        parameter's value. It starts again if somebody else writes to the parameter.
        lr:             > 0, at the end of the warm-up.
        betas:          each in [0, 1).
        weight_decay:   >= 0, decoupled (times lr), on parameters of two or more dimensions.
        warmup_updates: >= 0.
        lr_schedule:    a name in registries.LR_SCHEDULES.
        min_lr_ratio:   in [0, 1), the final rate as a share of lr.
        total_updates:  > warmup_updates. Required by schedules that end with the run.
        max_grad_norm:  > 0; inf turns clipping off.

    Raises:
        ValueError: a value out of range, or a parameter that is neither fp32 nor bf16.

    Memory: two fp32 values per parameter, and two more bytes per bf16 parameter (the low half of
    its master). Bitwise: same inputs and same number of threads, same bits.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_updates: int = 10,
        lr_schedule: str = "constant",
        min_lr_ratio: float = 0.0,
        total_updates: int | None = None,
        max_grad_norm: float = 1.0,
    ):
        # named_parameters yields a tied weight once, so it is updated once.
        self.params = {
            name: param for name, param in student.named_parameters() if param.requires_grad
        }
        for name, param in self.params.items():
            check_rule(
                "Optimizer",
                f"dtype of {name}",
                param.dtype,
                param.dtype in (torch.float32, torch.bfloat16),
                "float32 or bfloat16",
                "load the student with dtype='float32' or 'bfloat16'",
            )
            dtype = None if param.grad is None else param.grad.dtype
            check_rule(
                "Optimizer",
                f"grad of {name}",
                dtype,
                dtype in (None, torch.float32),
                "float32 or None",
                "drop it first",
            )
        self.fall_at = LR_SCHEDULES.get(lr_schedule)
        self.last_update = math.inf if self.fall_at is None else (total_updates or 0)
        rules = (
            (
                "lr_schedule",
                lr_schedule,
                lr_schedule in LR_SCHEDULES,
                f"one of {', '.join(LR_SCHEDULES)}",
            ),
            ("lr", lr, 0 < lr < math.inf, "finite and > 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "each in [0, 1)"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "finite and >= 0"),
            ("warmup_updates", warmup_updates, warmup_updates >= 0, ">= 0"),
            ("min_lr_ratio", min_lr_ratio, 0 <= min_lr_ratio < 1, "in [0, 1)"),
            (
                "total_updates",
                total_updates,
                self.last_update > warmup_updates,
                f"> warmup_updates {warmup_updates} for lr_schedule {lr_schedule!r}",
            ),
            ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "> 0"),
        )
        for rule_of_value in rules:
            check_rule("Optimizer", *rule_of_value)
        self.lr = lr
        self.min_lr_ratio = min_lr_ratio
        self.warmup_updates = warmup_updates
        self.betas = betas
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.num_updates = 0  # skipped ones included
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        self.low_bits: dict[str, Tensor] = {}  # of bf16 parameters: the low halves of the masters
        self.exp_avg: dict[str, Tensor] = {}
        self.exp_avg_sq: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}  # torch's version counters of the parameters
        self._gradients: Tensor | None = None  # all gradients in one buffer, within gradients_in
        self._views: dict[str, Tensor] = {}  # name -> the view of that buffer that .grad is
        for name, param in self.params.items():
            self.exp_avg[name] = torch.zeros_like(param.detach(), dtype=torch.float32)
            self.exp_avg_sq[name] = torch.zeros_like(self.exp_avg[name])
            if param.dtype == torch.bfloat16:
                self.low_bits[name] = torch.zeros_like(param.detach(), dtype=torch.int16)
        accumulate_in_fp32(self.params.values())

    @contextmanager
    def gradients_in(self, memory: Tensor) -> Iterator[None]:
        """Makes every .grad a zeroed view of `memory` within a `with` block, and drops them after.

        Args:
            memory: [N] uint8 on the parameters' device, N >= the sum of their gradient_bytes.

        Raises:
            ValueError: memory of another dtype or too small.
        """
        sizes = gradient_bytes(self.params.values())
        check_rule(
            "Optimizer",
            "memory of gradients",
            [memory.dtype, memory.numel()],
            memory.dtype == torch.uint8 and memory.numel() >= sum(sizes),
            f"[torch.uint8, >= {sum(sizes)}]",
        )
        try:
            self._gradients = memory[: sum(sizes)].zero_()
            for (name, param), chunk in zip(
                self.params.items(), self._gradients.split(sizes), strict=True
            ):
                self._views[name] = chunk.view(torch.float32)[: param.numel()].view(param.shape)
                param.grad = self._views[name]
            yield
        finally:
            self._gradients = None
            self._views = {}
            for param in self.params.values():
                param.grad = None

    @torch.no_grad()
    def step(
        self,
        loss: float | Tensor = 0.0,
        *,
        also_read: Tensor | None = None,
    ) -> StepResult:
        """Applies the accumulated gradient and drops it; within gradients_in it is zeroed instead.

        If the gradient or the loss is not finite, the step is skipped and counted as skipped.

        Args:
            loss:      [] on any device.
            also_read: [N] numbers to read back in the same wait for the device.
        """
        self._drop_stale_low_bits()
        grads = [
            torch.zeros_like(param, dtype=torch.float32)
            if param.grad is None
            else param.grad.contiguous()
            for param in self.params.values()
        ]
        norm = nn.utils.get_total_norm(grads)
        # The scale is nan or 0 if the norm or the loss is not finite. adamw changes nothing then.
        # So the host need not wait here to decide whether to launch it.
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        loss = loss if isinstance(loss, Tensor) else norm.new_full((), loss)
        scale = scale.where(loss.isfinite(), math.nan)
        num_steps = self.num_updates - self.num_skipped
        lr = self.lr_of(num_steps + 1)
        for (name, param), grad in zip(self.params.items(), grads, strict=True):
            adamw(
                param,
                self.low_bits.get(name),
                self.exp_avg[name],
                self.exp_avg_sq[name],
                grad,
                lr=lr,
                betas=self.betas,
                eps=EPS,
                weight_decay=self.weight_decay if param.ndim >= 2 else 0.0,
                step=num_steps + 1,
                scale=scale,
            )
            self._versions[name] = param._version
            # None outside gradients_in. Within it, the view again: somebody may have replaced it.
            param.grad = self._views.get(name)
        if self._gradients is not None:
            self._gradients.zero_()
        # One readback for everything that the host wants to know: each one makes it wait.
        figures = torch.stack((norm, scale)).double()
        if also_read is not None:
            figures = torch.cat((figures, also_read.double()))
        grad_norm, scale_value, *also_values = figures.tolist()
        skipped = not 0 < scale_value < math.inf
        self.num_updates += 1
        self.num_skipped += skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
        return StepResult(grad_norm=grad_norm, lr=lr, skipped=skipped, also_read=tuple(also_values))

    def lr_of(self, n: int) -> float:
        """Returns the learning rate of step n = 1, 2, .."""
        peak = max(1, self.warmup_updates)
        point = min(1.0, max(0.0, (n - peak) / (self.last_update + 1 - peak)))
        decay = 0.0 if self.fall_at is None else self.fall_at(point)
        return self.lr * min(1.0, n / peak) * (1 - (1 - self.min_lr_ratio) * decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """Returns the live state, not copies: the moments and the low halves of the masters.

        Names are "exp_avg.NAME", "exp_avg_sq.NAME" and "low_bits.NAME".
        """
        self._drop_stale_low_bits()
        kinds = {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "low_bits": self.low_bits,
        }
        return {
            f"{kind}.{name}": tensor
            for kind, by_name in kinds.items()
            for name, tensor in by_name.items()
        }

    def _drop_stale_low_bits(self) -> None:
        """Zeroes the low halves of masters whose parameters somebody else has written to."""
        # Loading weights, for example, replaces the high half only. With the old low half the
        # master would be a number that nobody ever set. torch counts in-place writes in _version.
        for name, low_bits in self.low_bits.items():
            version = self.params[name]._version
            if self._versions.setdefault(name, version) != version:
                low_bits.zero_()
                self._versions[name] = version

    def state_counts(self) -> dict[str, int]:
        """Returns the rest of the state, for JSON."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Copies a saved state into this one, all or nothing.

        Raises:
            ValueError: names or shapes are not those of this optimizer's parameters.
        """
        own_tensors = self.state_tensors()
        unmatched = sorted(
            (own_tensors.keys() ^ tensors.keys()) | (self.state_counts().keys() ^ counts.keys())
        )
        if unmatched:
            raise ValueError(
                f"Optimizer: state must be of these parameters, got {len(unmatched)} odd names, "
                f"{unmatched[0]} first; resume a checkpoint with its own model and "
                "student.dtype"
            )
        for name, tensor in own_tensors.items():
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise ValueError(
                    f"Optimizer: state {name} must be {tensor.dtype} {list(tensor.shape)}, "
                    f"got {tensors[name].dtype} {list(tensors[name].shape)}"
                )
        # Everything has been checked, so from here on nothing fails halfway.
        for name, tensor in own_tensors.items():
            tensor.copy_(tensors[name])
        for name in COUNTS:
            setattr(self, name, counts[name])
        # The caller loads the matching parameters too. That write must not count as stale.
        self._versions.clear()
