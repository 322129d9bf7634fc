"""Check this project on the machine's card, most valuable first, within a deadline.

    python -m tools.gpu_check                    five minutes: the first seven (make gpu-check)
    python -m tools.gpu_check --minutes 8        all stages
    python -m tools.gpu_check --only rates head  these, whatever they are
    python -m tools.gpu_check --failed           what failed or was skipped last time on this card
    python -m tools.gpu_check --list             stages, durations and limits; runs nothing
    python -m tools.gpu_check --rehearse         on the CPU, tiny: proves code, measures nothing

Each stage runs in a process group of its own. One that crashes, hangs or floods its output loses
its own figures and no other's. OUT/results.jsonl grows line by line, OUT/report.md is written anew
after every stage, OUT/output.log holds what the stages printed. Exit status: 0 nothing failed, 1
something did, 2 no card here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from tools.gpu_check.processes import Ending, run_limited
from tools.gpu_check.report import figure_line, outcome_line, to_markdown, to_text
from tools.gpu_check.results import StageResult, append, read_results
from tools.gpu_check.revision import ROOT, revision
from tools.gpu_check.stages import BY_NAME, CASES_FAILED, NAMES, STAGES, Stage

DEFAULT_MINUTES = 5.0
FIND_CARD_S = 30.0
REHEARSAL_PATIENCE = 4  # times a stage's limit: two cores are not a card
# Asks the driver directly: torch takes seconds to import, and may be missing or broken here.
CARD_NAME = """
import ctypes
cuda, name, device = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(100), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDeviceGetName(name, 100, device) == 0
print(name.value.decode())
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="deadline; default 5"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--only", nargs="+", choices=NAMES, metavar="STAGE", help="these stages")
    chosen.add_argument("--failed", action="store_true", help="what is not passed yet")
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder for results"
    )
    parser.add_argument(
        "--peers", type=Path, help="folder with other projects' packages, for `head`"
    )
    parser.add_argument("--fault", metavar="STAGE=hang|abort|flood", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be > 0, got {options.minutes:g}")
    return options


def print_plan(minutes: float) -> None:
    """Prints the stages with expected seconds and limits, and which the deadline may leave out."""
    total = 0
    print(f"{'stage':12}{'expected s':>11}{'limit s':>9}{'sum s':>7}  answers")
    for stage in STAGES:
        total += stage.expected_s
        late = "" if total <= 60 * minutes else f"   (behind {minutes:g} minutes)"
        seconds = f"{stage.expected_s:11}{stage.budget_s:9}{total:7}"
        print(f"{stage.name:12}{seconds}  {stage.answers}{late}")


def find_card() -> str | None:
    """Returns the card's name from its driver; None if there is no driver, card or answer."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", CARD_NAME],
            capture_output=True,
            text=True,
            timeout=FIND_CARD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def choose(options: argparse.Namespace, results: Path) -> list[Stage]:
    """Returns the stages to run, most valuable first."""
    if options.only:
        return [stage for stage in STAGES if stage.name in options.only]
    if options.failed:
        unfinished = read_results(results, NAMES).unfinished()
        return [BY_NAME[name] for name in unfinished]
    return list(STAGES)


def run_stages(chosen: list[Stage], options: argparse.Namespace, results: Path) -> None:
    """Runs stages one by one; records as skipped those that the deadline leaves no time for."""
    deadline = time.perf_counter() + 60 * options.minutes
    with (options.out / "output.log").open("ab") as log:
        for stage in chosen:
            left_s = deadline - time.perf_counter()
            # A stage that would be cut off soon is not started: the seconds left may suffice for a
            # shorter one.
            if left_s < stage.expected_s:
                message = (
                    f"expected to take {stage.expected_s} s, {max(0.0, left_s):.0f} s were left"
                )
                skip_stage(results, stage, message)
            else:
                try:
                    run_stage(stage, left_s, options, results, log)
                finally:
                    write_page(options.out, results)


def write_page(folder: Path, results: Path) -> None:
    """Writes report.md. A page that cannot be made or written must not end the run."""
    try:
        page = to_markdown(read_results(results, NAMES))
        (folder / "report.md").write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"gpu_check: report.md could not be written: {error}", file=sys.stderr)


def run_stage(
    stage: Stage, left_s: float, options: argparse.Namespace, results: Path, log: BinaryIO
) -> None:
    """Runs a stage in a process group of its own, within its limit and the deadline."""
    patience = REHEARSAL_PATIENCE if options.rehearse else 1
    # The deadline holds for all stages together, so the last one may get less than its own limit.
    limit_s = min(patience * stage.budget_s, left_s)
    # Written before the process starts: if everything dies now, the stage reads as "cut short".
    append(results, {"kind": "begin", "stage": stage.name, "revision": revision()})
    command = [sys.executable, "-m", "tools.gpu_check.worker", stage.name]
    command += ["--results", str(results.resolve())]
    command += ["--device", "cpu", "--tiny"] if options.rehearse else ["--device", "cuda"]
    if options.peers is not None and stage.name == "head":
        command += ["--peers", str(options.peers.resolve())]
    if options.fault and options.fault.startswith(f"{stage.name}="):
        command += ["--fault", options.fault.partition("=")[2]]
    # Triton decides when kernels are defined whether to interpret them, so this must be set
    # outside.
    environ = os.environ | {"TRITON_INTERPRET": "1" if options.rehearse else "0"}
    environ |= {"PYTHONUNBUFFERED": "1"}
    print(f"{stage.name}: at most {limit_s:.0f} s ..", flush=True)
    log.write(f"\n==== {stage.name}\n".encode())
    num_printed = 0

    # The stage writes figures to a file; the driver reads it anew and prints those not seen yet.
    def print_new_figures() -> None:
        nonlocal num_printed
        figures = read_results(results, NAMES).stages[stage.name].figures
        for figure in figures[num_printed:]:
            print(f"  {figure_line(figure)}", flush=True)
        num_printed = len(figures)

    def print_quietly() -> None:
        with contextlib.suppress(OSError, ValueError):  # closed terminal, half-written line
            print_new_figures()

    ending = run_limited(
        command, limit_s=limit_s, log=log, environ=environ, folder=ROOT, on_tick=print_quietly
    )
    stage_result = read_results(results, NAMES).stages[stage.name]
    status, message = judge(ending, stage_result, limit_s, is_deadline=limit_s == left_s)
    if ending.num_survivors:
        message += f"; {ending.num_survivors} processes could not be killed"
    end_stage(results, stage, status, message, ending.seconds)


def judge(
    ending: Ending, stage: StageResult, limit_s: float, *, is_deadline: bool
) -> tuple[str, str]:
    """Returns (status, message) of an ended stage; being cut by the deadline is no failure."""
    if ending.returncode is None and is_deadline and not stage.failures:
        return "cut short", f"the deadline left it {limit_s:.0f} s"
    if ending.returncode is None:
        return "killed", f"no end after {limit_s:.0f} s"
    if ending.returncode == 0:
        return "passed", ""
    # Any other exit status means that the process itself broke; then its last lines must explain
    # it.
    if ending.returncode == CASES_FAILED and stage.failures:
        return "failed", f"{len(stage.failures)} failed, first {stage.failures[0]['case']}"
    return "failed", f"exit status {ending.returncode}: {ending.last_lines}"


def end_stage(results: Path, stage: Stage, status: str, message: str, seconds: float) -> None:
    """Records how a stage ended, and prints it."""
    record = {"kind": "stage", "stage": stage.name, "status": status, "message": message}
    append(results, {**record, "seconds": round(seconds, 1)})
    print(outcome_line(read_results(results, NAMES).stages[stage.name]), flush=True)


def skip_stage(results: Path, stage: Stage, message: str) -> None:
    """Prints a skip, and records it unless an earlier run on this card has results of the stage."""
    if read_results(results, NAMES).stages[stage.name].status == "not run":
        end_stage(results, stage, "skipped", message, 0.0)
    else:
        print(f"{stage.name}: skipped: {message}; what was found earlier stays", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    print_plan(options.minutes)
    if options.list:
        return 0
    device = "CPU, rehearsed: no figure means anything" if options.rehearse else find_card()
    if device is None:
        print("gpu_check: no CUDA card here, nothing was checked", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    chosen = choose(options, results)
    append(results, {
        "kind": "run",
        "device": device,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "minutes": options.minutes,
        "revision": revision(),
        "python": platform.python_version(),
        "plan": [stage.name for stage in chosen],
    })  # fmt: skip
    # A killed driver must not leave a stage behind that still holds the card.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        run_stages(chosen, options, results)
    except OSError as error:  # such as a full disk; the terminal has shown the figures
        print(f"gpu_check: {results} could not be written: {error}", file=sys.stderr)
        return 1
    state = read_results(results, NAMES)
    print(f"\n{to_text(state)}\n\nwritten: {results} and {options.out / 'report.md'}")
    ran = {stage.name for stage in chosen}
    return 1 if ran & set(state.failed()) else 0


def stop(number: int, _frame: FrameType | None) -> None:
    """Turns a signal into an exception, so that the running stage is killed before we exit."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
