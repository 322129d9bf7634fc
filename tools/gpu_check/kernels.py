"""Stage `kernels`: checks that the compiled kernels are right. Its parts run at once.

Checked are the op tests that use Triton, here with compiled kernels; each op against fp64 in every
dtype, with the heads of SmolLM2 and Qwen3; a page cache beyond 2^31 elements; and flash-attn where
it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

from socpo_fast.ops.rotary_write import rotary_write
from tests.helpers.error_rule import TOLERANCE, assert_bitwise_equal
from tools.gpu_check.check import ROOT, Check, Part, Skipped
from tools.gpu_check.op_cases import attend, attention_inputs, compare, move, op_cases
from tools.gpu_check.processes import output_of

# Tests that use CPU tensors by design, so compiled kernels cannot run them.
CPU_TESTS = ("test_instruction_sets.py",)
TINY_TESTS = ("test_swiglu.py",)
# rows, vocabulary, width
SIZES = (300, 5003, 136)
TINY_SIZES = (21, 67, 12)
# Limits of one test and of all tests, seconds.
TEST_S = 20
ALL_TESTS_S = 70
HALVES = (torch.bfloat16, torch.float16)


def triton_tests() -> list[Path]:
    """Returns the files of tests/ops that mention Triton."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    matching = [
        path for path in files if re.search(r"triton|elementwise", path.read_text(encoding="utf-8"))
    ]
    return [path for path in matching if path.name not in CPU_TESTS]


def run_pytest(files: list[Path], environ: dict[str, str]) -> tuple[dict[str, int], list[str]]:
    """Runs test files; returns (counts of passed, failed, skipped .., lines of the failures)."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-k", "triton"]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        # Two cores stay free for the other parts, which run at the same time.
        command += ["-n", str(max(1, min(12, len(os.sched_getaffinity(0)) - 2)))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command.append(f"--timeout={TEST_S}")  # a test that hangs fails by itself
    # COLUMNS: otherwise pytest cuts the messages of failures at 80 columns.
    environ = os.environ | environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    command += map(str, files)
    status, text = output_of(command, limit_s=ALL_TESTS_S, environ=environ, folder=ROOT)
    lines = text.strip().splitlines()
    print("\n".join(lines[-60:]), flush=True)
    return read_pytest(lines, status)


def read_pytest(lines: list[str], status: int | None) -> tuple[dict[str, int], list[str]]:
    """Parses pytest's output into counts and failures; status None: it was stopped."""
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status is None:
        # Stopped before its summary, so count the dots of the progress lines.
        num_passed = sum(line.count(".") for line in lines if re.match(r"^[.FEsx]+( |$)", line))
        failed.append(f"pytest did not end within {ALL_TESTS_S} s: {num_passed} tests had passed")
        return {"passed": num_passed}, failed
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
    if status != 0 and not failed:
        failed = ["\n".join(lines[-10:])]
    return {outcome: int(count) for count, outcome in counts}, failed


def op_tests(check: Check) -> None:
    """Runs tests/ops -k triton with compiled kernels; each failing test is a failed case."""
    files = triton_tests()
    if check.tiny:
        files = [path for path in files if path.name in TINY_TESTS]
    counts, failed = run_pytest(files, {"TRITON_INTERPRET": "0" if check.is_cuda else "1"})
    check.figure("kernels.tests_passed", counts.get("passed", 0))
    check.figure("kernels.tests_failed", counts.get("failed", 0) + counts.get("error", 0))
    for line in failed:
        name, _, message = line.partition(" - ")
        with check.case(name):
            raise AssertionError(message or name)


def ops_beside_fp64(check: Check) -> None:
    """Checks every op in every dtype; records each dtype's largest error over its tolerance."""
    sizes = TINY_SIZES if check.tiny else SIZES
    dtypes = (torch.float32, *HALVES) if check.is_cuda else (torch.float32,)
    cases = op_cases(*sizes)
    for dtype in dtypes:
        dtype_name = str(dtype).removeprefix("torch.")
        worst = 0.0
        for name, (run, inputs) in cases.items():
            with check.case(f"{name} {dtype_name}"):
                error = compare(name, run, inputs, dtype, check.device, "triton")
                worst = max(worst, error / TOLERANCE[dtype])
        check.figure("kernels.error_in_tolerances", worst, of=f"{len(cases)} ops in {dtype_name}")


def high_pages(check: Check) -> None:
    """Checks that pages beyond 2^31 elements work as low ones do, bitwise."""
    heads = (16, 8, 128)
    page_size = 32
    seq_lens = [70, 33, 64] if check.tiny else [300, 257, 64]
    inputs = attention_inputs(seq_lens, [1, 1, 1], heads=heads, page_size=page_size)
    # Offsets of pages from `first` on do not fit into int32.
    page_elements = page_size * heads[1] * heads[2]
    first = 1 if check.tiny else 2**31 // page_elements + 3
    low = move(inputs, check.dtype, check.device)
    high = dict(low)
    for name in ("k", "v"):
        shape = (first + len(low[name]), *low[name].shape[1:])
        # Everything below `first` stays uninitialised: a truncated offset would read garbage.
        high[name] = torch.empty(shape, dtype=check.dtype, device=check.device)
        high[name][first:] = low[name]
    high["table"] = low["table"] + first
    outputs = [attend(x, "triton")["o"] for x in (low, high)]
    assert_bitwise_equal(*outputs, name="attention over high pages")
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(5, heads[0] + 2 * heads[1], heads[2], generator=generator)
    qkv = qkv.to(check.device, check.dtype)
    angles = torch.ones(5, heads[2], device=check.device)
    slots = torch.arange(5, device=check.device) * 33 % (len(low["k"]) * page_size)
    for caches, shift in ((low, 0), (high, first * page_size)):
        write_args = caches["k"], caches["v"], slots + shift
        rotary_write(qkv, angles.cos(), angles.sin(), *write_args, impl="triton")
    assert_bitwise_equal(high["k"][first:], low["k"], name="keys written to high pages")
    check.figure("kernels.cache_elements", high["k"].numel())
    outputs = [attend(x, "triton")["o"] for x in (low, high)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)  # unlike the above, this refuses NaN


def flash(check: Check) -> None:
    """Checks flash-attn against the reference: pages of 256, decode and prefill."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Skipped("flash-attn is not installed")
    seq_lens = [1, 256, 257, 700]
    for name, q_lens in (("decode", [1] * 4), ("prefill", [1, 256, 30, 500])):
        inputs = attention_inputs(seq_lens, q_lens, heads=(6, 2, 64), page_size=256)
        # flash-attn loads slots beyond a sequence's end, where NaN would spoil its products.
        inputs |= {key: inputs[key].nan_to_num() for key in ("k", "v")}
        for dtype in HALVES:
            dtype_name = str(dtype).removeprefix("torch.")
            with check.case(f"flash {name} {dtype_name}"):
                error = compare(f"flash {name}", attend, inputs, dtype, check.device, "flash")
                of = f"flash {name} in {dtype_name}"
                check.figure("kernels.error_in_tolerances", error / TOLERANCE[dtype], of=of)


PARTS: dict[str, Part] = {
    "op tests": op_tests,
    "ops beside fp64": ops_beside_fp64,
    "high pages": high_pages,
    "flash": flash,
}
