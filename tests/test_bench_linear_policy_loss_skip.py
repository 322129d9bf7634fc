"""The bench of the skipping mode: what it counts, and a run on the built-in student."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from bench import bench_linear_policy_loss
from bench._head_problem import make_problem, random_weight
from bench.bench_linear_policy_loss_skip import BOUNDS, count_skipped, gradients
from socpo_fast.ops._impl import extension_is_built
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR

pytestmark = pytest.mark.skipif(not extension_is_built(), reason="impl 'ref' skips nothing")


def test_share_of_skipped_pairs() -> None:
    """None at 0, all where no gradient reaches the bound, and in between more with every step."""
    problem = make_problem(random_weight(640, 8), 300, 100)
    shares = [count_skipped(partial(gradients, problem, bound), problem)[1] for bound in (0.0, 3e-4, 1e-3, 1.0)]
    assert shares[0] == 0 and shares[-1] == 1
    assert shares == sorted(shares) and 0 < shares[1] < shares[2] < 1


def test_the_script_ends_with_one_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"question": "molar mass of H2O?", "ground_truth": "18"}) + "\n", encoding="utf-8")
    words = ["--skip", "--student", str(STUDENT_DIR), "--data", str(data), "--loss-rows", "32", "--repeats", "2"]
    bench_linear_policy_loss.main([*words, "--threads", "1"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = report["results"]
    assert [r["bound"] for r in results] == list(BOUNDS) and report["bare_gemms_s"] > 0
    assert results[0]["skipped"] == 0 and results[0]["errors"]["weight"] < 1e-4
    assert results[-1]["skipped"] > 0 and results[-1]["errors"]["weight"] > results[0]["errors"]["weight"]
    assert all(r["num_samples"] == 2 and r["median_s"] > 0 for r in results)
