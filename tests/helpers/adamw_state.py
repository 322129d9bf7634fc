"""Holds the tensors that an AdamW step changes, and runs steps that every run can repeat."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import adamw
from socpo_fast.ops.adamw import join_master, split_master
from tests.helpers.elementwise import needs_cpp
from tests.helpers.error_rule import assert_bitwise_equal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["ref", pytest.param("cpp", marks=needs_cpp), "triton"]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


class State(NamedTuple):
    """The tensors that a step of AdamW changes."""

    param: Tensor
    low_bits: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype = torch.float32) -> State:
        """Returns the state before the first step; in bf16 the fp32 master is split in two."""
        wide = torch.promote_types(dtype, torch.float32)
        moments = (torch.zeros(values.shape, dtype=wide), torch.zeros(values.shape, dtype=wide))
        if dtype == torch.bfloat16:
            return cls(*split_master(values), *moments)
        return cls(values.to(dtype, copy=True), None, *moments)

    def to(self, device: str) -> State:
        return State(*(x if x is None else x.to(device) for x in self))

    def joined(self) -> list[Tensor]:
        """Returns the parameter in fp32, whatever its storage, and the moments."""
        param, low_bits, *moments = self
        return [param if low_bits is None else join_master(param, low_bits), *moments]

    def copies(self) -> list[Tensor]:
        """Returns clones of all tensors, to compare with after a step."""
        return [x.clone() for x in self if x is not None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Returns normal fp32 numbers that depend on the shape and the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_steps(
    state: State,
    num_steps: int,
    *,
    impl: str = "auto",
    scale: float | None = None,
    size: float = 1.0,
) -> State:
    """Returns the state after steps whose gradients are the same in every run."""
    device = DEVICE if impl == "triton" else "cpu"
    state = state.to(device)
    for step in range(1, num_steps + 1):
        grad = size * noise(*state.param.shape, seed=step).to(state.exp_avg)
        scale_tensor = None if scale is None else torch.tensor(scale).to(grad)
        adamw(*state, grad, step=step, scale=scale_tensor, impl=impl, **SETTINGS)  # type: ignore[arg-type]
    return state.to("cpu")


def assert_same_state(one: State, other: State, name: str) -> None:
    """Asserts that two states are bitwise equal, whatever their parameters are stored in."""
    for field, a, b in zip(
        ("param", "exp_avg", "exp_avg_sq"), one.joined(), other.joined(), strict=True
    ):
        assert_bitwise_equal(a, b, name=f"{name}: {field}")
