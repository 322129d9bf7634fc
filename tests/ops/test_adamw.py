"""AdamW against its formula and torch's, the halves of a master, and equal bits everywhere."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import adamw
from socpo_fast.ops.adamw import join_master, split_master
from tests.error_rule import assert_bitwise_equal, assert_error_rule
from tests.ops.elementwise import needs_cpp, thread_counts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["ref", pytest.param("cpp", marks=needs_cpp), "triton"]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
INFINITY = math.inf


class State(NamedTuple):
    """What a step changes."""

    param: Tensor
    low_bits: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype = torch.float32) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        moments = (torch.zeros(values.shape, dtype=wide), torch.zeros(values.shape, dtype=wide))
        if dtype == torch.bfloat16:
            return cls(*split_master(values), *moments)
        return cls(values.to(dtype, copy=True), None, *moments)

    def to(self, device: str) -> State:
        return State(*(x if x is None else x.to(device) for x in self))

    def joined(self) -> list[Tensor]:
        """The parameter in fp32, whatever it is stored in, and the moments."""
        param, low_bits, *moments = self
        return [param if low_bits is None else join_master(param, low_bits), *moments]

    def copies(self) -> list[Tensor]:
        return [x.clone() for x in self if x is not None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_steps(
    state: State,
    num_steps: int,
    *,
    impl: str = "auto",
    scale: float | None = None,
    size: float = 1.0,
) -> State:
    """The state after steps with gradients that are the same in every run."""
    device = DEVICE if impl == "triton" else "cpu"
    state = state.to(device)
    for step in range(1, num_steps + 1):
        grad = size * noise(*state.param.shape, seed=step).to(state.exp_avg)
        given = None if scale is None else torch.tensor(scale).to(grad)
        adamw(*state, grad, step=step, scale=given, impl=impl, **SETTINGS)  # type: ignore[arg-type]
    return state.to("cpu")


def assert_same_state(one: State, other: State, name: str) -> None:
    for what, a, b in zip(("param", "exp_avg", "exp_avg_sq"), one.joined(), other.joined(), strict=True):
        assert_bitwise_equal(a, b, name=f"{name}: {what}")


def fp32(bits: int) -> Tensor:
    return torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)


# Where rounding is awkward: bits of the master, of its high half, and the remainder.
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
    bits, high, low = HALVES[name]
    param, low_bits = split_master(fp32(bits))
    assert param.view(torch.int16).item() & 0xFFFF == high
    assert low_bits.item() == low
    assert_bitwise_equal(join_master(param, low_bits), fp32(bits), name=name)


def test_halves_give_back_every_number() -> None:
    """A million random bit patterns; those whose high half would be infinite are none of them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=generator).to(torch.int32)
    master = bits[bits & 0x7FFFFFFF < 0x7F800000 - 0x8000].view(torch.float32)
    assert len(master) > 990_000
    param, low_bits = split_master(master)
    assert_bitwise_equal(join_master(param, low_bits), master, name="joined")
    # No bf16 is nearer than the high half.
    distance = (master.double() - param.double()).abs()
    for step in (-1, 1):
        neighbour = (param.view(torch.int16) + step).view(torch.bfloat16).double()
        assert (distance <= (master.double() - neighbour).abs().nan_to_num(INFINITY, INFINITY)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_right_as_torch(impl: str, dtype: torch.dtype) -> None:
    """torch.optim.AdamW orders its operations in another way, so the error rule holds, not bits."""
    start = noise(7, 5)
    moved = run_steps(State.of(start, dtype), 20, impl=impl, scale=0.5).joined()[0]
    found = []
    for exact in (torch.float32, torch.float64):
        param = torch.nn.Parameter(start.to(exact, copy=True))
        optimizer = torch.optim.AdamW([param], **SETTINGS)  # type: ignore[arg-type]
        for step in range(1, 21):
            param.grad = 0.5 * noise(7, 5, seed=step).to(exact)
            optimizer.step()
        found.append(param.detach())
    assert_error_rule(moved, *found, name="param")


# Less than a vector, a vector and a rest, more than one thread's share and more than a tile.
@pytest.mark.parametrize("num_elements", [1, 7, 1000, 40_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_same_bits_as_ref(impl: str, dtype: torch.dtype, num_elements: int) -> None:
    start = noise(num_elements)
    # Gradients from subnormal squares to large ones.
    for size, scale in ((1.0, 0.3), (1e-20, None), (1e15, 1.0)):
        moved = run_steps(State.of(start, dtype), 3, impl=impl, scale=scale, size=size)
        ref = run_steps(State.of(start), 3, impl="ref", scale=scale, size=size)
        assert_same_state(moved, ref, f"{impl} {dtype}, gradients of {size:g}")


def test_1000_steps_of_a_split_master() -> None:
    """Its halves, joined, are the fp32 parameter, step after step."""
    start = noise(513)
    split, whole = State.of(start, torch.bfloat16), State.of(start)
    low_bits = split.low_bits
    assert low_bits is not None
    for step in range(1, 1001):
        grad = noise(513, seed=step) * 10 ** (step % 7 - 3)
        for state in (split, whole):
            options = SETTINGS | {"lr": 1e-3 if step % 2 else 1e-6}
            adamw(*state, grad, step=step, scale=torch.tensor(0.7), **options)  # type: ignore[arg-type]
        assert_same_state(split, whole, f"step {step}")
        nearest = (whole.param.view(torch.int32) + 0x8000) >> 16
        assert torch.equal(split.param.view(torch.int16), nearest.to(torch.int16))
    assert (whole.param - start).abs().mean() > 0.01


def test_small_steps_are_not_lost() -> None:
    """At a learning rate of 1e-6 a weight of 1 needs 4,000 steps to reach the next bf16."""
    state = State.of(torch.ones(4), torch.bfloat16)
    settings = SETTINGS | {"lr": 1e-6, "weight_decay": 0.0}
    for step in range(1, 101):
        adamw(*state, -torch.ones(4), step=step, **settings)  # type: ignore[arg-type]
    assert torch.equal(state.param, torch.ones(4, dtype=torch.bfloat16))
    torch.testing.assert_close(state.joined()[0], torch.full((4,), 1 + 1e-4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_is_not_lost(dtype: torch.dtype) -> None:
    """At the defaults a step decays a weight by 1e-8 of it, of which fp32 alone would keep nothing."""
    settings = SETTINGS | {"lr": 1e-6}
    start = 0.5 + noise(20_000).abs()
    moved = []
    for weight_decay in (0.0, 0.01):
        state = State.of(start, dtype)
        for step in range(1, 301):
            grad = noise(20_000, seed=step)
            options = settings | {"weight_decay": weight_decay}
            adamw(*state, grad, step=step, **options)  # type: ignore[arg-type]
        moved.append(state.joined()[0].double())
    decayed = ((moved[1] - moved[0]) / start.double()).mean().item()
    assert decayed == pytest.approx(-300 * 1e-8, rel=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_rounds_up_to_infinity_stays(impl: str, sign: int) -> None:
    """It is finite in fp32, and its high half would not be."""
    device = DEVICE if impl == "triton" else "cpu"
    start = sign * fp32(0x7F7F0000).expand(3).contiguous()
    # Steps of 0.001, 0.75 and -0.75 times the distance of two bf16 numbers there, 2^120.
    grad = torch.tensor([-sign * 1e-3, -sign * 1.0, sign * 1.0], device=device)
    settings = SETTINGS | {"lr": 1.5 * 2.0**120, "weight_decay": 0.0, "eps": 1.0}
    whole, halves = (State.of(start, dtype).to(device) for dtype in (torch.float32, torch.bfloat16))
    for state in (whole, halves):
        adamw(*state, grad, step=1, impl=impl, **settings)  # type: ignore[arg-type]
    in_fp32, in_bf16 = (State(*state).to("cpu").joined()[0] for state in (whole, halves))
    bits = in_fp32.view(torch.int32) & 0x7FFFFFFF
    assert (bits >= 0x7F7F8000).tolist() == [False, True, False]
    assert in_fp32.isfinite().all()
    assert in_bf16[1] == start[1]
    assert torch.equal(in_bf16[[0, 2]], in_fp32[[0, 2]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_second_moment_is_not_taken(impl: str, dtype: torch.dtype) -> None:
    """It would freeze its element for ever."""
    device = DEVICE if impl == "triton" else "cpu"
    state = State.of(torch.ones(2), dtype).to(device)
    grad = torch.tensor([1e20, 1.0], device=device)
    adamw(*state, grad, step=1, impl=impl, **SETTINGS)  # type: ignore[arg-type]
    param, exp_avg, exp_avg_sq = State(*state).to("cpu").joined()
    assert (param[0], exp_avg[0], exp_avg_sq[0]) == (1.0, 0.0, 0.0)
    assert param[1] < 1.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_that_is_not_positive_skips(impl: str, dtype: torch.dtype) -> None:
    state = run_steps(State.of(noise(40), dtype), 2, impl=impl)
    before = state.copies()
    for scale in (math.nan, INFINITY, -INFINITY, 0.0, -0.0, -1.0):
        device = DEVICE if impl == "triton" else "cpu"
        moved = state.to(device)
        given = torch.tensor(scale, device=device)
        grad = torch.full((40,), math.nan, device=device)
        adamw(*moved, grad, step=3, scale=given, impl=impl, **SETTINGS)  # type: ignore[arg-type]
        for a, b in zip(moved.to("cpu").copies(), before, strict=True):
            assert_bitwise_equal(a, b, name=f"scale {scale}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_element_that_would_not_be_finite_stays(impl: str, dtype: torch.dtype) -> None:
    """It keeps its moments as well; its neighbours take the step."""
    device = DEVICE if impl == "triton" else "cpu"
    start = torch.tensor([1.0, 3.38e38, -3.38e38, 1.0, 1.0])
    state = State.of(start, dtype).to(device)
    all_bits = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
    grad = torch.tensor([1.0, -1.0, 1.0, math.nan, all_bits], device=device)
    settings = SETTINGS | {"lr": 1e37, "weight_decay": 0.0}
    adamw(*state, grad, step=1, impl=impl, **settings)  # type: ignore[arg-type]
    param, exp_avg, exp_avg_sq = State(*state).to("cpu").joined()
    assert torch.equal(param[1:], start[1:])
    assert param[0] < -9e36
    assert exp_avg.tolist()[1:] == exp_avg_sq.tolist()[1:] == [0.0] * 4


@pytest.mark.parametrize("impl", ["ref", "triton"])
def test_fp16_is_rounded_after_each_step(impl: str) -> None:
    start = noise(33).half().float()
    state = run_steps(State.of(start, torch.float16), 1, impl=impl)
    whole = run_steps(State.of(start), 1, impl="ref")
    assert_bitwise_equal(state.param, whole.param.half(), name="param")


@needs_cpp
def test_threads_do_not_change_bits() -> None:
    start = noise(100_003)
    states = [run_steps(State.of(start, torch.bfloat16), 2, impl="cpp") for _ in thread_counts()]
    for state in states[1:]:
        assert_same_state(state, states[0], "threads")


def test_parameter_of_a_graph_is_changed_in_place() -> None:
    """A graph that saved the old values refuses to run backward with the new ones."""
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param**2).sum()
    state = State.of(torch.ones(3))._replace(param=param)
    adamw(*state, torch.ones(3), step=1, **SETTINGS)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals() -> None:
    def step(state: State, grad: Tensor | None = None, **changes: object) -> None:
        given = torch.ones_like(state.exp_avg) if grad is None else grad
        adamw(*state, given, **SETTINGS | {"step": 1} | changes)  # type: ignore[arg-type]

    state, half = State.of(noise(3, 2)), State.of(noise(3, 2), torch.bfloat16)
    for given, grad, changes, message in (
        (state, None, {"lr": -1.0}, "adamw: lr must be finite and >= 0, got -1.0"),
        (state, None, {"betas": (0.9, 1.0)}, r"betas must be each in \[0, 1\)"),
        (state, None, {"eps": 0.0}, "eps must be finite and > 0"),
        (state, None, {"step": 0}, "step must be >= 1, got 0"),
        (state, None, {"weight_decay": math.nan}, "weight_decay must be finite and >= 0"),
        (half._replace(low_bits=None), None, {}, "low_bits must be a tensor for a param of torch.bfloat16"),
        (state._replace(low_bits=half.low_bits), None, {}, "low_bits must be None for a param of torch.float32"),
        (state, torch.ones(5), {}, r"grad_N must be float32 \[N=6\], got float32 \[5\]"),
        (half, torch.ones(3, 2).bfloat16(), {}, "grad_N must be float32"),
        (state, torch.ones(2, 3).t(), {}, r"strides of grad_N must be contiguous"),
        (state, None, {"scale": torch.ones(1)}, r"scale_ must be float32 \[\]"),
    ):
        before = given.copies()
        with pytest.raises(ValueError, match=message):
            step(given, grad, **changes)
        assert all(torch.equal(a, b) for a, b in zip(given.copies(), before, strict=True))


def test_compiled_code_rounds_every_operation() -> None:
    """No product is fused with a sum, and roots and quotients are not approximated."""
    code = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from socpo_fast.kernels.adamw import aot_configs
from tools.aot import Launch, arguments_of
for config in aot_configs():
    if config.architecture == 90 and config.label == "clip factor":
        source = ASTSource(config.kernel, *arguments_of(Launch(config)))
        options = {"num_warps": config.num_warps, **config.options}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        used = re.findall(r"\\b(?:mul|add|sub|div|sqrt|fma|rsqrt|rcp)\\.\\S*f32", compiled.asm["ptx"])
        print(*sorted(set(used)))
"""
    root = Path(__file__).resolve().parent.parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert set(line.split()) <= {f"{op}.rn.f32" for op in ("mul", "add", "sub", "div", "sqrt")}
        assert re.search(r"div\.rn.*sqrt\.rn", line)
