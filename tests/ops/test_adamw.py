"""Compares AdamW with torch's, its implementations bitwise, and checks what it must not change."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from socpo_fast.ops import adamw
from tests.helpers.adamw_state import (
    DEVICE,
    IMPLS,
    SETTINGS,
    State,
    assert_same_state,
    noise,
    run_steps,
)
from tests.helpers.elementwise import needs_cpp, thread_counts
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_right_as_torch(impl: str, dtype: torch.dtype) -> None:
    """torch.optim.AdamW orders its operations differently, so the error rule holds, not bits."""
    start = noise(7, 5)
    actual = run_steps(State.of(start, dtype), 20, impl=impl, scale=0.5).joined()[0]
    results = []
    for exact_dtype in (torch.float32, torch.float64):
        param = torch.nn.Parameter(start.to(exact_dtype, copy=True))
        optimizer = torch.optim.AdamW([param], **SETTINGS)  # type: ignore[arg-type]
        for step in range(1, 21):
            param.grad = 0.5 * noise(7, 5, seed=step).to(exact_dtype)
            optimizer.step()
        results.append(param.detach())
    assert_error_rule(actual, *results, name="param")


# Less than a vector, vectors with a tail, more than one thread's share and more than a tile.
@pytest.mark.parametrize("num_elements", [1, 7, 1000, 40_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_same_bits_as_ref(impl: str, dtype: torch.dtype, num_elements: int) -> None:
    """Every implementation takes bitwise the steps of the reference, in fp32 and in halves."""
    start = noise(num_elements)
    # Gradients from subnormal squares to large ones.
    for size, scale in ((1.0, 0.3), (1e-20, None), (1e15, 1.0)):
        actual = run_steps(State.of(start, dtype), 3, impl=impl, scale=scale, size=size)
        expected = run_steps(State.of(start), 3, impl="ref", scale=scale, size=size)
        assert_same_state(actual, expected, f"{impl} {dtype}, gradients of {size:g}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_decay_is_not_lost(dtype: torch.dtype) -> None:
    """A step at the defaults decays a weight by 1e-8 of its value.

    Rounded to fp32 by itself, such a decay would be lost.
    """
    settings = SETTINGS | {"lr": 1e-6}
    start = 0.5 + noise(20_000).abs()
    results = []
    for weight_decay in (0.0, 0.01):
        state = State.of(start, dtype)
        for step in range(1, 301):
            grad = noise(20_000, seed=step)
            options = settings | {"weight_decay": weight_decay}
            adamw(*state, grad, step=step, **options)  # type: ignore[arg-type]
        results.append(state.joined()[0].double())
    decayed = ((results[1] - results[0]) / start.double()).mean().item()
    assert decayed == pytest.approx(-300 * 1e-8, rel=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_second_moment_is_not_taken(impl: str, dtype: torch.dtype) -> None:
    """An element whose second moment would be infinite, and freeze it for ever, keeps its state."""
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
    """A scale that is NaN, zero or negative skips the step, whatever the gradient."""
    state = run_steps(State.of(noise(40), dtype), 2, impl=impl)
    old_tensors = state.copies()
    for scale in (math.nan, -math.inf, 0.0, -0.0, -1.0):
        device = DEVICE if impl == "triton" else "cpu"
        on_device = state.to(device)
        scale_tensor = torch.tensor(scale, device=device)
        grad = torch.full((40,), math.nan, device=device)
        adamw(*on_device, grad, step=3, scale=scale_tensor, impl=impl, **SETTINGS)  # type: ignore[arg-type]
        for a, b in zip(on_device.to("cpu").copies(), old_tensors, strict=True):
            assert_bitwise_equal(a, b, name=f"scale {scale}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_element_that_would_not_be_finite_stays(impl: str, dtype: torch.dtype) -> None:
    """An element whose new value would not be finite keeps its value and its moments."""
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
    """A step in fp16 is the fp32 step, rounded."""
    start = noise(33).half().float()
    in_fp16 = run_steps(State.of(start, torch.float16), 1, impl=impl)
    in_fp32 = run_steps(State.of(start), 1, impl="ref")
    assert_bitwise_equal(in_fp16.param, in_fp32.param.half(), name="param")


@needs_cpp
def test_thread_invariant() -> None:
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
    """Each bad argument is refused in its own words, and the state stays as it was."""

    def step(state: State, grad: Tensor | None = None, **changes: object) -> None:
        some_grad = torch.ones_like(state.exp_avg) if grad is None else grad
        adamw(*state, some_grad, **SETTINGS | {"step": 1} | changes)  # type: ignore[arg-type]

    state = State.of(noise(3, 2))
    half = State.of(noise(3, 2), torch.bfloat16)
    for bad_state, grad, changes, message in (
        (state, None, {"lr": -1.0}, "adamw: lr must be finite and >= 0, got -1.0"),
        (state, None, {"betas": (0.9, 1.0)}, r"betas must be each in \[0, 1\)"),
        (state, None, {"eps": 0.0}, "eps must be finite and > 0"),
        (state, None, {"step": 0}, "step must be >= 1, got 0"),
        (state, None, {"weight_decay": math.nan}, "weight_decay must be finite and >= 0"),
        (
            half._replace(low_bits=None),
            None,
            {},
            "low_bits must be a tensor for a param of torch.bfloat16",
        ),
        (
            state._replace(low_bits=half.low_bits),
            None,
            {},
            "low_bits must be None for a param of torch.float32",
        ),
        (state, torch.ones(5), {}, r"grad_N must be float32 \[N=6\], got float32 \[5\]"),
        (half, torch.ones(3, 2).bfloat16(), {}, "grad_N must be float32"),
        (state, torch.ones(2, 3).t(), {}, r"strides of grad_N must be contiguous"),
        (state, None, {"scale": torch.ones(1)}, r"scale_ must be float32 \[\]"),
    ):
        old_tensors = bad_state.copies()
        with pytest.raises(ValueError, match=message):
            step(bad_state, grad, **changes)
        assert all(torch.equal(a, b) for a, b in zip(bad_state.copies(), old_tensors, strict=True))


def test_compiled_code_rounds_every_operation() -> None:
    """No product is fused with a sum, and roots and quotients are not approximated.

    The test reads the PTX, as a difference in the last bit would appear only after many steps.
    """
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
        arithmetic = r"\\b(?:mul|add|sub|div|sqrt|fma|rsqrt|rcp)\\.\\S*f32"
        used = re.findall(arithmetic, compiled.asm["ptx"])
        print(*sorted(set(used)))
"""
    root = Path(__file__).resolve().parent.parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    env.pop("TRITON_INTERPRET", None)  # the interpreter would compile nothing
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert set(line.split()) <= {f"{op}.rn.f32" for op in ("mul", "add", "sub", "div", "sqrt")}
        assert re.search(r"div\.rn.*sqrt\.rn", line)
