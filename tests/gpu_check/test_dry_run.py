"""Checks the dry run, which runs the stages on a fake card to find faults before a real one.

Most tests need no CUDA build of torch: what it selects, replaces and reports. With such a build all
parts of all stages are run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tools.gpu_check import dry_run
from tools.gpu_check.lines import our_line, our_lines
from tools.gpu_check.outcome import COLUMNS, Outcome, lines_of, table
from tools.gpu_check.recorder import HostRead, Recorder
from tools.gpu_check.stand_ins import Card, Event, Generator, Graph, Profile

ROOT = Path(__file__).resolve().parents[2]
CUDA = "cuda:0"
needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None,
    reason="needs a CUDA build of torch; no card",
)
# QUICK and SLOW together are every part of every stage. QUICK takes a quarter of a minute.
QUICK = ["machine", "ceilings", "kernels", "rates", "head", "profilers", "engine:beside"]
QUICK += ["attention", "decode:steps of 4B", "decode:driver", "training:gradients"]
QUICK += ["batch:memory of 4B"]
SLOW = ["engine", "decode", "training", "batch", "learning"]


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """Yields a recorder of what is done on the fake card within the block."""
    recorder = Recorder()
    section = recorder.section("test", may_read=True)
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, section:
        yield recorder


def test_without_a_cuda_build_exits_2_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert dry_run.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "a CUDA build of torch is needed" in printed.err and "gpu-dry-run" in printed.err


def test_parts_are_selected_by_stage_and_word() -> None:
    """A selection is a stage, or a stage and a word of a part's name; others are refused."""
    all_parts = dry_run.select([])
    assert ("machine", "describe") in all_parts and ("engine", "preemption") in all_parts
    assert dry_run.select(["engine:sync", "head"])[0] == ("engine", "syncs")
    assert {stage for stage, _ in dry_run.select(["engine:sync", "head"])} == {"engine", "head"}
    for name in ("engin", "engine:sink"):
        with pytest.raises(ValueError, match=f"{name} must be a stage, or STAGE:PART"):
            dry_run.select([name])
    assert {name.partition(":")[0] for name in QUICK + SLOW} == {stage for stage, _ in all_parts}


def test_replaced_and_skipped_names_exist() -> None:
    """Every function that the dry run replaces and every part that it skips exists."""
    for modules, name, stand_in, reason in dry_run.REPLACED:
        assert callable(stand_in) and reason
        for module in modules.split():
            assert callable(getattr(dry_run.module_of(module), name))
    names = {f"{stage}: {part}" for stage, part in dry_run.select([])}
    assert set(dry_run.SKIPPED) <= names
    for module, name, count in dry_run.FEWER:
        assert count <= getattr(module, name)
    assert "`under` of profilers" in dry_run.about_stand_ins()


def test_outcomes_are_printed_as_lines_and_rows() -> None:
    fine = Outcome("rates", "draw", num_triton=2, num_torch=3, num_figures=1, peak_gib=1.5)
    assert lines_of(fine) == [
        "rates: draw: 5 launches (2 of Triton), 0 host reads, 1 figures, 1.50 GiB, 0.0 s; ok"
    ]
    partly = Outcome("head", "peers", skips=["verl, D 16: not installed"])
    assert lines_of(partly)[1:] == ["    skipped: verl, D 16: not installed"]
    skipped = Outcome("kernels", "flash", skips=["flash: flash-attn is not installed"])
    broken = Outcome("engine", "syncs", skips=["x"], faults=["it is wrong", "and again"])
    assert [row.split(" | ")[-1] for row in table([fine, partly, skipped, broken])[2:]] == [
        "ok |",
        "ok, 1 cases skipped |",
        "skipped: flash-attn is not installed |",
        "2 faults |",
    ]
    assert table([fine])[2] == "| rates: draw | 5 | 2 | 0 | 0 | 1 | 1.50 | ok |"


def test_a_capture_is_held_to_what_a_card_allows() -> None:
    """In a capture the host may neither upload a tensor nor read one; both are faults."""
    with recording() as recorder:
        card = Card(recorder)
        graph = Graph()
        section = recorder.current
        assert section is not None
        x = torch.ones(2).to(CUDA)
        with pytest.raises(AssertionError, match="was not captured"):
            graph.replay()
        with card.capture(graph):
            assert card.is_capturing
            x.add_(1)
        graph.replay()
        with card.capture(Graph(), graph.pool()):
            torch.ones(2).to(CUDA)
        with pytest.raises(HostRead), card.capture(Graph()):
            x.sum().item()
        assert not card.is_capturing and recorder.knows_values
        x.sum().item()  # allowed again after the capture
    upload, read = section.faults
    assert upload.startswith("host tensor: aten._to_copy of f32[2] at tests/gpu_check/test_dry_run")
    assert read.startswith("host read: aten._local_scalar_dense of f32[] at tests/gpu_check/test_")
    assert len(section.reads) == 2 and len(section.uploads) == 2


def test_sync_debug_mode_reports_calls_that_wait() -> None:
    """The stand-in for torch's sync debug mode warns or raises where the host waits for the card.

    It says nothing of torch.cuda.synchronize, as on a real card.
    """
    with recording() as recorder:
        card = Card(recorder)
        recorder.on_wait = card.on_wait
        x = torch.ones(2).to(CUDA)
        card.set_sync_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x.cpu()
            recorder.read("torch.cuda.synchronize")
        assert [str(warning.message)[:37] for warning in caught] == [
            "called a synchronizing CUDA operation"
        ]
        card.set_sync_mode("error")
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            x.cpu()


def test_small_stand_ins() -> None:
    """Events measure time, a generator is the CPU's, and a profile counts ops."""
    begin, end = (Event(enable_timing=True) for _ in range(2))
    begin.record()
    with pytest.raises(AssertionError):
        begin.elapsed_time(end)
    end.record()
    assert begin.elapsed_time(end) > 0
    assert Generator(CUDA).manual_seed(3).device.type == "cpu"
    with recording() as recorder:
        x = torch.ones(2).to(CUDA)
        with Profile(recorder) as profile:
            x.mul(2).mul(2)
    [row] = profile.key_averages()
    assert (row.key, row.count, row.device_time_total) == ("aten.mul", 2, 2.0)


def test_lines_named_are_those_of_the_project() -> None:
    """A fault is located at the project's own line, not at one of torch's."""
    assert our_line().startswith("tests/gpu_check/test_dry_run.py:")
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert our_lines(caught.value, 3).startswith("tests/gpu_check/test_dry_run.py:")


def run_python(*arguments: str, limit_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs Python in another process, since in this one kernels are the interpreter's."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )


@needs_cuda_build
@pytest.mark.parametrize("parts", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_the_dry_run_finds_no_fault(parts: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    process = run_python("-m", "tools.gpu_check.dry_run", *parts, "--markdown", str(page))
    assert process.returncode == 0 and process.stderr == "", process.stderr
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines()]
    names = {row[0].removeprefix("| ") for row in rows if len(row) == len(COLUMNS)}
    assert {f"{stage}: {part}" for stage, part in dry_run.select(parts)} <= names


FAULTS = """
import sys
import torch
from socpo_fast.kernels import swiglu
from tools.gpu_check import dry_run, machine
from tools.gpu_check.models import MODELS, make_model

def rows(device="cuda"):
    return torch.empty(4, 8, device=device)

def wrong_keyword(check):
    swiglu._swiglu_kernel[(1,)](rows(), rows(), BLOCK=3)

def host_tensor(check):
    swiglu.swiglu(rows("cpu"))

def wrong_shape(check):
    with check.case("a shape that does not fit"):
        rows() @ rows()

def out_of_memory(check):
    held = [torch.empty(2**30, device="cuda") for _ in range(20)]

def read_in_a_capture(check):
    x = rows()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        float(x.sum())

def left_behind(check):
    machine.kept = torch.empty(2**20, device="cuda")

def wrong_figure(check):
    check.figure("machine.no_such_figure", 1)

functions = (wrong_keyword, host_tensor, wrong_shape, out_of_memory, read_in_a_capture, left_behind)
machine.PARTS = {part.__name__: part for part in (*functions, wrong_figure)}
sys.exit(dry_run.main(["machine"]))
"""


@needs_cuda_build
def test_faults_are_found_and_named() -> None:
    """Each planted fault is found and named, with the op and the line that caused it."""
    process = run_python("-c", FAULTS)
    assert process.returncode == 1
    faults = [line.removeprefix("dry run: machine: ") for line in process.stderr.splitlines()]
    expected = (
        "wrong_keyword: _swiglu_kernel at",
        "host_tensor: _swiglu_kernel at socpo_fast/kernels/swiglu.py:",
        "wrong_shape: a shape that does not fit: RuntimeError at",
        "out_of_memory: out of memory at",
        "read_in_a_capture: host read: aten._local_scalar_dense of f32[]",
        "left_behind: 4.0 MiB are still held when the part has ended",
        "wrong_figure: wrong_figure: ",
    )
    for start in expected:
        assert any(fault.startswith(start) for fault in faults), (start, faults)
    assert any("x_ptr must be on cuda" in fault or "on cuda, got" in fault for fault in faults)
    assert "at most 80.0 GiB, more than the 78 of a card" in process.stderr
