"""Tests the two halves of an fp32 master.

bf16 weights keep the high half, the param, and the low 16 bits beside it; steps of both must be
steps of the fp32 number.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import adamw
from socpo_fast.ops.adamw import join_master, split_master
from tests.helpers.adamw_state import DEVICE, IMPLS, SETTINGS, State, assert_same_state, noise
from tests.helpers.error_rule import assert_bitwise_equal


def fp32(bits: int) -> Tensor:
    """Returns the fp32 number with these bits."""
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(
        torch.float32
    )


# Where rounding is awkward: (bits of the master, bits of its high half, remainder).
HALVES = {
    "0": (0x00000000, 0x0000, 0),
    "-0": (0x80000000, 0x8000, 0),
    "1": (0x3F800000, 0x3F80, 0),
    "a tie above an even half goes up": (0x3F808000, 0x3F81, -32768),
    "a tie above an odd half goes up": (0x3F818000, 0x3F82, -32768),
    "a negative tie goes down": (0xBF808000, 0xBF81, -32768),
    "just below a tie": (0x3F807FFF, 0x3F80, 32767),
    "a carry into the exponent": (0x3FFFFFFF, 0x4000, -1),
    "the least subnormal": (0x00000001, 0x0000, 1),
    "a subnormal that rounds up to a normal number": (0x007FFFFF, 0x0080, -1),
    "the negative least subnormal": (0x80000001, 0x8000, 1),
    "the largest bf16": (0x7F7F0000, 0x7F7F, 0),
    "the largest that a finite half holds": (0x7F7F7FFF, 0x7F7F, 32767),
    "and the most negative one": (0xFF7F7FFF, 0xFF7F, 32767),
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_awkward_numbers(name: str) -> None:
    """The halves are those worked out by hand, and joined they give the number back."""
    bits, high, low = HALVES[name]
    param, low_bits = split_master(fp32(bits))
    assert param.view(torch.int16).item() & 0xFFFF == high
    assert low_bits.item() == low
    assert_bitwise_equal(join_master(param, low_bits), fp32(bits), name=name)


def test_halves_give_back_every_number() -> None:
    """A million random numbers survive being split and joined.

    Numbers whose high half would be infinite are left out.
    """
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32)
    master = bits[bits & 0x7FFFFFFF < 0x7F800000 - 0x8000].view(torch.float32)
    assert len(master) > 990_000
    param, low_bits = split_master(master)
    assert_bitwise_equal(join_master(param, low_bits), master, name="joined")
    # No bf16 is nearer than the high half.
    distance = (master.double() - param.double()).abs()
    for step in (-1, 1):  # the next smaller and the next larger bf16 in magnitude
        neighbour = (param.view(torch.int16) + step).view(torch.bfloat16).double()
        assert (
            distance <= (master.double() - neighbour).abs().nan_to_num(math.inf, math.inf)
        ).all()


def test_1000_steps_of_a_split_master() -> None:
    """The halves, joined, are the fp32 parameter after every step."""
    start = noise(513)
    split = State.of(start, torch.bfloat16)
    unsplit = State.of(start)
    low_bits = split.low_bits
    assert low_bits is not None
    for step in range(1, 1001):
        grad = noise(513, seed=step) * 10 ** (step % 7 - 3)
        for state in (split, unsplit):
            options = SETTINGS | {"lr": 1e-3 if step % 2 else 1e-6}
            adamw(*state, grad, step=step, scale=torch.tensor(0.7), **options)  # type: ignore[arg-type]
        assert_same_state(split, unsplit, f"step {step}")
        # The high half is the fp32 number rounded to the nearest bf16.
        nearest = (unsplit.param.view(torch.int32) + 0x8000) >> 16
        assert torch.equal(split.param.view(torch.int16), nearest.to(torch.int16))
    assert (unsplit.param - start).abs().mean() > 0.01


def test_small_steps_are_not_lost() -> None:
    """At a learning rate of 1e-6 a weight of 1 needs 4,000 steps to reach the next bf16."""
    state = State.of(torch.ones(4), torch.bfloat16)
    settings = SETTINGS | {"lr": 1e-6, "weight_decay": 0.0}
    for step in range(1, 101):
        adamw(*state, -torch.ones(4), step=step, **settings)  # type: ignore[arg-type]
    assert torch.equal(state.param, torch.ones(4, dtype=torch.bfloat16))
    torch.testing.assert_close(state.joined()[0], torch.full((4,), 1 + 1e-4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_that_round_to_infinity_are_skipped(impl: str, sign: int) -> None:
    """A step whose result is finite in fp32 but whose high half would be infinite is skipped."""
    device = DEVICE if impl == "triton" else "cpu"
    start = sign * fp32(0x7F7F0000).expand(3).contiguous()
    # Steps of 0.001, 0.75 and -0.75 times the distance of two bf16 numbers there, 2^120.
    grad = torch.tensor([-sign * 1e-3, -sign * 1.0, sign * 1.0], device=device)
    settings = SETTINGS | {"lr": 1.5 * 2.0**120, "weight_decay": 0.0, "eps": 1.0}
    in_one, in_two = (
        State.of(start, dtype).to(device) for dtype in (torch.float32, torch.bfloat16)
    )
    for state in (in_one, in_two):
        adamw(*state, grad, step=1, impl=impl, **settings)  # type: ignore[arg-type]
    in_fp32, in_bf16 = (State(*state).to("cpu").joined()[0] for state in (in_one, in_two))
    bits = in_fp32.view(torch.int32) & 0x7FFFFFFF
    assert (bits >= 0x7F7F8000).tolist() == [False, True, False]
    assert in_fp32.isfinite().all()
    assert in_bf16[1] == start[1]
    assert torch.equal(in_bf16[[0, 2]], in_fp32[[0, 2]])
