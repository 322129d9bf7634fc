"""The plan that a run prints first counts what is about to be done."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from socpo_fast.cli import main
from socpo_fast.config import load_config
from socpo_fast.report.run_plan import Reached, num_evaluations, run_plan_text
from socpo_fast.run_state import is_due
from tests.helpers.bad_input import finished_run, run_dir, words_of

__all__ = ["finished_run", "run_dir"]  # fixtures


def test_a_resumed_run_plans_what_is_left(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of("train", run_dir, {"--dry-run": None, "run.num_batches": 3})) == 0
    printed = capsys.readouterr().out
    assert "  batches        2 of 4 rollouts (2 questions x 2), 8 left\n" in printed
    assert "  updates        2 left, 1 a batch\n" in printed
    assert re.search(r"  evaluations    \d of 2 rollouts \(.*\), \d left\n", printed)


@pytest.mark.parametrize("every", [0, 1, 3, 4, 7, 40, 1000])
@pytest.mark.parametrize("start", [(0, 0, True), (3, 6, False), (9, 18, True), (10, 20, False)])
def test_evaluations_are_counted_as_they_come(every: int, start: tuple[int, int, bool]) -> None:
    config = load_config(
        None,
        {
            "run.num_batches": 10,
            "rollout.questions_per_batch": 16,
            "train.questions_per_update": 8,
            "eval.every_updates": every,
        },
    )
    batches, updates, eval_due = start
    expected = int(eval_due)
    for batch in range(batches + 1, 11):
        expected += batch == 10 or is_due(updates, updates + 2, every)
        updates += 2
    assert num_evaluations(config, Reached(*start)) == expected


def test_a_plan_of_a_huge_run_is_instant_and_short() -> None:
    config = load_config(None, {"run.num_batches": 10**9, "data.eval": "none"})
    started = time.monotonic()
    text = run_plan_text(
        config,
        memory="memory plan, GiB:\n  weights  1.11",
        num_questions=8000,
        num_left_out=17,
        reached=Reached(0, 0, False),
    )
    assert time.monotonic() - started < 1
    assert (
        "  questions      8,000 to train on, 17 left out (prompts of more than 2,048 tokens)\n"
        in text
    )
    assert "256.0B in all" in text
    assert re.search(r"evaluations|held out", text) is None
    assert text.endswith("\nmemory plan, GiB:\n  weights  1.11"), "a table comes last"
