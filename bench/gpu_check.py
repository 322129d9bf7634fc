"""Every check that needs a CUDA card, on the first machine that has one; writes one JSON. Without a card it exits 2.

    python -m bench.gpu_check [--json gpu_check.json] [--only NAME ..]      (make gpu-check)

kernels        the op tests that know Triton, with compiled kernels (TRITON_INTERPRET=0)
ops            each op's Triton kernels on CUDA tensors beside its reference on the CPU, fp32, bf16 and fp16
engine         tokens and log-probs of the engine on the card beside those of the engine on the CPU, fp32
preemption     the same with pages for few of its sequences
graphs         CUDA graphs beside the same rounds without, and tokens_per_sync 1 beside 8: equal bits
weights        parameters stay where they are over updates, and graphs draw from the new ones
syncs          how often a decode step makes the host wait; a replayed round never does
flash          flash-attn beside the reference, where it is installed; else skipped
decode         tok/s at batch 1, 16, 64 and 256, bf16
policy loss    linear_policy_loss beside torch's, forward and backward, bf16: ms and peak MiB

Each runs in a process of its own: a kernel that takes the card's context down, or hangs, fails its own check only. Exit
status 0 when nothing failed (flash may be skipped), 1 when something did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench._card import print_card, print_row
from bench._gpu_engine import (
    CHECKED,
    FULL,
    Figures,
    Sizes,
    engine_against_cpu,
    forced_preemption,
    graph_replay,
    weights_stay,
)
from bench._gpu_ops import check_flash, check_ops
from bench._gpu_speed import decode_speed, host_syncs, policy_loss_speed
from socpo_fast.report.environment import environment, installed_version

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800
RESULT = "gpu_check result: "  # what stands before a check's JSON in its process's output
HALVES = (torch.bfloat16, torch.float16)
# On CPU tensors by design: they skip, or have no place, where kernels are compiled.
CPU_TESTS = ("test_instruction_sets.py",)


class Skip(Exception):
    """A check that this machine need not pass."""


@dataclass
class Outcome:
    name: str
    status: str  # passed, failed or skipped
    message: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


def triton_tests() -> list[str]:
    """Files of tests/ops that know Triton."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    known = [path for path in files if re.search(r"triton|elementwise", path.read_text(encoding="utf-8"))]
    return [str(path.relative_to(ROOT)) for path in known if path.name not in CPU_TESTS]


def run_pytest(files: list[str], environ: Mapping[str, str]) -> Figures:
    """Counts of passed, failed, skipped ..; the first failures are the message of what is raised."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    lines = done.stdout.strip().splitlines()
    last = lines[-1] if lines else done.stderr.strip()
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    if done.returncode != 0:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
        raise AssertionError("\n".join([last, *failed]))
    return counts


def kernels(device: torch.device, _sizes: Sizes) -> Figures:
    return run_pytest(triton_tests(), {"TRITON_INTERPRET": "0" if device.type == "cuda" else "1"})


def ops(device: torch.device, sizes: Sizes) -> Figures:
    dtypes = (torch.float32, *(HALVES if device.type == "cuda" else HALVES[1:]))  # the interpreter has no bf16 dot
    return check_ops(device, dtypes, (300, 5003, 136) if sizes is CHECKED else (37, 131, 24))


def flash(device: torch.device, _sizes: Sizes) -> Figures:
    version = installed_version("flash-attn")
    if version == "not installed":
        raise Skip("flash-attn is not installed")
    return {"version": version} | check_flash(device, HALVES)


CHECKS: dict[str, tuple[Callable[[torch.device, Sizes], Figures], Sizes]] = {
    "kernels": (kernels, CHECKED),
    "ops": (ops, CHECKED),
    "engine": (engine_against_cpu, CHECKED),
    "preemption": (forced_preemption, CHECKED),
    "graphs": (graph_replay, CHECKED),
    "weights": (weights_stay, CHECKED),
    "syncs": (host_syncs, CHECKED),
    "flash": (flash, CHECKED),
    "decode": (decode_speed, FULL),
    "policy loss": (policy_loss_speed, FULL),
}


def run_check(name: str, device: torch.device, sizes: Sizes | None = None) -> Outcome:
    """One check in this process, whatever it raises."""
    check, usual = CHECKS[name]
    started = time.perf_counter()
    try:
        outcome = Outcome(name, "passed", figures=check(device, sizes or usual))
    except Skip as skip:
        outcome = Outcome(name, "skipped", str(skip))
    except Exception as error:  # noqa: BLE001 - what it was is the result
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome = Outcome(name, "failed", f"{type(error).__name__} at {last.filename}:{last.lineno}: {error}")
    outcome.seconds = time.perf_counter() - started
    return outcome


def run_apart(name: str, command: list[str], timeout_s: float = TIMEOUT_S) -> Outcome:
    """One check in a process of its own, from the RESULT line it prints; a crash or a hang has failed."""
    environ = os.environ | {"TRITON_INTERPRET": "0"}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return Outcome(name, "failed", f"no end after {timeout_s:g} s", time.perf_counter() - started)
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        return Outcome(name, "failed", f"exit status {done.returncode}: {end}", time.perf_counter() - started)
    return Outcome(**json.loads(results[-1]))


def card_of(device: torch.device) -> dict[str, Any]:
    """The machine and, of a card, what its figures depend on."""
    if device.type != "cuda":
        return dict(environment())
    properties = torch.cuda.get_device_properties(device)
    return environment() | {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
    }


def print_outcome(outcome: Outcome) -> None:
    numbers = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in outcome.figures.items()
    )
    rest = outcome.message or ", ".join(numbers)
    print_row([outcome.name, outcome.status, f"{outcome.seconds:.1f} s", rest], (-12, -8, 9, -1))


def failed_of(outcomes: list[Outcome]) -> list[str]:
    return [outcome.name for outcome in outcomes if outcome.status == "failed"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where the results go")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help="these checks")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)  # one of them, in this process
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA card here, nothing was checked", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    if options.check:
        print(RESULT + json.dumps(asdict(run_check(options.check, device))), flush=True)
        return 0
    card = card_of(device)
    print_card(card)
    outcomes = []
    for name in options.only:
        outcomes.append(run_apart(name, [sys.executable, "-m", "bench.gpu_check", "--check", name]))
        print_outcome(outcomes[-1])
        report = {"card": card, "checks": list(map(asdict, outcomes)), "failed": failed_of(outcomes)}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed_of(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
