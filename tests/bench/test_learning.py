"""Checks the learning study: its plan, the record of a run, and the arithmetic of its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench.learning import __main__ as bench
from bench.learning.added import again_table, slower_table
from bench.learning.analysis import (
    at_cost,
    check_alike,
    cost_until,
    costs,
    difference,
    estimate,
    rescued_share,
    runs_of,
    unassisted_by_rescues,
)
from bench.learning.cells import interval, markdown, with_spread
from bench.learning.figures import FIGURES, recorded_curves, save
from bench.learning.plan import (
    ARMS,
    RATE_SEED,
    RATES,
    SEEDS,
    SEEDS_AGAIN,
    Run,
    Stage,
    compared_runs,
    rate_runs,
)
from bench.learning.results import append_result, at_end, best_rates, finished, read_all
from bench.learning.run import facts_of, sampled_tokens, train
from bench.learning.tables import TABLES, with_tables
from bench.learning.teachers import give_answer
from socpo_fast.files import read_json
from socpo_fast.report.comparison import RECORDED
from socpo_fast.socratic.leak import leaks_answer
from socpo_fast.socratic.tasks import molar_mass
from socpo_fast.types import GuidanceRequest, RolloutKey

ROOT = Path(__file__).parents[2]
TUTOR = Run("main", "shipped", "tutor", 0, 2e-4, 8)


def record(
    run: Run, unassisted: Sequence[float], *, tokens: int = 100, seconds: float = 2.0
) -> dict[str, Any]:
    """Returns the record of a run with an evaluation every fourth batch and equal batches."""
    num_batches = 4 * (len(unassisted) - 1)
    flat = {name: [0.5] * num_batches for name in ("unassisted", "assisted", "rescued", "decay_1")}
    return {
        "run": asdict(run),
        "student": "abc",
        "evals": {"batch": list(range(0, num_batches + 1, 4)), "unassisted": list(unassisted)},
        "batches": flat | {"tokens": [tokens] * num_batches, "cpu_s": [seconds] * num_batches},
        "facts": [{"Na": [4, 0, 4, 2]}, {"Na": [4, 2, 2, 1]}, {"Na": [4, 4, 0, 0]}],
        "wall_s": 1.0,
    }


def arm(name: str, curves: Sequence[Sequence[float]], **cost: Any) -> list[dict[str, Any]]:
    """Returns the records of one arm of the study, one seed for each curve."""
    return [
        record(Run("main", "shipped", name, seed, 2e-4, 8), curve, **cost)
        for seed, curve in enumerate(curves)
    ]


def test_plan_is_complete() -> None:
    """Every arm has each rate once, run names differ, and no seed is used in two stages."""
    rates = rate_runs()
    assert [(run.arm, run.lr) for run in rates] == [(arm, lr) for arm in ARMS for lr in RATES]
    runs = list(compared_runs(dict.fromkeys(ARMS, 4e-4) | {"tutor": 2e-4}))
    assert len({run.name for run in rates + runs}) == len(rates) + len(runs) == 155
    planned = runs[:90]
    added = runs[90:]
    assert {run.seed for run in planned} == set(SEEDS)
    assert {run.seed for run in added if run.stage == "again"} == set(SEEDS_AGAIN)
    assert len({RATE_SEED, *SEEDS, *SEEDS_AGAIN}) == 11, "no seed serves twice"
    assert all(run.lr == 2e-4 for run in added if run.stage == "slower")


def test_at_cost_interpolates_between_evaluations() -> None:
    tutor = record(TUTOR, [0.4, 0.5, 0.9], tokens=100, seconds=3.0)
    assert costs(tutor, "tokens")[8] == 800 and costs(tutor, "batches")[:3] == [0, 1, 2]
    assert at_cost(tutor, "batches", 4) == 0.5
    assert at_cost(tutor, "tokens", 600) == pytest.approx(0.7)
    assert at_cost(tutor, "cpu_s", 3.0) == pytest.approx(0.425)
    assert at_cost(tutor, "batches", 0) == 0.4 and at_cost(tutor, "batches", 8) == 0.9
    assert math.isnan(at_cost(tutor, "batches", 8.1))
    assert at_end(tutor) == pytest.approx(0.7)
    assert cost_until(tutor, "tokens", 0.7) == pytest.approx(600)
    assert cost_until(tutor, "tokens", 0.95) == math.inf


def test_differences_are_paired() -> None:
    """Only seeds that both arms have count; the interval is Student's."""
    ours = runs_of(arm("tutor", [[0.4, 0.8], [0.4, 0.9], [0.4, 1.0]]), "main", "shipped", "tutor")
    theirs = runs_of(arm("alone", [[0.4, 0.6], [0.4, 0.8]]), "main", "shipped", "alone")
    actual = difference(ours, theirs, "batches", 4)
    assert actual.values == pytest.approx((0.2, 0.1)) and actual.mean == pytest.approx(0.15)
    # The standard deviation is 0.0707. Divided by sqrt(2) it is 0.05; times Student's t, 12.706.
    assert actual.high - actual.mean == pytest.approx(0.6353, abs=1e-4)
    assert interval(actual) == "+15.0 (-48.5 to +78.5), 2 of 2"
    assert math.isnan(estimate([0.5]).low)


def test_a_cost_that_was_not_reached_is_named() -> None:
    """A mean is "not reached" as soon as one run ended earlier.

    Leaving that run out would bias the mean towards the runs that are fast.
    """
    tutor = runs_of(arm("tutor", [[0.4, 0.8, 0.9]] * 2), "main", "shipped", "tutor")
    short = arm("three", [[0.4, 0.8, 0.9], [0.4, 0.6]])
    three = runs_of(short, "main", "shipped", "three")
    actual = difference(tutor, three, "batches", 8)
    assert math.isnan(actual.mean) and interval(actual) == "not reached"
    assert with_spread([0.5, math.nan]) == "not reached" and with_spread([]) == "-"
    assert interval(difference(tutor, {}, "batches", 4)) == "-"


def test_rescued_share_is_pooled() -> None:
    """The share is over all guided rollouts; a batch without one does not count."""
    run = record(TUTOR, [0.4, 0.5])
    run["batches"] |= {"unassisted": [0.5, 1.0], "assisted": [0.75, 1.0], "rescued": [0.5, None]}
    assert rescued_share({0: run}, slice(0, 2)) == pytest.approx(0.5)
    assert math.isnan(rescued_share({0: run}, slice(1, 2))) and math.isnan(
        rescued_share({}, slice(0, 2))
    )


def test_mixed_students_are_refused() -> None:
    other = record(replace(TUTOR, seed=1), [0.4, 0.5]) | {"student": "def"}
    with pytest.raises(ValueError, match="must have had the same weights, got"):
        check_alike([record(TUTOR, [0.4, 0.5]), other])
    check_alike([record(TUTOR, [0.4, 0.5]), other | {"error": "exit code 1"}])


def test_facts_of_planted_rollouts() -> None:
    formula = {"H": 1, "Na": 2}
    wrong = molar_mass.render(molar_mass.work_out([("H", 1, 1), ("Na", 2, 11)]))
    right = molar_mass.render(molar_mass.reference_lines(formula))
    texts = [[wrong, right], [wrong, wrong], [right], ["Na: gibberish"], [wrong, wrong, right]]
    # A right second attempt is no right first one. Only the attempt just before it can be rescued.
    texts += [["gibberish", right], [wrong, "gibberish", right]]
    rollouts = [
        {"turns": [{"text": text, "num_tokens": 10} for text in attempts]} for attempts in texts
    ]
    facts = facts_of(rollouts)
    assert facts["Na"] == [5, 1, 4, 2] and facts["Fe"] == [0, 0, 0, 0]
    assert sampled_tokens(rollouts) == 10 * 14


def test_unassisted_share_by_earlier_rescues() -> None:
    """Before batch 1 there is no rescue, before batch 2 there are two, before batch 3 three."""
    shares = unassisted_by_rescues([record(TUTOR, [0.4, 0.5])], (0, 1, 3, 10))
    assert shares[:3] == [(0.0, 4), (0.5, 4), (1.0, 4)]
    assert math.isnan(shares[3][0]) and shares[3][1] == 0


def test_best_rates_by_the_rule() -> None:
    """The best rate has the highest mean of the last two evaluations; of equal ones the least wins.

    While the run of one rate is missing, an arm has no best rate.
    """
    curves = {1e-4: [0.4, 0.6, 0.6], 2e-4: [0.9, 0.7, 0.5], 4e-4: [0.4, 0.1, 0.9]}
    runs = [record(Run("rates", "shipped", "tutor", 100, lr, 8), c) for lr, c in curves.items()]
    assert best_rates(runs) == {"tutor": 1e-4}
    assert best_rates(runs[:2]) == {}


def test_results_continue_after_failures(tmp_path: Path) -> None:
    """Failed runs are listed and repeated; of two finished ones the first counts.

    A line that was cut short by a crash is skipped with a warning.
    """
    path = tmp_path / "results.jsonl"
    assert read_all(path) == []
    append_result({"run": asdict(TUTOR), "error": "exit code 1"}, path)
    assert finished(read_all(path)) == {}
    append_result(record(TUTOR, [0.4, 0.5]), path)
    append_result(record(TUTOR, [0.4, 0.9]), path)
    with path.open("a") as file:
        file.write('{"run": {"stage": "ma')  # the machine went down here
    append_result(record(replace(TUTOR, seed=1), [0.4, 0.5]), path)
    with pytest.warns(UserWarning, match="results.jsonl"):
        assert [len(each) for each in (read_all(path), finished(read_all(path)))] == [4, 2]
    assert at_end(finished(read_all(path))[TUTOR.name]) == pytest.approx(0.45)


def test_tables_work_with_incomplete_results() -> None:
    """Every table can be made from some arms or from none, and is put between its marks."""
    records = arm("tutor", [[0.4] * 6 + [0.9] * 5] * 2) + arm("alone", [[0.4] * 15] * 2, tokens=70)
    for name, table in TABLES.items():
        for available in (records, arm("alone", [[0.4] * 3]), []):
            rows = table(available)
            assert len({len(row) for row in rows}) == 1, name
    text = "before\n<!-- table main -->\nold\n<!-- end -->\nafter\n"
    page = with_tables(text, records)
    assert markdown(TABLES["main"](records)) in page and "old" not in page
    assert page.startswith("before\n") and page.endswith("after\n")
    assert with_tables(page, records) == page


def test_document_and_curves_match_the_results() -> None:
    """docs/learning.md and its curves are up to date with the recorded runs.

    To renew them: python -m bench.learning.tables --write, python -m bench.learning.figures.
    """
    text = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
    records = read_all()
    assert with_tables(text, records) == text
    assert read_json(RECORDED) == recorded_curves(records)
    assert {path.stem for path in (ROOT / "docs" / "learning").iterdir()} == set(FIGURES)


def test_figures_are_the_same_when_drawn_again(tmp_path: Path) -> None:
    for path in (tmp_path / "a.svg", tmp_path / "b.svg"):
        save(FIGURES["facts"](arm("tutor", [[0.4, 0.5]])), path)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_give_answer_leaks() -> None:
    (question,) = molar_mass.questions(0, 1)
    request = GuidanceRequest(
        question=question.text,
        student_answer="",
        ground_truth=question.ground_truth,
        reference_solution=None,
        key=RolloutKey(0, 0),
        rollout_idx=0,
        attempt_idx=0,
    )
    assert leaks_answer(give_answer(request), question)


def test_failed_run_is_a_record(tmp_path: Path) -> None:
    """A run whose process fails becomes a record with its error, and the study goes on."""
    result = bench.make_one(TUTOR, tmp_path / "no_such_student")
    assert "no_such_student" in result["error"] and result["run"] == asdict(TUTOR)


@pytest.mark.slow
def test_record_of_a_run(tmp_path: Path) -> None:
    """A real run of one batch records every batch, and evaluations at start and end."""
    run = Run("main", "shipped", "tutor", 0, 2e-4, 1)
    result = train(run, molar_mass.STUDENT_DIR, tmp_path)
    assert result["evals"]["batch"] == [0, 1]
    assert all(len(values) == 1 for values in result["batches"].values())
    assert result["batches"]["tokens"][0] > 128 and result["batches"]["cpu_s"][0] > 0
    assert result["facts"][0]["Na"][0] > 0 and result["settings"]["train.lr"] == 2e-4


def test_fresh_seeds_are_reported_beside_planned_ones() -> None:
    """The tables of added runs show planned seeds, fresh seeds and both, at equal tokens.

    The tokens are those of the planned tutor's runs. A run with a lower learning rate is compared
    with the same tutor.
    """
    stages: list[tuple[Stage, int, float]] = [("main", 0, 0.5), ("again", 5, 0.7)]
    records = [
        record(
            Run(stage, "shipped", name, first + seed, 2e-4, 24),
            [0.4] * 5 + [high + 0.01 * seed] * 2,
        )
        for stage, first, lead in stages
        for name, high in (("tutor", 0.95), ("alone", 0.95 - lead))
        for seed in range(2)
    ]
    _, tutor, alone, *_ = again_table(records)
    assert tutor[0] == "tutor" and tutor[-1] == "4 of 4"
    assert [cell.partition(" ")[0] for cell in alone[1:4]] == ["+50.0", "+70.0", "+60.0"]
    assert alone[3].endswith("4 of 4") and alone[-1] == "0 of 4"
    slower = record(Run("slower", "shipped", "alone", 0, 1e-4, 24), [0.4] * 5 + [0.93, 0.93])
    _, same, lower, *_ = slower_table([*records, slower])
    assert same[1] == "0.0002" and lower[1] == "0.0001"
    assert lower[3].startswith("+2.0") and lower[-2:] == ["1 of 1", "20"]
