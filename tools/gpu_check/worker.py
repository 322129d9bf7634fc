"""Runs the parts of a stage inside its process; records each figure and failure as it comes.

    python -m tools.gpu_check.worker STAGE --device cuda --results FILE [--tiny] [--part NAME]

A part is a function of a Check, listed in its module's PARTS. An error in a part is one failed
case; the parts after it still run. Parts of a stage marked `parts_at_once` run in processes of
their own, at the same time and on the same card.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from tools.gpu_check.check import ROOT, Check, Part
from tools.gpu_check.stages import BY_NAME, CASES_FAILED, NAMES

MODULE = "tools.gpu_check.worker"
FAULTS = ("hang", "abort", "flood")


def run_parts(check: Check, parts: Mapping[str, Part], arguments: list[str]) -> None:
    """Runs parts one by one; memory of a part is freed before the next one begins.

    After an illegal memory access a process can no longer use the card. The parts that remain then
    run in a new process, started with `arguments`; [] if this is the only part.
    """
    for name, part in parts.items():
        started = time.perf_counter()
        with check.case(name):
            part(check)
            synchronize(check)
        check.free_memory()
        print(f"{check.stage}: {name}: {time.perf_counter() - started:.1f} s", flush=True)
        if arguments and not is_alive(check):
            print(f"{check.stage}: the card is lost to this process, a new one goes on", flush=True)
            continuation = ["--after", name, "--num-failed", str(check.num_failed)]
            # Replaces this process, so the driver still waits for the same process id.
            os.execv(sys.executable, [sys.executable, "-m", MODULE, *arguments, *continuation])


def synchronize(check: Check) -> None:
    """Waits for the card, so that an asynchronous error is raised in the part that caused it."""
    if check.is_cuda:
        torch.cuda.synchronize(check.device)


def is_alive(check: Check) -> bool:
    """Whether this process can still use the card."""
    try:
        synchronize(check)
    except RuntimeError:
        return False
    return True


def run_apart(check: Check, parts: Mapping[str, Part], arguments: list[str]) -> None:
    """Runs each part in a process of its own, all at once, into the same results file."""
    command = [sys.executable, "-m", MODULE, *arguments, "--part"]
    # The parts share the cores. With all threads each, they would slow each other down.
    num_threads = max(1, len(os.sched_getaffinity(0)) // len(parts))
    environ = os.environ | {"OMP_NUM_THREADS": str(num_threads)}  # idle OpenMP threads spin
    processes = {name: subprocess.Popen([*command, name], cwd=ROOT, env=environ) for name in parts}
    for name, process in processes.items():
        with check.case(name):
            status = process.wait()
            # CASES_FAILED means that the part has recorded its own failures.
            if status not in (0, CASES_FAILED):
                raise RuntimeError(f"its process ended with exit status {status}")
        check.num_failed += process.returncode == CASES_FAILED


def commit_fault(fault: str) -> None:
    """Does what a broken kernel or a lost card does to a process: hang, abort or flood."""
    if fault == "abort":
        os.abort()
    if fault == "flood":
        # About 200 MB of output.
        for _ in range(2**14):
            print("flood " * 2048)
        return
    # A hang with a child in a session of its own, which killing the group does not reach.
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    time.sleep(600)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.worker")
    parser.add_argument("stage", choices=NAMES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--part")
    parser.add_argument("--after", help="begin behind this part")
    parser.add_argument("--num-failed", type=int, default=0, help="cases that failed before")
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    if options.fault:
        commit_fault(options.fault)
    if options.peers is not None:
        sys.path.append(str(options.peers))  # last: packages of a peer must not hide ours
    stage = BY_NAME[options.stage]
    parts: dict[str, Part] = importlib.import_module(f"tools.gpu_check.{stage.name}").PARTS
    check = Check(
        stage.name,
        device=torch.device(options.device),
        tiny=options.tiny,
        results=options.results,
        peers=options.peers,
    )
    check.num_failed = options.num_failed
    if (
        not (options.part or options.after)
        and stage.uses_ceilings
        and not check.ceilings.are_measured
    ):
        check.note(f"limits rest on ceilings that were not measured here: {check.ceilings}")
    arguments = sys.argv[1:]
    if options.part:
        run_parts(check, {options.part: parts[options.part]}, [])
    elif stage.parts_at_once:
        run_apart(check, parts, arguments)
    else:
        names = list(parts)
        remaining = names[names.index(options.after) + 1 :] if options.after else names
        run_parts(check, {name: parts[name] for name in remaining}, arguments)
    return CASES_FAILED if check.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
