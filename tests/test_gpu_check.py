"""gpu_check without a card: what it says then, and its checks on the CPU, with tiny sizes and with faults to find."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import _gpu_engine, _gpu_ops, _gpu_speed, gpu_check
from bench._gpu_engine import TINY, make_engine, make_student, params_of, prompts_of, same_attempt
from socpo_fast.engine import Engine
from socpo_fast.ops import paged_attention
from tests.ops.test_flash import FlashAttn

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_one_line_and_exits_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu_check", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out.json").exists()
    assert done.stderr == "gpu_check: no CUDA card here, nothing was checked\n"


def test_with_a_card_every_check_is_in_one_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is not there, and checks whose processes pass, skip, fail, crash and hang."""
    ends = {
        "ops": "print('gpu_check result: ' + json.dumps({'name': 'ops', 'status': 'passed', 'figures': {'x': 1.5}}))",
        "flash": "print('gpu_check result: ' + json.dumps({'name': 'flash', 'status': 'skipped', 'message': 'none'}))",
        "graphs": "print('half a result'); os.abort()",
        "syncs": "import time; time.sleep(60)",
    }
    apart = gpu_check.run_apart

    def run_apart(name: str, command: list[str]) -> gpu_check.Outcome:
        assert command == [sys.executable, "-m", "bench.gpu_check", "--check", name]
        command = [sys.executable, "-c", f"import json, os; {ends[name]}"]
        return apart(name, command, timeout_s=5 if name == "syncs" else 60)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_apart", run_apart)
    monkeypatch.setattr(gpu_check, "card_of", lambda device: {"device": str(device)})
    out = tmp_path / "out.json"
    assert gpu_check.main(["--json", str(out), "--only", "ops", "flash"]) == 0
    assert gpu_check.main(["--json", str(out), "--only", *ends]) == 1
    report = json.loads(out.read_text())
    assert report["card"] == {"device": "cuda"} and report["failed"] == ["graphs", "syncs"]
    assert [check["status"] for check in report["checks"]] == ["passed", "skipped", "failed", "failed"]
    assert report["checks"][0]["figures"] == {"x": 1.5}
    assert "exit status -6: half a result" in report["checks"][2]["message"]
    assert report["checks"][3]["message"] == "no end after 5 s"


@pytest.mark.parametrize("name", [name for name in gpu_check.CHECKS if name not in ("kernels", "ops", "flash")])
def test_checks_pass_here(name: str) -> None:
    outcome = gpu_check.run_check(name, CPU, TINY)
    assert outcome.status == "passed", outcome.message
    assert outcome.figures and outcome.seconds > 0
    json.dumps(outcome.figures)
    if name == "preemption":
        assert outcome.figures["preemptions"] > 0


def test_ops_pass_in_the_interpreter_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (21, 67, 12)
    figures = _gpu_ops.check_ops(CPU, (torch.float32,), sizes)
    assert len(figures) == len(_gpu_ops.op_cases(*sizes)) and max(figures.values()) < 1e-5

    def shifted(*tensors: torch.Tensor, scale: float, impl: str, cascade: bool = True) -> torch.Tensor:
        o_THE = paged_attention(*tensors, scale=scale, impl="ref")
        return o_THE + 1e-3 * (impl == "triton")

    monkeypatch.setattr(_gpu_ops, "paged_attention", shifted)
    with pytest.raises(AssertionError, match="paged_attention decode: o: .* elements break the error rule"):
        _gpu_ops.check_ops(CPU, (torch.float32,), sizes)


def test_flash_is_skipped_where_it_is_not_and_compared_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "installed_version", lambda name: "not installed")
    assert gpu_check.run_check("flash", CPU).status == "skipped"
    monkeypatch.setattr(gpu_check, "installed_version", lambda name: "2.8")
    monkeypatch.setitem(sys.modules, "flash_attn", FlashAttn())
    outcome = gpu_check.run_check("flash", CPU)
    assert outcome.status == "passed", outcome.message
    assert len(outcome.figures) == 5


def test_another_token_must_be_a_near_tie() -> None:
    student, params = make_student(TINY, CPU), params_of(TINY)
    (prompt,) = prompts_of(TINY, 1, 20)
    group = make_engine(student).generate([prompt], params)[0]
    assert same_attempt(student, prompt, params, group[0], group[0]) == (True, 0.0)
    with pytest.raises(AssertionError, match="question 0, rollout 0, attempt 0: token 0 differs, though it leads by"):
        same_attempt(student, prompt, params, group[0], group[1])

    nearly = make_student(TINY, CPU)
    with torch.no_grad():
        nearly.lm_head.weight.mul_(1.01)
    other = make_engine(nearly).generate([prompt], params)[0]
    with pytest.raises(AssertionError, match="log-probs differ by"):
        same_attempt(student, prompt, params, other[0], group[0])


def test_leads_are_those_of_what_was_drawn() -> None:
    student = make_student(TINY, CPU)
    (prompt,) = prompts_of(TINY, 1, 20)
    for params in (params_of(TINY), params_of(TINY, temperature=0.0, n=1)):
        for attempt in make_engine(student).generate([prompt], params)[0]:
            for position, token_id in enumerate(attempt.token_ids):
                context = prompt + attempt.token_ids[:position]
                lead = _gpu_engine.lead(student, context, params, attempt, position)
                twin = copy.deepcopy(student)  # another token with the logit of the drawn one
                with torch.no_grad():
                    twin.lm_head.weight[token_id - 1] = twin.lm_head.weight[token_id]
                shrunk = _gpu_engine.lead(twin, context, params, attempt, position)
                assert lead > 0 and (params.temperature > 0 or shrunk < 1e-5)


def test_moved_storage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _gpu_engine.Optimizer.step

    def step_elsewhere(self: _gpu_engine.Optimizer, loss: float = 0.0) -> object:
        result = step(self, loss)
        for parameter in self.params.values():
            parameter.data = parameter.data.clone()
        return result

    monkeypatch.setattr(_gpu_engine.Optimizer, "step", step_elsewhere)
    outcome = gpu_check.run_check("weights", CPU, TINY)
    assert outcome.status == "failed" and "AssertionError at " in outcome.message and "moved" in outcome.message


def test_other_bits_of_rounds_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_little_off(engine: Engine) -> None:
        run = engine._loop.run
        engine._loop.run = lambda *args: [[(i, x - 1e-6, mass) for i, x, mass in drawn] for drawn in run(*args)]

    monkeypatch.setattr(_gpu_engine, "as_they_come", a_little_off)
    outcome = gpu_check.run_check("graphs", CPU, TINY)
    assert outcome.status == "failed" and outcome.message.endswith(": graph and eager")


def test_pytest_counts(tmp_path: Path) -> None:
    passing, failing = tmp_path / "test_a.py", tmp_path / "test_b.py"
    passing.write_text("import os\ndef test_a(): assert os.environ['TRITON_INTERPRET'] == '0'\n")
    failing.write_text("def test_b(): assert 1 == 2\n")
    assert gpu_check.run_pytest([str(passing)], {"TRITON_INTERPRET": "0"}) == {"passed": 1}
    with pytest.raises(AssertionError, match="(?s)1 failed, 1 passed.*FAILED .*test_b"):
        gpu_check.run_pytest([str(passing), str(failing)], {"TRITON_INTERPRET": "0"})
    with pytest.raises(AssertionError, match="no tests ran|not found"):
        gpu_check.run_pytest([str(tmp_path / "none.py")], {})


def test_files_that_know_triton() -> None:
    files = gpu_check.triton_tests()
    assert {"tests/ops/test_triton_ops.py", "tests/ops/test_rms_norm.py"} <= set(files)
    assert "tests/ops/test_instruction_sets.py" not in files and all((ROOT / file).is_file() for file in files)


def test_sync_debug_is_the_cards_own(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watched = _gpu_speed.unwatched(SimpleNamespace(type="cuda"), lambda: modes.append("run"))
    with _gpu_speed.sync_debug(SimpleNamespace(type="cuda"), "warn"):
        watched()
    assert modes == [0, "warn", "error", "run", "warn", 0]
