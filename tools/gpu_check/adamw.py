"""AdamW over one long parameter: 28 bytes a number, in fp32 and in the two halves of a master.

Read the parameter, both moments and the gradient, write all but the gradient: 28 bytes in fp32, and
28 where a bf16 parameter and its low 16 bits are the master, since no second copy is written.
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
NUM_COMPARED = 1 << 20  # of which bits are compared
BYTES = 28
NUM_STEPS = 3  # of which the last is compared: the moments have what the first ones left
OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
}
State = dict[str, Tensor | None]


def make_state(check: Check, num: int, dtype: torch.dtype) -> State:
    """A parameter with low bits where it is narrow, its moments and a gradient."""
    param = 0.05 * check.randn(num, seed=1, dtype=torch.float32)
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
    """Ours in both forms, held to the reference's bits, and torch's own fused one in fp32."""
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
    """A few steps by the chosen implementation and by the reference, on the device."""
    found = []
    for impl in ("auto", "ref"):
        state = make_state(check, num, dtype)
        for step_idx in range(NUM_STEPS):
            step(*state.values(), step=step_idx + 1, impl=impl, **OPTIONS)
        found.append(state)
    for name, ours in found[0].items():
        truth = found[1][name]
        if ours is not None and truth is not None:
            assert_bitwise_equal(ours, truth, name=f"adamw: {name} after {NUM_STEPS} steps")
