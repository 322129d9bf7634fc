"""AdamW behind one call: warm up, refuse a non-finite gradient, clip, step.

Departures from torch.optim.AdamW used bare: state is made at construction, so that every parameter shares one step
count, storage never moves, and the state is a flat dict of named tensors (safetensors, no pickle); weight decay falls
on matrices only (ndim >= 2), never on norms and biases; a bad gradient costs one update, not the run. num_updates
counts that update too, so that a number names one update; warm-up and AdamW count the steps that were taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from socpo_fast.ops._checks import check_rule

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTS = ("num_updates", "num_skipped", "num_skipped_in_a_row")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    grad_norm: float  # before clipping, over all parameters; not finite when that is why the update was skipped
    lr: float
    skipped: bool


class Optimizer:
    """AdamW with linear warm-up and clipping of the global norm.

        lr_n = lr * min(1, n / warmup_updates)        n = 1, 2, ..: this update, skipped ones not counted
        gradient *= min(1, max_grad_norm / norm)

    Args:
        student:        its parameters must be fp32; they are updated in place.
        lr:             > 0, after the warm-up.
        betas:          each in [0, 1).
        weight_decay:   >= 0, decoupled (times lr), on parameters of two or more dimensions.
        warmup_updates: >= 0.
        max_grad_norm:  > 0; inf turns clipping off.

    Raises:
        ValueError: a value out of range, or a parameter that is not fp32.

    Memory: two fp32 values a parameter. Bitwise: same inputs, same bits, at one thread count.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_updates: int = 10,
        max_grad_norm: float = 1.0,
    ):
        self.params = dict(student.named_parameters())  # tied weights once
        for name, param in self.params.items():
            if param.dtype != torch.float32:
                raise ValueError(
                    f"Optimizer: parameter {name} must be float32, got {param.dtype}; load the student with "
                    "dtype='float32' (lower precision with fp32 master weights is not there yet)"
                )
        rules = (
            ("lr", lr, 0 < lr < math.inf, "finite and > 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "each in [0, 1)"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "finite and >= 0"),
            ("warmup_updates", warmup_updates, warmup_updates >= 0, ">= 0"),
            ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "> 0"),
        )
        for rule in rules:
            check_rule("Optimizer", *rule)
        self.lr, self.warmup_updates, self.max_grad_norm = lr, warmup_updates, max_grad_norm
        self.num_updates = 0  # skipped ones included
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        params = self.params.values()
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        # fused: one pass over each parameter, no intermediates; it exists on CPU and CUDA alike
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        for param in params:
            self.adamw.state[param] = {
                "step": torch.zeros((), device=param.device),
                **{name: torch.zeros_like(param, requires_grad=False) for name in MOMENTS},
            }

    def step(self, loss: float = 0.0) -> StepResult:
        """Apply the accumulated gradient and drop it; if it or the loss is not finite, drop it only and count that."""
        for param in self.params.values():
            if param.grad is None:  # would fall behind in its step count
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        num_steps = self.num_updates - self.num_skipped
        grad_norm, lr = float(norm), self.lr * min(1.0, (num_steps + 1) / max(1, self.warmup_updates))
        self.num_updates += 1
        skipped = not (math.isfinite(grad_norm) and math.isfinite(loss))
        self.num_skipped += skipped
        self.num_skipped_in_a_row = self.num_skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            nn.utils.clip_grads_with_norm_(self.params.values(), self.max_grad_norm, norm)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)  # between updates the memory is the rollout's
        return StepResult(grad_norm=grad_norm, lr=lr, skipped=skipped)

    def state_tensors(self) -> dict[str, Tensor]:
        """The moments as "exp_avg.NAME" and "exp_avg_sq.NAME"; the live tensors, not copies."""
        return {
            f"{moment}.{name}": self.adamw.state[param][moment]
            for name, param in self.params.items()
            for moment in MOMENTS
        }

    def state_counts(self) -> dict[str, int]:
        """The rest of the state, for JSON."""
        return {name: getattr(self, name) for name in COUNTS}

    def load_state(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Copy a saved state into the present one, all or nothing.

        Raises:
            ValueError: names or shapes are not those of this optimizer's parameters.
        """
        own = self.state_tensors()
        odd = sorted((own.keys() ^ tensors.keys()) | (self.state_counts().keys() ^ counts.keys()))
        if odd:
            raise ValueError(f"Optimizer: state must be of these parameters, got {len(odd)} odd names, {odd[0]} first")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise ValueError(
                    f"Optimizer: state {name} must be {tensor.dtype} {list(tensor.shape)}, "
                    f"got {tensors[name].dtype} {list(tensors[name].shape)}"
                )
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name in COUNTS:
            setattr(self, name, counts[name])
        for param in self.params.values():
            self.adamw.state[param]["step"].fill_(float(self.num_updates - self.num_skipped))
