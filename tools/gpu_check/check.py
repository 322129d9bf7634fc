"""Holds Check, the argument of every part of a stage, and the helpers that parts share."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tools.gpu_check.expectations import make_figure
from tools.gpu_check.lines import our_lines
from tools.gpu_check.results import append, append_figure, read_results
from tools.gpu_check.revision import ROOT as ROOT
from tools.gpu_check.rooflines import ASSUMED, Ceilings
from tools.gpu_check.stages import NAMES


class Skipped(Exception):
    """Raised by a case that this machine need not pass; the message says what it lacks."""


class Check:
    """What a part works with: the device, the measured ceilings, and the file for its results.

    `tiny` asks for sizes at which a CPU and Triton's interpreter can run the same code. Figures
    then mean nothing.
    """

    def __init__(
        self, stage: str, *, device: torch.device, tiny: bool, results: Path, peers: Path | None
    ):
        self.stage = stage
        self.device = device
        self.tiny = tiny
        self.results = results
        self.peers = peers
        self.num_failed = 0

    @property
    def ceilings(self) -> Ceilings:
        """The rates in the results file at this moment, or assumed ones where it has none."""
        return read_ceilings(self.results)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a real run: bf16 on a card; fp32 on a CPU, which only emulates bf16."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    def randn(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns normal numbers made on the device; the default dtype is that of the check."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device)
        return values.to(dtype or self.dtype)

    def figure(self, key: str, value: float, *, of: str = "", limit: float | None = None) -> None:
        """Records one number; its unit, prediction and goal come from expectations.py."""
        record = make_figure(key, float(value), of=of, limit=limit, is_rehearsed=self.tiny)
        append_figure(self.results, self.stage, record)

    def note(self, text: str) -> None:
        """Records a text that the report shows in full."""
        append(self.results, {"kind": "note", "stage": self.stage, "text": text})

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Runs the block as a named case: an error in it fails this case and nothing else."""
        try:
            yield
        except Skipped as skipped:
            self._write_case(name, "skipped", str(skipped))
        except Exception as error:  # noqa: BLE001 - recorded below as a failed case
            # Whatever was raised is the result of this case. The cases after it still run.
            self.num_failed += 1
            traceback.print_exc()
            message = f"{type(error).__name__} at {our_lines(error, 3)}: {error}"
            self._write_case(name, "failed", message)
            self.free_memory()

    def free_memory(self) -> None:
        """Frees what a part held; captured graphs and their engines are reference cycles."""
        gc.collect()
        if self.is_cuda:
            with contextlib.suppress(RuntimeError):  # a lost card; is_alive notices that
                torch.cuda.empty_cache()

    def _write_case(self, name: str, status: str, message: str) -> None:
        # A message can hold a whole compiler output; the log has all of it.
        record = {"kind": "case", "stage": self.stage, "case": name, "status": status}
        append(self.results, {**record, "message": message[:4000]})


Part = Callable[[Check], None]


def query_driver(fields: str) -> str:
    """Returns what nvidia-smi reports about the card, as CSV."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    return result.stdout.strip() or result.stderr.strip()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Returns the norm of the difference over the norm of the truth."""
    return float((actual.double() - truth).norm() / truth.norm())


def check_close(what: str, actual: Tensor, truth: Tensor, bound: float = 1e-3) -> None:
    """Asserts that the relative error is within a bound; NaN never is."""
    error = relative_error(actual, truth)
    assert error <= bound, f"{what}: relative error must be <= {bound:g}, got {error:.3g}"


def read_ceilings(results: Path) -> Ceilings:
    """Returns the rates of stage `ceilings` if all of them were measured, else assumed ones."""
    state = read_results(results, NAMES)
    measured = {
        name: state.value_of(f"ceilings.{name}")
        for name in ("copy_gb_s", "read_gb_s", "bf16_tflop_s", "fp32_tflop_s", "tf32_tflop_s")
    }
    values = {name: value for name, value in measured.items() if value is not None}
    # All or none: a mixture of measured and assumed rates would be hard to interpret.
    return Ceilings(**values) if len(values) == len(measured) else ASSUMED
