"""Inside a stage's process: run its parts, and write down each figure and each failure as it comes.

    python -m tools.gpu_check.worker STAGE --device cuda --results FILE [--tiny] [--part NAME]

A part is a function of a Check, listed in its module's PARTS. What a part raises is one failed
case; the parts behind it still run. Parts of a stage marked `parts_at_once` run in processes of
their own, side by side on the same card.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from tools.gpu_check.expectations import make_figure
from tools.gpu_check.results import append, append_figure, read_results
from tools.gpu_check.rooflines import ASSUMED, Ceilings
from tools.gpu_check.stages import BY_NAME, NAMES

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("hang", "abort", "flood")


class Skipped(Exception):
    """A case that this machine need not pass; the message says what it lacks."""


class Check:
    """What a part is given: the device, the ceilings, and where its findings go.

    `tiny`: sizes at which a CPU and Triton's interpreter go through the same code; no figure means
    anything then.
    """

    def __init__(
        self, stage: str, *, device: torch.device, tiny: bool, results: Path, peers: Path | None
    ):
        self.stage, self.device, self.tiny, self.results, self.peers = (
            stage,
            device,
            tiny,
            results,
            peers,
        )
        self.ceilings = read_ceilings(results)
        self.num_failed = 0

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What a real run computes in: bf16 on a card; a CPU only emulates it."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    def figure(self, key: str, value: float, *, of: str = "", limit: float | None = None) -> None:
        """Write down one number; its unit, prediction and goal stand in expectations.py."""
        append_figure(self.results, self.stage, make_figure(key, float(value), of=of, limit=limit))

    def note(self, text: str) -> None:
        """Keep some text; it goes into the report whole."""
        append(self.results, {"kind": "note", "stage": self.stage, "text": text})

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What is raised inside fails this case and nothing else."""
        try:
            yield
        except Skipped as skipped:
            self._write_case(name, "skipped", str(skipped))
        except Exception as error:  # noqa: BLE001 - what it was is the finding
            self.num_failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            traceback.print_exc()
            path = Path(where.filename)
            if path.is_relative_to(ROOT):
                path = path.relative_to(ROOT)
            message = f"{type(error).__name__} at {path}:{where.lineno}: {error}"
            self._write_case(name, "failed", message)
            if self.is_cuda:
                torch.cuda.empty_cache()  # after running out of memory

    def _write_case(self, name: str, status: str, message: str) -> None:
        record = {"kind": "case", "stage": self.stage, "case": name, "status": status}
        append(self.results, {**record, "message": message[:4000]})


Part = Callable[[Check], None]


def read_ceilings(results: Path) -> Ceilings:
    """Those of this results file, or stand-ins."""
    found = read_results(results, NAMES)
    measured = {
        name: found.value_of(f"ceilings.{name}")
        for name in ("copy_gb_s", "bf16_tflop_s", "fp32_tflop_s", "tf32_tflop_s")
    }
    values = {name: value for name, value in measured.items() if value is not None}
    return Ceilings(**values) if len(values) == len(measured) else ASSUMED


def run_parts(check: Check, parts: Mapping[str, Part]) -> None:
    """One after the other; on a card each begins with the memory of the one before given back."""
    for name, part in parts.items():
        started = time.perf_counter()
        with check.case(name):
            part(check)
        if check.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        print(f"{check.stage}: {name}: {time.perf_counter() - started:.1f} s", flush=True)


def run_apart(check: Check, parts: Mapping[str, Part], arguments: list[str]) -> None:
    """Each in a process of its own, all at once. They write to the same results file."""
    command = [sys.executable, "-m", "tools.gpu_check.worker", *arguments, "--part"]
    processes = {name: subprocess.Popen([*command, name], cwd=ROOT) for name in parts}
    for name, process in processes.items():
        with check.case(name):
            status = process.wait()
            if status not in (0, 1):  # 1: its cases have said what failed
                raise RuntimeError(f"its process ended with exit status {status}")
        check.num_failed += process.returncode == 1


def commit_fault(fault: str) -> None:
    """What a broken kernel or a lost card does to a process; for rehearsing."""
    if fault == "abort":
        os.abort()
    if fault == "flood":
        for _ in range(2**14):
            print("flood " * 2048)
        return
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
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    if options.fault:
        commit_fault(options.fault)
    if options.peers is not None:
        sys.path.append(str(options.peers))  # at the end: a peer's packages must not hide ours
    stage = BY_NAME[options.stage]
    parts: dict[str, Part] = importlib.import_module(f"tools.gpu_check.{stage.name}").PARTS
    check = Check(
        stage.name,
        device=torch.device(options.device),
        tiny=options.tiny,
        results=options.results,
        peers=options.peers,
    )
    if options.part:
        run_parts(check, {options.part: parts[options.part]})
    elif stage.parts_at_once:
        run_apart(check, parts, sys.argv[1:])
    else:
        run_parts(check, parts)
    return 1 if check.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
