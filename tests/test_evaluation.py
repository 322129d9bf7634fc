"""Evaluation: estimators equal enumeration and simulation, and metrics do not depend on the engine.

Read in this order: pass@k, intervals, scores of hand-worked rollouts, then whole evaluations.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from socpo_fast import session as session_module
from socpo_fast import trainer
from socpo_fast.config import Config, load_config
from socpo_fast.engine.runner import Runner
from socpo_fast.metrics import meaning_of
from socpo_fast.report.summary import (
    MAX_SOURCES,
    Scores,
    interval,
    pass_at_k,
    source_metric,
    sources_of,
    summarize,
)
from socpo_fast.report.tracker import read_metrics
from socpo_fast.session import Session
from socpo_fast.types import Attempt, Question, Rollout, RolloutKey, Turn

CONFIG = Path(__file__).parents[1] / "configs" / "molar_mass.toml"
SAMPLES = 4
SMALL = {
    "data.builtin_eval_questions": 10,
    "eval.samples": SAMPLES,
    "eval.temperature": 0.8,
    "eval.top_p": 0.9,
    "engine.kv_cache_gib": 0.05,
}


def test_pass_at_k_equals_enumeration_of_subsets() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            # Samples 0 .. c - 1 are the right ones.
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.03, 0.5, 1.0])
def test_pass_at_k_is_unbiased(p: float) -> None:
    n = 16
    for k in (1, 4, 16):
        chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        expected = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_interval_of_a_hand_worked_case() -> None:
    """Agresti-Coull for 0 of 10: n' = 13.8415, m = 0.13877, half = 1.96 sqrt(m (1 - m) / n')."""
    low, high = interval([0.0] * 10)
    assert (low, high) == (
        0.0,
        pytest.approx(0.13877 + 1.959964 * math.sqrt(0.13877 * 0.86123 / 13.84146), abs=1e-4),
    )


@given(st.lists(st.integers(0, 16), min_size=1, max_size=60))
def test_interval_contains_mean_and_is_symmetric(counts: list[int]) -> None:
    values = [count / 16 for count in counts]
    low, high = interval(values)
    assert 0 <= low <= sum(values) / len(values) <= high <= 1
    assert high - low > 0, "never certain"
    assert interval([1 - value for value in values]) == (
        pytest.approx(1 - high),
        pytest.approx(1 - low),
    )


@pytest.mark.parametrize(
    "concentration", [0.2, 2.0, 50.0], ids=["questions are easy or hopeless", "mixed", "much alike"]
)
@pytest.mark.parametrize("samples", [1, 4, 16])
def test_interval_covers_the_true_rate_95_percent(samples: int, concentration: float) -> None:
    """Each question draws its own rate from a beta distribution with the true mean.

    The samples of a question are right at that rate. At least min_coverage of the intervals of 1000
    simulated evaluations must cover the true mean.
    """
    random = np.random.default_rng(int(samples * 1000 + concentration))
    for num_questions, min_coverage in ((5, 0.90), (20, 0.93), (200, 0.935)):
        for true_rate in (0.0, 0.02, 0.3, 0.5, 0.9):
            rates = random.beta(
                max(true_rate * concentration, 1e-9),
                (1 - true_rate) * concentration,
                (1000, num_questions),
            ) * (true_rate > 0)
            values = random.binomial(samples, rates) / samples
            coverage = (
                sum(low <= true_rate <= high for low, high in map(interval, values.tolist())) / 1000
            )
            # three standard errors of a share of 1000
            assert coverage > min_coverage - 3 * math.sqrt(
                min_coverage * (1 - min_coverage) / 1000
            ), (
                num_questions,
                true_rate,
            )


def make_rollout(
    question_idx: int, rollout_idx: int, verdicts: list[bool], source: str = ""
) -> Rollout:
    attempts = [
        Attempt(
            [1] * 3,
            torch.zeros(3),
            torch.ones(3),
            "stop",
            RolloutKey(0, question_idx),
            rollout_idx,
            k,
            0,
        )
        for k in range(len(verdicts))
    ]
    turns = [
        Turn(attempt=attempt, is_correct=verdict, raw_reward=float(verdict), reward=float(verdict))
        for attempt, verdict in zip(attempts, verdicts, strict=True)
    ]
    return Rollout(
        question_idx=question_idx,
        rollout_idx=rollout_idx,
        prompt_ids=[1],
        turns=turns,
        data_source=source,
    )


def make_questions(*sources: str) -> list[Question]:
    messages = ({"role": "user", "content": "?"},)
    return [
        Question(question_idx=i, messages=messages, ground_truth="1", data_source=s)
        for i, s in enumerate(sources)
    ]


def test_scores_of_a_hand_worked_case() -> None:
    questions = make_questions("chem", "chem", "bio/cells")
    verdicts = {
        0: [[True], [True], [True], [True]],
        1: [[False, True]] * 4,
        2: [[True], *[[False, False]] * 3],
    }
    rollouts = [
        make_rollout(q, r, verdict, questions[q].data_source)
        for q, rows in verdicts.items()
        for r, verdict in enumerate(rows)
    ]
    scores = Scores(questions, samples=4, assisted=True)
    for rollout in reversed(rollouts):
        scores.add(rollout)
    metrics = scores.metrics()
    assert metrics["success/unassisted"] == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert metrics["success/assisted"] == pytest.approx((1 + 1 + 1 / 4) / 3)
    assert metrics["success/pass_at_4"] == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["success/unassisted/chem"] == 0.5
    assert metrics["success/assisted/bio/cells"] == 0.25
    assert (
        metrics["success/unassisted_low/chem"],
        metrics["success/unassisted_high/chem"],
    ) == interval([1.0, 0.0])
    assert (metrics["rollout/attempt_tokens"], metrics["rollout/truncated"]) == (3.0, 0.0)
    assert all(meaning_of(name) for name in metrics)
    batch = summarize(rollouts, [1.0], sources_of(questions))
    for name in ("success/unassisted/chem", "success/assisted/bio/cells"):
        assert batch[name] == metrics[name]
    unassisted = Scores(make_questions("chem", "chem"), samples=1, assisted=False)
    unassisted.add(rollouts[0])
    unassisted.add(rollouts[4])
    names = {"success/unassisted", "success/unassisted_low", "success/unassisted_high"}
    assert unassisted.metrics().keys() == names | {"rollout/attempt_tokens", "rollout/truncated"}, (
        "one source, no help, k=1"
    )


def test_source_names_are_safe_and_distinct() -> None:
    plain_name = source_metric("success/unassisted", "openai/gsm8k")
    assert plain_name == "success/unassisted/openai/gsm8k"
    odd_sources = ["a b", "a\tb", "<script>", "x" * 200, "x" * 201, "\ud800", "é", "", "_"]
    # This source is named like the safe form of another one.
    odd_sources.append(source_metric("", odd_sources[0])[1:])
    names = [source_metric("success/unassisted", source) for source in odd_sources]
    assert len(set(names)) == len(odd_sources)
    assert all(
        name.isascii() and len(name) < 100 and "<" not in name and " " not in name for name in names
    )
    assert all(meaning_of(name) for name in names)
    assert sources_of(make_questions("a", "b", "a")) == ["a", "b"]
    assert sources_of(make_questions("a", "a")) == []
    assert sources_of(make_questions(*map(str, range(MAX_SOURCES + 1)))) == [], (
        "one number for each row says nothing"
    )


def test_metrics_of_two_data_sources_are_separate(tmp_path: Path) -> None:
    """Each batch has one question here, so it has metrics of the source of that question only."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"question": f"{i} + 1?", "ground_truth": str(i + 1), "data_source": "ab"[i % 2]}
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "data.train": path,
        "data.eval": path,
        "teacher.kind": "retry",
        "run.dir": tmp_path,
        "run.num_batches": 4,
    }
    settings |= {
        "rollout.questions_per_batch": 1,
        "train.questions_per_update": 1,
        "rollout.group_size": 2,
    }
    settings |= {
        "rollout.max_new_tokens": 8,
        "engine.kv_cache_gib": 0.05,
        "eval.samples": 1,
        "eval.every_updates": 0,
    }
    config = load_config(CONFIG, {name: str(value) for name, value in settings.items()})
    trainer.train(config)
    metrics = read_metrics(config.folder / "metrics.jsonl")
    names = {f"success/{kind}/{source}" for kind in ("unassisted", "assisted") for source in "ab"}
    batches = [names & row.keys() for row in metrics if row["kind"] == "batch"]
    assert [len(batch_names) for batch_names in batches] == [2] * 4
    assert set().union(*batches) == names
    assert all(names <= row.keys() for row in metrics if row["kind"] == "eval")


@pytest.fixture(scope="module")
def reference_metrics() -> dict[str, float]:
    return run(load_config(CONFIG, SMALL))


def run(config: Config, **options: Any) -> dict[str, float]:
    """Returns the metrics of an evaluation, without its time."""
    session = Session(config)
    try:
        metrics = session.evaluate(session.eval_questions(), **options)
    finally:
        session.close()
    del metrics["time/total_s"]
    return metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"engine.max_running": 3, "engine.page_size": 8},
        {"engine.token_budget": 17},
        {"slice": 1},
        {"slice": 3 * SAMPLES, "engine.max_running": 50},
        {"small pool": True},
    ],
    ids=str,
)
def test_metrics_do_not_depend_on_engine_settings(
    changes: dict[str, Any], reference_metrics: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {name: value for name, value in changes.items() if "." in name}
    if "slice" in changes:
        monkeypatch.setattr(session_module, "EVAL_SLICE_ROLLOUTS", changes["slice"])
    if "small pool" in changes:
        # The pool holds one context of the model's length, so that sequences preempt each other.
        session = Session(load_config(CONFIG, SMALL))
        pages = session.student.config.max_position_embeddings / 32 + 0.5
        settings["engine.kv_cache_gib"] = pages * Runner.page_bytes(session.student, 32) / 2**30
        session.close()
    assert (
        0 < reference_metrics["success/unassisted"] < reference_metrics["success/assisted"] < 1
    ), "a result that could differ"
    assert run(load_config(CONFIG, SMALL | settings)) == reference_metrics


def test_metrics_are_means_over_questions(reference_metrics: dict[str, float]) -> None:
    session = Session(load_config(CONFIG, SMALL))
    by_question = [session.evaluate([question]) for question in session.eval_questions()]
    session.close()
    for name in (
        "success/unassisted",
        "success/assisted",
        "success/pass_at_4",
        "rollout/attempt_tokens",
    ):
        assert sum(metrics[name] for metrics in by_question) / len(by_question) == pytest.approx(
            reference_metrics[name], abs=1e-12
        )


def test_only_one_slice_of_rollouts_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "EVAL_SLICE_ROLLOUTS", 2 * SAMPLES)
    num_held: list[int] = []
    gc.collect()
    # Other tests leave some, for example in the traceback of an expected failure.
    num_other = num_rollouts()
    run(
        load_config(CONFIG, SMALL | {"eval.assisted": False}),
        on_rollout=lambda *_: num_held.append(num_rollouts() - num_other),
    )
    assert len(num_held) == 10 * SAMPLES
    assert max(num_held) <= 2 * SAMPLES + 1  # the slice, and the last rollout of the previous slice


def num_rollouts() -> int:
    gc.collect(0)
    return sum(type(instance) is Rollout for instance in gc.get_objects())


def test_kv_cache_below_longest_context_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"engine.kv_cache_gib must hold the longest context, 512 tokens, got room"
    ):
        Session(load_config(CONFIG, SMALL | {"engine.kv_cache_gib": 0.0005}))


def test_eval_uses_its_own_sampling_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}

    def record(*_args: object, **kwargs: Any) -> Iterator[Rollout]:
        arguments.update(kwargs)
        yield from (make_rollout(i, r, [True]) for i in range(10) for r in range(SAMPLES))

    monkeypatch.setattr(session_module, "socratic_rollouts", record)
    run(load_config(CONFIG, SMALL | {"rollout.temperature": 1.0}))
    params = arguments["params"]
    assert (
        params.temperature,
        params.top_p,
        arguments["options"].group_size,
        arguments["options"].max_attempts,
    ) == (
        0.8,
        0.9,
        SAMPLES,
        2,
    )
    run(load_config(CONFIG, SMALL | {"eval.assisted": False, "eval.temperature": 0}))
    assert (arguments["params"].temperature, arguments["options"].max_attempts) == (0.0, 1)
