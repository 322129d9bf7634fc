"""Tests ops whose weights are DTensors.

They are gathered where that is right, and refused in our words elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from socpo_fast import ops
from tests.helpers.elementwise import needs_cpp
from tests.helpers.error_rule import assert_bitwise_equal
from tests.ops.test_registered_ops import CASES, TOKENS, f, run, tensors_of, values_and_gradients


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Yields a mesh of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@needs_cpp
@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("linear", "weight_ND"),
        ("rms_norm", "weight_D"),
        ("linear_logprob", "weight_VD"),
        ("linear_policy_loss", "weight_VD"),
    ],
)
def test_sharded_weights_are_gathered(name: str, weight: str, mesh: Any) -> None:
    expected = values_and_gradients(name, "auto", run)
    tensors = tensors_of(CASES[name])
    tensors[weight] = distribute_tensor(tensors[weight].detach(), mesh, [Shard(0)]).requires_grad_()
    outputs = run(name, "auto", tensors)
    leaves = [tensors[key] for key in CASES[name].differentiable]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs if x.requires_grad), leaves)
    for actual, from_whole in zip((*outputs, *gradients), expected, strict=True):
        torch.testing.assert_close(
            actual.full_tensor() if hasattr(actual, "full_tensor") else actual,
            from_whole,
            equal_nan=True,
        )


@pytest.mark.parametrize("name", list(CASES))
def test_other_shards_are_refused(name: str, mesh: Any) -> None:
    tensors = tensors_of(CASES[name])
    key = next(iter(tensors))
    tensors[key] = distribute_tensor(tensors[key].detach(), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="must be a whole tensor, got a DTensor.*full_tensor"):
        run(name, "auto", tensors)


@needs_cpp
@pytest.mark.parametrize(("name", "weight"), [("linear", "weight_ND"), ("rms_norm", "weight_D")])
def test_sharded_weights_are_gathered_when_compiled(name: str, weight: str, mesh: Any) -> None:
    torch._dynamo.reset()
    tensors = tensors_of(CASES[name])
    tensors[weight] = distribute_tensor(tensors[weight].detach(), mesh, [Shard(0)])
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for from_compiled, eager in zip(
        compiled(name, "auto", tensors), run(name, "auto", tensors), strict=True
    ):
        assert_bitwise_equal(from_compiled, eager, name=name)


def test_a_gradient_over_several_ranks_is_refused() -> None:
    """Each rank would keep only the part of the gradient that its own rows give."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight = DTensor.from_local(f(10, 8), mesh, [Shard(0)])
        head_inputs = f(3, 8), weight.requires_grad_(), TOKENS["targets_N"]
        with pytest.raises(
            ValueError, match=r"weight_VD must be whole or need no .*on 2 ranks.*Partial"
        ):
            ops.linear_logprob(*head_inputs, temperature=1.0)
    finally:
        dist.destroy_process_group()
