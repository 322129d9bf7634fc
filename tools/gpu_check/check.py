"""What a part of a stage is given: a Check, through which it writes down what it finds."""

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
    """A case that this machine need not pass; the message says what it lacks."""


class Check:
    """What a part is given: the device, the ceilings, and where its findings go.

    `tiny`: sizes at which a CPU and Triton's interpreter go through the same code; no figure means
    anything then.
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
        """Those of this results file as it stands, or stand-ins."""
        return read_ceilings(self.results)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What a real run computes in: bf16 on a card; a CPU only emulates it."""
        return torch.bfloat16 if self.is_cuda else torch.float32

    def randn(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers made on the device; dtype: by default that of the check."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device)
        return values.to(dtype or self.dtype)

    def figure(self, key: str, value: float, *, of: str = "", limit: float | None = None) -> None:
        """Write down one number; its unit, prediction and goal stand in expectations.py."""
        made = make_figure(key, float(value), of=of, limit=limit, is_rehearsed=self.tiny)
        append_figure(self.results, self.stage, made)

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
            traceback.print_exc()
            message = f"{type(error).__name__} at {our_lines(error, 3)}: {error}"
            self._write_case(name, "failed", message)
            self.free_memory()

    def free_memory(self) -> None:
        """Give back what a part held; captured graphs and their engines are cycles."""
        gc.collect()
        if self.is_cuda:
            with contextlib.suppress(RuntimeError):  # of a card that is lost, told elsewhere
                torch.cuda.empty_cache()

    def _write_case(self, name: str, status: str, message: str) -> None:
        record = {"kind": "case", "stage": self.stage, "case": name, "status": status}
        append(self.results, {**record, "message": message[:4000]})


Part = Callable[[Check], None]


def query_driver(fields: str) -> str:
    """What nvidia-smi says of the card, as CSV."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    return done.stdout.strip() or done.stderr.strip()


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    return float((actual.double() - truth).norm() / truth.norm())


def check_close(what: str, actual: Tensor, truth: Tensor, bound: float = 1e-3) -> None:
    """Holds the relative error to a bound; NaN is not close."""
    error = relative_error(actual, truth)
    assert error <= bound, f"{what}: relative error must be <= {bound:g}, got {error:.3g}"


def read_ceilings(results: Path) -> Ceilings:
    """The rates of stage `ceilings`, if all of them were measured."""
    found = read_results(results, NAMES)
    measured = {
        name: found.value_of(f"ceilings.{name}")
        for name in ("copy_gb_s", "read_gb_s", "bf16_tflop_s", "fp32_tflop_s", "tf32_tflop_s")
    }
    values = {name: value for name, value in measured.items() if value is not None}
    return Ceilings(**values) if len(values) == len(measured) else ASSUMED
