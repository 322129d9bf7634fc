"""What a run writes: rows of metrics, rollout files and TensorBoard."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from socpo_fast.metrics import METRICS, meaning_of
from socpo_fast.report.accuracy import sparkline
from socpo_fast.report.rollouts import rollout_record, write_rollouts
from socpo_fast.report.summary import source_metric, summarize
from socpo_fast.report.tracker import MetricsWriter, read_jsonl, read_metrics
from tests.helpers.made_records import make_question, make_rollout


def write_updates(folder: Path, updates: range, resume_after_update: int | None = None) -> None:
    with MetricsWriter(folder, resume_after_update=resume_after_update) as writer:
        for update in updates:
            writer.write({"policy/loss": 0.5 * update}, kind="update", batch=update, update=update)


def updates_in(folder: Path) -> list[int]:
    return [row["update"] for row in read_metrics(folder / "metrics.jsonl")]


def test_rows_come_back_and_nan_becomes_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            {"success/unassisted": 0.25, "decay/f_2": math.nan}, kind="eval", batch=0, update=0
        )
        path = tmp_path / "metrics.jsonl"
        row = {
            "kind": "eval",
            "batch": 0,
            "update": 0,
            "success/unassisted": 0.25,
            "decay/f_2": None,
        }
        assert read_metrics(path) == [row], "a row is on the disk before close"
        assert "NaN" not in path.read_text(encoding="utf-8")


def test_undescribed_metric_fails_an_assertion(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(AssertionError, match="policy/los "):
        writer.write({"policy/los": 1.0}, kind="update", batch=1, update=1)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("decay/f_3", "factor on the reward of second attempts"),
        ("success/pass_at_16", "chance that one of 4 first attempts"),
        ("success/pass_at_4_low", "lower end of the 95 % interval: chance"),
        (
            "success/unassisted/openai/gsm8k",
            r"share of .*: the headline; questions of openai/gsm8k only",
        ),
        (
            "success/assisted_high/x",
            "upper end of the 95 % interval: share of .*; questions of x only",
        ),
        ("success/unassisted_mid", None),
        ("success/unassisted/a b", None),
        ("success/unassisted/", None),
        ("reward/mean/x", None),
        ("decay/f_", None),
    ],
)
def test_families_of_metrics_are_described(name: str, meaning: str | None) -> None:
    actual = meaning_of(name)
    assert actual is None if meaning is None else re.match(meaning, str(actual))


def test_source_metric_keeps_its_name_in_tensorboard(tmp_path: Path) -> None:
    name = source_metric("success/unassisted", "odd \n name/x")
    with MetricsWriter(tmp_path) as writer:
        writer.write({name: 0.5}, kind="batch", batch=1, update=1)
    assert EventAccumulator(str(tmp_path / "tb")).Reload().Tags()["scalars"] == [name]


def test_resume_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    write_updates(tmp_path, range(1, 6))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "update", "batch": 6, "upd')
    with pytest.warns(UserWarning, match="1 torn lines"):
        write_updates(tmp_path, range(4, 8), resume_after_update=3)
    assert updates_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    write_updates(tmp_path, range(1, 3))
    assert updates_in(tmp_path) == [1, 2], "without resume_after_update a run starts afresh"


def test_tensorboard_shows_a_resumed_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads event files in the order of their names. Names of the same second end in a
    # counter without leading zeros, so the tenth file would be read before the ninth.
    monkeypatch.setattr(
        "tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(0)
    )
    write_updates(tmp_path, range(1, 6))
    write_updates(tmp_path, range(4, 8), resume_after_update=3)
    with MetricsWriter(tmp_path, resume_after_update=7) as writer:
        writer.write({"success/unassisted": 0.5}, kind="eval", batch=7, update=7)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("policy/loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.value for event in events.Scalars("eval/success/unassisted")] == [0.5]


def test_rollout_record_is_text_and_numbers() -> None:
    record = rollout_record(
        make_rollout(3, 1, {"reward": 0.0}, {"reward": 0.2}), make_question(3), batch=5
    )
    first, second = record.pop("turns")
    assert record == {
        "batch": 5,
        "question_idx": 3,
        "rollout_idx": 1,
        "data_source": "test",
        "prompt": list(make_question(3).messages),
        "question": "Question 3?",
        "ground_truth": "42",
        "reference_solution": None,
        "end_reason": "correct",
        "policy_version": 4,
    }
    assert first == {
        "text": "41",
        "is_correct": False,
        "raw_reward": 0.0,
        "reward_parts": {},
        "reward": 0.0,
        "advantage": None,
        "context_tokens": 1,
        "num_tokens": 3,
        "finish_reason": "stop",
        "guidance": {
            "raw_text": "Look again.",
            "text": "Look again.",
            "was_shown": True,
            "kept_tokens": 3,
        },
    }
    assert (second["text"], second["reward"], second["guidance"]) == ("42", 0.2, None)


def test_rollout_file_ignores_the_finishing_order(tmp_path: Path) -> None:
    rollouts = [make_rollout(1, 0), make_rollout(0, 1), make_rollout(0, 0)]
    questions = {0: make_question(0), 1: make_question(1)}
    path = write_rollouts(tmp_path, rollouts, questions, batch=12)
    assert path == tmp_path / "rollouts" / "batch_000012.jsonl"
    first = path.read_bytes()
    assert write_rollouts(tmp_path, rollouts[::-1], questions, batch=12).read_bytes() == first
    assert [(row["question_idx"], row["rollout_idx"]) for row in read_jsonl(path)] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file stays"


def test_spread_and_signal_of_rewards() -> None:
    """Two groups: rewards 0, 0.5 and 0, 0.5 differ within each of them; 0 and 0 do not."""
    rollouts = [make_rollout(0, i, {"reward": 0.0}, {"reward": 0.5}) for i in (0, 1)]
    rollouts.append(make_rollout(1, 0, {"reward": 0.0}, {"reward": 0.0}))
    rollouts[0].turns[0].attempt.token_ids = [1] * 9
    metrics = summarize(rollouts, [0.5])
    rewards = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0, 0.0])
    assert metrics["reward/std"] == pytest.approx(rewards.std(correction=0).item())
    assert metrics["reward/groups_without_signal"] == 0.5
    names = [f"rollout/attempt_tokens{end}" for end in ("_min", "", "_max")]
    assert [metrics[name] for name in names] == [3.0, 4.0, 9.0]
    assert all(meaning_of(name) for name in metrics)


def test_sparkline_spans_zero_to_one() -> None:
    assert sparkline([0.0, 0.13, 0.5, 0.99, 1.0]) == "▁▂▅██"


def test_metric_names_of_the_readme_are_described() -> None:
    assert {
        "success/unassisted",
        "success/assisted",
        "decay/f_1",
        "policy/sampler_mismatch_nats",
    } <= METRICS.keys()
    assert all(METRICS.values())
