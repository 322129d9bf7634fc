"""Check this project on the machine's card, most valuable first, within a deadline.

    python -m tools.gpu_check                      the first six stages, five minutes (make
    gpu-check) python -m tools.gpu_check --minutes 8          all of them python -m tools.gpu_check
    --only rates head    these, whatever they are python -m tools.gpu_check --failed
    what failed or was skipped last time on this card python -m tools.gpu_check --list
    the stages, their durations and limits; runs nothing python -m tools.gpu_check --rehearse
    every stage on the CPU, tiny: proves the code, measures nothing

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
from tools.gpu_check.revision import revision
from tools.gpu_check.stages import BY_NAME, CASES_FAILED, NAMES, STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_MINUTES = 5.0
FIND_CARD_S = 30.0
REHEARSAL_PATIENCE = 4  # times a stage's limit: two cores are not a card
CARD_NAME = """
import ctypes
cuda, name, device = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(100), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
assert cuda.cuDeviceGetName(name, 100, device) == 0
print(name.value.decode())
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
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
    """Stages with their expected seconds, their limits, and what the deadline may leave out."""
    total = 0
    print(f"{'stage':12}{'expected s':>11}{'limit s':>9}{'sum s':>7}  answers")
    for stage in STAGES:
        total += stage.expected_s
        late = "" if total <= 60 * minutes else f"   (behind {minutes:g} minutes)"
        seconds = f"{stage.expected_s:11}{stage.budget_s:9}{total:7}"
        print(f"{stage.name:12}{seconds}  {stage.answers}{late}")


def find_card() -> str | None:
    """The card's name as its driver tells it, without torch; None: no driver, card or answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", CARD_NAME],
            capture_output=True,
            text=True,
            timeout=FIND_CARD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def choose(options: argparse.Namespace, results: Path) -> list[Stage]:
    """The stages to run, most valuable first."""
    if options.only:
        return [stage for stage in STAGES if stage.name in options.only]
    if options.failed:
        unfinished = read_results(results, NAMES).unfinished()
        return [BY_NAME[name] for name in unfinished]
    return list(STAGES)


def run_stages(chosen: list[Stage], options: argparse.Namespace, results: Path) -> None:
    """One after the other; what the deadline leaves no time for is written down as skipped."""
    deadline = time.perf_counter() + 60 * options.minutes
    with (options.out / "output.log").open("ab") as log:
        for stage in chosen:
            left_s = deadline - time.perf_counter()
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
    """report.md; a page that cannot be made or written must not end the run."""
    try:
        page = to_markdown(read_results(results, NAMES))
        (folder / "report.md").write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"gpu_check: report.md could not be written: {error}", file=sys.stderr)


def run_stage(
    stage: Stage, left_s: float, options: argparse.Namespace, results: Path, log: BinaryIO
) -> None:
    """One stage in a process group of its own, within its limit and the deadline."""
    patience = REHEARSAL_PATIENCE if options.rehearse else 1
    limit_s = min(patience * stage.budget_s, left_s)
    append(results, {"kind": "begin", "stage": stage.name, "revision": revision()})
    command = [sys.executable, "-m", "tools.gpu_check.worker", stage.name]
    command += ["--results", str(results.resolve())]
    command += ["--device", "cpu", "--tiny"] if options.rehearse else ["--device", "cuda"]
    if options.peers is not None and stage.name == "head":
        command += ["--peers", str(options.peers.resolve())]
    if options.fault and options.fault.startswith(f"{stage.name}="):
        command += ["--fault", options.fault.partition("=")[2]]
    environ = os.environ | {"TRITON_INTERPRET": "1" if options.rehearse else "0"}
    environ |= {"PYTHONUNBUFFERED": "1"}
    print(f"{stage.name}: at most {limit_s:.0f} s ..", flush=True)
    log.write(f"\n==== {stage.name}\n".encode())
    num_printed = 0

    def print_new_figures() -> None:
        nonlocal num_printed
        figures = read_results(results, NAMES).stages[stage.name].figures
        for figure in figures[num_printed:]:
            print(f"  {figure_line(figure)}", flush=True)
        num_printed = len(figures)

    def print_quietly() -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal, a torn file
            print_new_figures()

    ending = run_limited(
        command, limit_s=limit_s, log=log, environ=environ, folder=ROOT, on_tick=print_quietly
    )
    found = read_results(results, NAMES).stages[stage.name]
    status, message = judge(ending, found, limit_s, is_deadline=limit_s == left_s)
    if ending.num_survivors:
        message += f"; {ending.num_survivors} processes could not be killed"
    end_stage(results, stage, status, message, ending.seconds)


def judge(
    ending: Ending, stage: StageResult, limit_s: float, *, is_deadline: bool
) -> tuple[str, str]:
    """(status, message) of a stage whose process has ended; the deadline is nobody's fault."""
    if ending.returncode is None and is_deadline and not stage.failures:
        return "cut short", f"the deadline left it {limit_s:.0f} s"
    if ending.returncode is None:
        return "killed", f"no end after {limit_s:.0f} s"
    if ending.returncode == 0:
        return "passed", ""
    if ending.returncode == CASES_FAILED and stage.failures:
        return "failed", f"{len(stage.failures)} failed, first {stage.failures[0]['case']}"
    return "failed", f"exit status {ending.returncode}: {ending.last_lines}"


def end_stage(results: Path, stage: Stage, status: str, message: str, seconds: float) -> None:
    record = {"kind": "stage", "stage": stage.name, "status": status, "message": message}
    append(results, {**record, "seconds": round(seconds, 1)})
    print(outcome_line(read_results(results, NAMES).stages[stage.name]), flush=True)


def skip_stage(results: Path, stage: Stage, message: str) -> None:
    """Told, and written down unless an earlier run on this card has something of it."""
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        run_stages(chosen, options, results)
    except OSError as error:  # a full disk: figures went to the terminal as well
        print(f"gpu_check: {results} could not be written: {error}", file=sys.stderr)
        return 1
    found = read_results(results, NAMES)
    print(f"\n{to_text(found)}\n\nwritten: {results} and {options.out / 'report.md'}")
    ran = {stage.name for stage in chosen}
    return 1 if ran & set(found.failed()) else 0


def stop(number: int, _frame: FrameType | None) -> None:
    """As an exception, so that the stage that is running is ended with us."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
