"""Measures AdamW over one long parameter, in fp32 and with an fp32 master in two halves.

A step reads the parameter, both moments and the gradient, and writes all but the gradient: 28 bytes
a number in fp32. It is also 28 where the master is the bf16 parameter plus its low 16 bits, since
there is no second copy to write.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from socpo_fast.ops import adamw as step
from tests.helpers.error_rule import assert_bitwise_equal
from tools.gpu_check.check import Check
from tools.gpu_check.timing import Run, median_ms

NUM_NUMBERS = 1 << 27
TINY_NUMBERS = 1031
NUM_COMPARED = 1 << 20  # numbers that are compared with the reference
BYTES = 28  # read and written a number
NUM_STEPS = 3  # the last one is compared: it starts from moments that are not zero
OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
}
State = dict[str, Tensor | None]


def make_state(check: Check, num: int, dtype: torch.dtype) -> State:
    """Makes a parameter (with low bits if it is bf16), its moments and a gradient."""
    param = 0.05 * check.randn(num, seed=1, dtype=torch.float32)
    # The low 16 bits of a master are any number: a bf16 parameter is only its rounded high half.
    low_bits = None
    if dtype == torch.bfloat16:
        generator = torch.Generator(check.device).manual_seed(2)
        low_bits = torch.randint(
            -(2**15), 2**15, (num,), generator=generator, dtype=torch.int16, device=check.device
        )
    return {
        "param": param.to(dtype),
        "low_bits": low_bits,
        "exp_avg": torch.zeros(num, device=check.device),
        "exp_avg_sq": torch.zeros(num, device=check.device),
        "grad": check.randn(num, seed=3, dtype=torch.float32),
    }


def adamw(check: Check) -> None:
    """Measures ours in both forms, checked against the reference, and torch's fused one."""
    num = TINY_NUMBERS if check.tiny else NUM_NUMBERS
    limit = check.ceilings.copy_gb_s

    def write_down(of: str, run: Run) -> None:
        rate = 1e-6 * BYTES * num / median_ms(run, check.device)
        check.figure("rates.adamw_gb_s", rate, of=of, limit=limit)

    with check.case("adamw of torch"):
        state = make_state(check, num, torch.float32)
        param = state["param"]
        assert param is not None
        param.grad = state["grad"]
        theirs = torch.optim.AdamW([param], fused=True, **OPTIONS)
        write_down("torch's fused, float32", theirs.step)
    for dtype in (torch.float32, torch.bfloat16):
        of = str(dtype).removeprefix("torch.") + " and low bits" * (dtype == torch.bfloat16)
        with check.case(f"adamw, {of}"):
            compare_bits(check, min(num, NUM_COMPARED), dtype)
            state = make_state(check, num, dtype)
            write_down(of, functools.partial(step, *state.values(), step=1, **OPTIONS))


def compare_bits(check: Check, num: int, dtype: torch.dtype) -> None:
    """Asserts that ours and the reference are bitwise equal after a few steps on the device."""
    states = []
    for impl in ("auto", "ref"):
        state = make_state(check, num, dtype)
        for step_idx in range(NUM_STEPS):
            step(*state.values(), step=step_idx + 1, impl=impl, **OPTIONS)
        states.append(state)
    for name, ours in states[0].items():
        truth = states[1][name]
        if ours is not None and truth is not None:
            assert_bitwise_equal(ours, truth, name=f"adamw: {name} after {NUM_STEPS} steps")
