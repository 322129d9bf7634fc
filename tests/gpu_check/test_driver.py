"""Checks `python -m tools.gpu_check` as its user sees it: plan, faults, deadline, --failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tools.gpu_check import __main__ as driver
from tools.gpu_check.processes import Ending, descendants
from tools.gpu_check.results import StageResult, append, read_results
from tools.gpu_check.stages import BY_NAME, CASES_FAILED, NAMES, STAGES

ROOT = Path(__file__).resolve().parents[2]


def run_driver(
    *arguments: str, path: str = "", timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.gpu_check", *arguments]
    environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_the_plan_fits_into_eight_minutes() -> None:
    """Seven stages are expected within five minutes, and all but the last one within eight."""
    expected = [stage.expected_s for stage in STAGES]
    assert sum(expected[:7]) <= 300 and sum(expected[:-1]) <= 480
    assert all(stage.expected_s < stage.budget_s <= 120 for stage in STAGES)
    assert NAMES[:3] == ("machine", "ceilings", "kernels")


def test_list_runs_nothing(tmp_path: Path) -> None:
    process = run_driver("--list", "--out", str(tmp_path / "out"))
    assert process.returncode == 0 and not (tmp_path / "out").exists()
    lines = process.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(NAMES)
    assert sum("behind 5 minutes" in line for line in lines) == 5
    assert "behind" not in run_driver("--list", "--minutes", "9").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_exits_2_with_one_line(tmp_path: Path) -> None:
    process = run_driver("--out", str(tmp_path / "out"))
    assert process.returncode == 2 and not (tmp_path / "out").exists()
    assert process.stderr == "gpu_check: no CUDA card here, nothing was checked\n"


def test_a_cuda_driver_that_hangs_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken CUDA driver can block forever; asking for the card's name has a time limit."""
    monkeypatch.setattr(driver, "FIND_CARD_S", 0.5)
    monkeypatch.setattr(driver, "CARD_NAME", "import time; time.sleep(60)")
    assert driver.find_card() is None
    monkeypatch.setattr(driver, "FIND_CARD_S", 20.0)
    monkeypatch.setattr(driver, "CARD_NAME", "print('NVIDIA Something')")
    assert driver.find_card() == "NVIDIA Something"


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("hang", "killed", "no end after 4 s"),
        ("abort", "failed", "exit status -6"),
        ("flood", "passed", ""),
    ],
)
def test_a_fault_costs_its_own_stage(
    fault: str, status: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault in one stage the next stage still runs, and no process is left."""
    budget_s = 1 if fault == "hang" else 60
    short_stages = tuple(
        stage.__class__(**{**vars(stage), "expected_s": 1, "budget_s": budget_s})
        if stage.name == "machine"
        else stage
        for stage in STAGES
    )
    monkeypatch.setattr(driver, "STAGES", short_stages)
    old_processes = set(descendants(os.getpid()))
    options = ["--rehearse", "--only", "machine", "ceilings", "--fault", f"machine={fault}"]
    status_code = driver.main([*options, "--out", str(tmp_path)])
    stages = read_results(tmp_path / "results.jsonl", NAMES).stages
    assert stages["machine"].status == status and stages["machine"].message.startswith(message)
    assert stages["ceilings"].status == "passed" and stages["ceilings"].figures
    assert status_code == (0 if status == "passed" else 1)
    assert set(descendants(os.getpid())) <= old_processes
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| machine | {status} |" in page and "ceilings.copy_gb_s" in page
    assert (tmp_path / "output.log").stat().st_size < 2**20


def test_deadline_skips_stages_and_failed_reruns_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that do not fit before the deadline are skipped with the reason.

    `--failed` runs exactly these and the failed ones.
    """
    ran: list[str] = []

    def run_stage(stage: object, left_s: float, *args: object) -> None:
        ran.append(stage.name)
        driver.end_stage(args[1], stage, "failed" if stage.name == "engine" else "passed", "x", 1.0)

    monkeypatch.setattr(driver, "run_stage", run_stage)
    arguments = ["--rehearse", "--minutes", "0.8", "--out", str(tmp_path)]
    assert driver.main(arguments) == 1
    assert ran == [name for name in NAMES if BY_NAME[name].expected_s <= 48]
    skipped = [name for name in NAMES if name not in ran]
    stages = read_results(tmp_path / "results.jsonl", NAMES).stages
    assert {name for name in NAMES if stages[name].status == "skipped"} == set(skipped)
    assert stages["decode"].message == "expected to take 57 s, 48 s were left"
    ran.clear()
    assert driver.main(["--rehearse", "--failed", "--minutes", "9", "--out", str(tmp_path)]) == 1
    assert ran == [name for name in NAMES if name in (*skipped, "engine")]
    monkeypatch.setattr(driver, "STAGES", ())
    assert driver.main(["--rehearse", "--out", str(tmp_path)]) == 0


def test_a_stage_gets_no_more_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limits: list[float] = []

    def run_limited(_command: object, *, limit_s: float, **_options: object) -> Ending:
        limits.append(limit_s)
        return Ending(None, limit_s, "", 0)

    monkeypatch.setattr(driver, "run_limited", run_limited)
    arguments = ["--rehearse", "--only", "machine", "--out", str(tmp_path), "--minutes"]
    assert driver.main([*arguments, "0.3"]) == 0, "the deadline is nobody's fault"
    assert driver.main([*arguments, "9"]) == 1
    assert limits[0] <= 18
    assert limits[1] == driver.REHEARSAL_PATIENCE * BY_NAME["machine"].budget_s


@pytest.mark.parametrize(
    ("returncode", "failures", "is_deadline", "status", "message"),
    [
        (0, 0, False, "passed", ""),
        (CASES_FAILED, 2, False, "failed", "2 failed, first decode"),
        (1, 2, False, "failed", "exit status 1: last"),  # an exception between the parts
        (CASES_FAILED, 0, False, "failed", "exit status 3: last"),
        (-11, 0, False, "failed", "exit status -11: last"),
        (None, 0, False, "killed", "no end after 30 s"),
        (None, 0, True, "cut short", "the deadline left it 30 s"),
        (None, 1, True, "killed", "no end after 30 s"),
    ],
)
def test_status_of_a_stage_by_how_it_ended(
    returncode: int | None, failures: int, is_deadline: bool, status: str, message: str
) -> None:
    """Exit status, failed cases and the deadline determine a stage's status and message."""
    stage = StageResult("rates", failures=[{"case": "decode"}] * failures)
    ending = Ending(returncode, 1.0, "last", 0)
    assert driver.judge(ending, stage, 30.0, is_deadline=is_deadline) == (status, message)


def test_a_skipped_stage_keeps_its_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that the deadline skips in a second run still has the results of the first one."""

    def run_stage(stage: object, left_s: float, *args: object) -> None:
        append(args[1], {"kind": "begin", "stage": stage.name, "revision": "one"})
        driver.end_stage(args[1], stage, "passed", "", 1.0)

    monkeypatch.setattr(driver, "run_stage", run_stage)
    for minutes in ("9", "0.1"):
        options = ["--rehearse", "--only", "rates", "--minutes", minutes, "--out", str(tmp_path)]
        assert driver.main(options) == 0
    stage = read_results(tmp_path / "results.jsonl", NAMES).stages["rates"]
    assert (stage.status, stage.revision) == ("passed", "one")


def test_an_unwritable_page_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.md").mkdir()
    driver.write_page(tmp_path, tmp_path / "results.jsonl")
    assert "report.md could not be written" in capsys.readouterr().err


def test_a_signal_ends_the_stage_with_the_driver(tmp_path: Path) -> None:
    """SIGTERM to the driver also ends the process of a stage that hangs."""
    command = [sys.executable, "-m", "tools.gpu_check", "--rehearse", "--only", "machine"]
    command += ["--fault", "machine=hang", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.perf_counter() + 60
        while len(descendants(process.pid)) < 2 and time.perf_counter() < deadline:
            time.sleep(0.1)
        children = descendants(process.pid)
        assert len(children) >= 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--minutes", "0"], ["--only", "nothing"], ["--only", "rates", "--failed"]):
        with pytest.raises(SystemExit):
            driver.main(arguments)
    assert "--minutes must be > 0, got 0" in capsys.readouterr().err
