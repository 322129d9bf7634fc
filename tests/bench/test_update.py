"""Checks the update bench: its counts, that wrong gradients are not timed, and a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import update as bench
from socpo_fast.model import Decoder, save_student
from socpo_fast.training.step import policy_gradients
from tests.helpers.made_rollouts import make_rollout, make_student


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def test_rollouts_are_the_case(student: Decoder) -> None:
    """Every second rollout has a second attempt, and log-probs are the student's own."""
    case = bench.Case("x", prompt=7, answer=3, guidance=2, group_size=4)
    rollouts = bench.make_rollouts(case, student, token_budget=100)
    assert [len(rollout.turns) for rollout in rollouts] == [1, 2, 1, 2]
    assert {tuple(rollout.prompt_ids) for rollout in rollouts} == {tuple(rollouts[0].prompt_ids)}
    assert rollouts[1].context_length(1) == 7 + 3 + 2
    assert all(attempt.num_tokens == 3 for rollout in rollouts for attempt in rollout.attempts)
    stats = policy_gradients(student, rollouts, token_budget=100, temperature=1.0)
    assert stats.tokens_forwarded == stats.unique_tokens - 4 == 7 + 6 * 3 + 2 * 2 - 4
    assert stats.figures.sampler_mismatch_max_nats < 1e-5
    assert stats.figures.clip_fraction == 0


def test_flops_of_a_hand_counted_case(student: Decoder) -> None:
    """FLOPs of 3 rows, 2 loss tokens and 6 pairs of query and key, counted by hand.

    The model has two layers of width 32, 4 + 2 * 2 heads of 8 and an MLP of 48.
    """
    layer = 64 * 32 + 32 * 32 + 3 * 32 * 48
    expected = 6 * 2 * layer * 3 + 14 * 2 * 8 * 4 * 6 + 6 * 53 * 32 * 2
    rollouts = [make_rollout(0, 0, [1, 2], [2])]
    assert bench.update_flops(student.config, rollouts, "tree", 100) == expected


def test_gradients_that_differ_are_not_timed(student: Decoder) -> None:
    """The bench stops if tree and rows disagree, or if the tree forwards too many nodes."""
    rollouts = [make_rollout(0, 0, [1, 2], [2])]
    stats = policy_gradients(student, rollouts, token_budget=100, temperature=1.0)
    both = {"tree": stats, "rows": stats}
    ones = [torch.ones(3)]
    bound = bench.MOST_ERROR[torch.float32]
    assert bench.check(both, {"tree": ones, "rows": ones}, rollouts, bound) == 0
    for wrong in (torch.ones(3) * 1.001, torch.full((3,), torch.nan)):
        with pytest.raises(RuntimeError, match=r"^bench: gradients of tree and rows must be equal"):
            bench.check(both, {"tree": [wrong], "rows": ones}, rollouts, bound)
    with pytest.raises(RuntimeError, match="^bench: the tree must forward 6 nodes but 2 leaves"):
        bench.check(both, {"tree": ones, "rows": ones}, rollouts * 2, bound)


def test_quick_run(student: Decoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_student(student, tmp_path / "student")
    file = tmp_path / "report.json"
    num_threads = torch.get_num_threads()
    options = ["--quick", "--rounds", "1", "--threads", str(num_threads), "--json", str(file)]
    bench.main(["--student", str(tmp_path / "student"), *options])
    *_, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report.keys() == {"bench", *bench.CASES}
    for name in bench.CASES:
        packings = report[name]["packings"]
        assert packings["tree"]["tokens_forwarded"] < packings["rows"]["tokens_forwarded"]
        assert packings["tree"]["tree_is_times_faster"] == 1
        assert all(0 <= result["attention_share"] < 1 for result in packings.values())
        assert all(result["gflop_s"] > 0 and result["of_peak"] > 0 for result in packings.values())
        assert report[name]["gradients_apart"] < 1e-5
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert cases == {name: report[name] for name in bench.CASES}
