"""Checks that gpu_check finds what it is for: wrong ops, other tokens, moved weights, other bits.

Each test plants one fault on a CPU and reads what the stage reports.
"""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from socpo_fast.device import Readback
from socpo_fast.engine import Engine
from socpo_fast.ops import paged_attention
from tests.helpers.tiny import generate_same
from tests.ops.test_flash import FlashAttn
from tools.gpu_check import engine as engine_stage
from tools.gpu_check import engines, head, kernels, op_cases, profilers, worker
from tools.gpu_check.check import Check, Skipped, check_close
from tools.gpu_check.results import StageResult, read_results
from tools.gpu_check.stages import NAMES
from tools.gpu_check.worker import run_parts

CPU = torch.device("cpu")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check("engine", device=CPU, tiny=True, results=tmp_path / "results.jsonl", peers=None)


def outcome(check: Check, part: Callable[[Check], None]) -> StageResult:
    """Runs one part of a stage; returns what was written down."""
    run_parts(check, {"part": part}, [])
    return read_results(check.results, NAMES).stages["engine"]


def test_wrong_op_is_named_with_its_worst_element(monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = op_cases.op_cases(21, 67, 12)["decode of SmolLM2"]
    assert op_cases.compare("decode", run, inputs, torch.float32, CPU, "triton") < 1e-5

    def shifted(
        *tensors: torch.Tensor, scale: float, impl: str, cascade: bool = True
    ) -> torch.Tensor:
        return paged_attention(*tensors, scale=scale, impl="ref") + 1e-3 * (impl == "triton")

    monkeypatch.setattr(op_cases, "paged_attention", shifted)
    with pytest.raises(AssertionError, match=r"decode: o: .* break the error rule; worst at \["):
        op_cases.compare("decode", run, inputs, torch.float32, CPU, "triton")


def test_one_failing_case_leaves_the_others(check: Check) -> None:
    """After a failed case and a skipped one the part goes on; both are recorded with messages."""

    def part(check: Check) -> None:
        for number in range(3):
            with check.case(f"case {number}"):
                if number == 1:
                    raise ValueError("it is wrong")
                if number == 2:
                    raise Skipped("not here")
        check.figure("engine.preemptions", 5)

    stage = outcome(check, part)
    assert [case["case"] for case in stage.failures] == ["case 1"] and check.num_failed == 1
    message = stage.failures[0]["message"]
    assert message.startswith("ValueError at tests/gpu_check/test_findings.py:")
    assert message.endswith(": it is wrong")
    assert [case["message"] for case in stage.skips] == ["not here"]
    assert stage.figures[0].value == 5


def test_flash_is_compared_where_it_is_installed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Skipped, match="not installed"):
        kernels.flash(check)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", FlashAttn())
    stage = outcome(check, kernels.flash)
    assert stage.failures == [] and len(stage.figures) == 4


def test_another_token_must_be_a_near_tie(check: Check) -> None:
    """Two attempts may differ in a token only if it led by no more than rounding."""
    student = engines.make_student(check, "tiny", CPU)
    params = engines.params_of(check)
    (prompt,) = engines.prompts_of(student, 1, 20)
    group = generate_same(engines.make_engine(student), [prompt], params)[0]
    assert engines.same_attempt(student, prompt, params, group[0], group[0]) == (True, 0.0)
    message = "question 0, rollout 0, attempt 0: token 0 differs, though it leads by"
    with pytest.raises(AssertionError, match=message):
        engines.same_attempt(student, prompt, params, group[0], group[1])

    changed_student = engines.make_student(check, "tiny", CPU)
    with torch.no_grad():
        changed_student.lm_head.weight.mul_(1.01)
    changed_group = generate_same(engines.make_engine(changed_student), [prompt], params)[0]
    with pytest.raises(AssertionError, match="log-probs differ by"):
        engines.same_attempt(student, prompt, params, changed_group[0], group[0])


def test_a_drawn_token_leads_all_others(check: Check) -> None:
    """The drawn token has a positive lead; greedily it is 0 if another token has the same logit."""
    student = engines.make_student(check, "small Qwen3", CPU)
    (prompt,) = engines.prompts_of(student, 1, 20)
    for params in (engines.params_of(check), engines.params_of(check, temperature=0.0, n=1)):
        for attempt in generate_same(engines.make_engine(student), [prompt], params)[0]:
            for position, token_id in enumerate(attempt.token_ids[:6]):
                context = prompt + attempt.token_ids[:position]
                lead = engines.lead(student, context, params, attempt, position)
                twin = copy.deepcopy(student)  # another token with the logit of the drawn one
                twin.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
                with torch.no_grad():
                    twin.lm_head.weight[token_id - 1] = twin.lm_head.weight[token_id]
                tied_lead = engines.lead(twin, context, params, attempt, position)
                assert lead > 0 and (params.temperature > 0 or tied_lead < 1e-5)


def test_moved_storage_is_found(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer step that replaces the parameters' storage is a failure."""
    step = engine_stage.Optimizer.step

    def step_elsewhere(self: engine_stage.Optimizer, loss: float = 0.0) -> object:
        result = step(self, loss)
        for parameter in self.params.values():
            parameter.data = parameter.data.clone()
        return result

    assert outcome(check, engine_stage.weights_stay).failures == []
    monkeypatch.setattr(engine_stage.Optimizer, "step", step_elsewhere)
    (failure,) = outcome(check, engine_stage.weights_stay).failures
    assert "AssertionError at " in failure["message"] and "storage moved" in failure["message"]


def test_other_bits_of_rounds_are_found(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of eager rounds that differ by 1e-6 from those of graphs are a failure."""

    def shift_logprobs(engine: Engine) -> None:
        launch = engine.steps.loop.launch

        def launch_shifted(*args: Any, **options: Any) -> Readback:
            return Readback(launch(*args, **options).wait() - torch.tensor([0, 1e-6, 0])[:, None])

        engine.steps.loop.launch = launch_shifted

    monkeypatch.setattr(engine_stage, "launch_rounds", shift_logprobs)
    (failure,) = outcome(check, engine_stage.graph_replay).failures
    assert failure["message"].endswith("graph and eager rounds differ")


def test_a_wrong_lm_head_is_not_timed(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is 2 % too large is a failure; the peers' figures are still measured."""
    ours = head.ours

    def wrong(problem: head.Problem, workspace_mib: float) -> head.Gradients:
        dx, dw = ours(problem, workspace_mib)
        return dx, dw * 1.02

    monkeypatch.setattr(head, "ours", wrong)
    head_check = Check("head", device=CPU, tiny=True, results=check.results, peers=None)
    run_parts(head_check, {"ours": head.ours_beside_gemms(0), "peers": head.peers(0)}, [])
    stage = read_results(check.results, NAMES).stages["head"]
    assert len(stage.failures) == len(head.WORKSPACES_MIB)
    assert "dW: relative error must be <= 0.01, got 0.02" in stage.failures[0]["message"]
    assert {figure.key for figure in stage.figures} == {
        "head.bare_gemms_ms",
        "head.peer_ms",
        "head.extra_gib",
    }


def test_closeness_refuses_nan() -> None:
    check_close("x", torch.ones(3), torch.ones(3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="must be <= 0.001, got nan"):
        check_close("x", torch.tensor([1.0, torch.nan]), torch.ones(2, dtype=torch.float64))


def test_pytest_results_are_counted(tmp_path: Path) -> None:
    passing = tmp_path / "test_a_triton.py"
    failing = tmp_path / "test_b_triton.py"
    passing.write_text("import os\ndef test_a(): assert os.environ['TRITON_INTERPRET'] == '0'\n")
    failing.write_text("def test_b(): assert 1 == 2\n")
    environ = {"TRITON_INTERPRET": "0"}
    assert kernels.run_pytest([passing], environ) == ({"passed": 1}, [])
    counts, failed = kernels.run_pytest([passing, failing], environ)
    assert counts == {"passed": 1, "failed": 1}
    assert len(failed) == 1 and "test_b_triton.py::test_b - assert 1 == 2" in failed[0]
    assert kernels.run_pytest([tmp_path / "none.py"], environ)[1]


def test_pytest_past_its_limit_keeps_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If pytest does not end in time, tests that had passed still count."""
    slow = tmp_path / "test_a_triton.py"
    lines = ["import time", *(f"def test_{k}(): time.sleep({30 * (k == 3)})" for k in range(4))]
    slow.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(kernels, "ALL_TESTS_S", 6)
    # Without pytest-timeout, so that pytest itself sets no limit.
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    counts, failed = kernels.run_pytest([slow], {"TRITON_INTERPRET": "0"})
    assert counts == {"passed": 3}
    assert failed == ["pytest did not end within 6 s: 3 tests had passed"]


def test_part_after_a_lost_card_runs_in_new_process(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error that loses the CUDA context the worker replaces itself and goes on behind it.

    A context that saw an illegal access is of no use any more to its process.
    """
    commands: list[list[str]] = []

    class Replaced(Exception):
        """Stands in for exec, which does not return."""

    def execv(_path: str, command: list[str]) -> None:
        commands.append(command)
        raise Replaced

    def broken(_check: Check) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker, "is_alive", lambda check: False)
    monkeypatch.setattr(worker.os, "execv", execv)
    with pytest.raises(Replaced):
        run_parts(check, {"first": broken, "second": lambda check: None}, ["engine", "--tiny"])
    assert commands[0][3:] == ["engine", "--tiny", "--after", "first", "--num-failed", "1"]
    run_parts(check, {"first": broken}, [])  # the last part: no new process is started


def test_triton_tests_are_found_by_their_content() -> None:
    names = {path.name for path in kernels.triton_tests()}
    assert {"test_triton_ops.py", "test_rms_norm.py", "test_linear_sample_triton.py"} <= names
    assert "test_instruction_sets.py" not in names


def test_sync_debug_mode_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`with_sync_errors` runs a function under "error"; each block restores the mode it found."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    card = SimpleNamespace(type="cuda")
    watched = engine_stage.with_sync_errors(card, lambda: modes.append("run"))
    with engine_stage.sync_debug(card, "warn"):
        watched()
    assert modes == [0, "warn", "error", "run", "warn", 0]


def fake_tool(folder: Path, name: str, text: str) -> None:
    """Writes a program that prints a fixed text, whatever its arguments."""
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n", encoding="utf-8")
    path.chmod(0o755)


def test_output_of_ncu_and_sanitizer_is_read(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are ncu's values of a kernel's last launch; errors of the sanitizer are failures."""
    table = io.StringIO()
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", profilers.DRAM, profilers.OCCUPANCY])
    writer.writerow(["", "", "%", "%"])
    writer.writerow(["0", "_decode_kernel", "12.5", "9.0"])
    writer.writerow(["1", "_decode_kernel", "65.25", "18.75"])
    fake_tool(tmp_path, "ncu", "==PROF== Connected\n" + table.getvalue())
    fake_tool(
        tmp_path, "compute-sanitizer", "== Invalid __global__ read\n== ERROR SUMMARY: 3 errors"
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    stage = outcome(check, profilers.ncu)
    assert [(f.key, f.of, f.value) for f in stage.figures] == [
        ("profilers.dram_share", "_decode_kernel", 65.25),
        ("profilers.occupancy_share", "_decode_kernel", 18.75),
    ]
    (failure,) = outcome(check, profilers.sanitizer).failures
    assert "found 3 errors, first: == Invalid __global__ read" in failure["message"]
    fake_tool(tmp_path, "ncu", "==ERROR== no permission")
    assert "may not be allowed" in outcome(check, profilers.ncu).skips[0]["message"]


def test_profiled_workload_is_every_op(check: Check) -> None:
    profilers.workload("ops", check)
