"""Runs every stage end to end on a CPU with tiny sizes; checks its needs and its figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_check.expectations import EXPECTATIONS
from tools.gpu_check.results import StageResult, read_results
from tools.gpu_check.stages import NAMES

ROOT = Path(__file__).resolve().parents[2]
# Figures that only a card can give.
CARD_ONLY = {
    "machine.memory_gib", "machine.memory_free_gib",
    "ceilings.link_gb_s", "attention.varlen_ms", "attention.times_varlen",
    "rates.decode_gb_s",
    "decode.step_ms", "decode.graph_ms", "decode.capture_ms", "decode.graph_mib",
    "decode.driver_gib",
    "batch.peak_gib", "batch.reserved_gib",
    "training.reserved_gib",
    "profilers.dram_share", "profilers.occupancy_share", "profilers.memory_errors",
}  # fmt: skip
# Packages that the usual image of a GPU machine lacks. A stage that imports one would fail there.
ABSENT = ("datasets", "math_verify", "socpo_fast._C")
BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
# They take half a minute each, and repeat what the tests of the ops and the benches do.
SLOW = ("kernels", "rates")


def run_stage(name: str, results: Path, environ: dict[str, str]) -> StageResult:
    """Runs a stage in a process of its own; returns what it wrote down."""
    command = [sys.executable, "-m", "tools.gpu_check.worker", name, "--device", "cpu", "--tiny"]
    process = subprocess.run(
        [*command, "--results", str(results)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    stage = read_results(results, NAMES).stages[name]
    assert process.returncode == 0, (
        stage.failures,
        process.stdout[-3000:],
        process.stderr[-3000:],
    )
    return stage


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES]
)
def test_stage_runs_tiny(name: str, tmp_path: Path) -> None:
    """A stage passes and writes every figure that is expected of it, except for a card's own."""
    stage = run_stage(name, tmp_path / "results.jsonl", {})
    assert stage.failures == []
    assert {figure.verdict for figure in stage.figures} <= {"rehearsed"}
    expected = {key for key in EXPECTATIONS if key.startswith(f"{name}.") and ": " not in key}
    assert expected - {figure.key for figure in stage.figures} <= CARD_ONLY


def test_a_bare_image_is_enough(tmp_path: Path) -> None:
    """The trainer's stage runs without the command line's packages and the C++ extension."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    stage = run_stage("learning", tmp_path / "results.jsonl", {"PYTHONPATH": str(tmp_path)})
    assert stage.figures and not stage.skips


def test_another_package_named_tests_hides_nothing(tmp_path: Path) -> None:
    """A foreign package named `tests`, `tools` or `bench` does not hide the checkout's folder.

    Some wheels ship a top-level `tests`, and PYTHONPATH comes before a checkout's folders.
    """
    for name in ("tests", "tools", "bench"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise RuntimeError('not ours')\n", encoding="utf-8"
        )
    stage = run_stage("ceilings", tmp_path / "results.jsonl", {"PYTHONPATH": str(tmp_path)})
    assert stage.figures
