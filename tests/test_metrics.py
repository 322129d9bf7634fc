"""What a run writes: rows of metrics, rollout files, TensorBoard, and the live display."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from socpo_fast.metrics import METRICS, meaning_of
from socpo_fast.report.accuracy import sparkline
from socpo_fast.report.progress import Progress
from socpo_fast.report.rollouts import rollout_record, write_rollouts
from socpo_fast.report.summary import source_metric
from socpo_fast.report.tracker import MetricsWriter, read_jsonl, read_metrics
from socpo_fast.types import Attempt, Question, Rollout, RolloutKey, ShownGuidance, Turn


def make_attempt(attempt_idx: int) -> Attempt:
    return Attempt(
        token_ids=[1, 2, 3],
        logprobs=torch.zeros(3),
        kept_mass=torch.ones(3),
        finish_reason="stop",
        key=RolloutKey(0, 0),
        rollout_idx=0,
        attempt_idx=attempt_idx,
        policy_version=4,
    )


def make_question(question_idx: int) -> Question:
    messages = (
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": f"Question {question_idx}?"},
    )
    return Question(
        question_idx=question_idx, messages=messages, ground_truth="42", data_source="test"
    )


def make_rollout(
    question_idx: int,
    rollout_idx: int,
    first: dict[str, float] | None = None,
    second: dict[str, float] | None = None,
) -> Rollout:
    """Returns a rollout whose first attempt is wrong and guided, and whose second one is right.

    `first` and `second` are further fields of the two turns.
    """
    text = "Look again."
    guidance = ShownGuidance(raw_text=text, text=text, kept_tokens=3, bridge_ids=[9])
    return Rollout(
        question_idx=question_idx,
        rollout_idx=rollout_idx,
        prompt_ids=[7],
        turns=[
            Turn(attempt=make_attempt(0), text="41", guidance=guidance, **(first or {})),
            Turn(
                attempt=make_attempt(1),
                text="42",
                is_correct=True,
                raw_reward=1.0,
                **(second or {}),
            ),
        ],
        end_reason="correct",
    )


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


def test_plain_progress_is_one_line_a_batch() -> None:
    file = io.StringIO()
    with Progress(num_batches=4, live=True, file=file) as progress:
        progress.note("run [bold]x[/bold]")
        progress.phase("rollout", batch=1, update=0, total=2)
        progress.advance(num_tokens=10)
        progress.report({"policy/loss": 1.0}, kind="update", batch=1, update=1)
        metrics = {"success/unassisted": 0.25, "success/assisted": 0.5, "perf/rollout_tok_s": 800.4}
        progress.report(metrics, kind="batch", batch=1, update=2)
        progress.report({"success/unassisted": math.nan}, kind="eval", batch=1, update=2)
    lines = file.getvalue().splitlines()
    assert lines[0] == "run [bold]x[/bold]"
    assert lines[1].startswith(
        "train batch 1/4 update 2  unassisted 25.0%  assisted 50.0%  800 tok/s  left 0:00:0"
    )
    assert lines[2].startswith("eval  batch 1/4 update 2  unassisted nan%")
    assert len(lines) == 3


def test_live_display_shows_progress_speed_and_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich: treat the file as a terminal
    monkeypatch.setenv("COLUMNS", "100")
    file = io.StringIO()
    with Progress(num_batches=9, first_batch=3, live=True, file=file) as progress:
        progress.report({"success/unassisted": 0.0}, kind="batch", batch=3, update=2)
        progress.report({"success/unassisted": 1.0}, kind="batch", batch=4, update=4)
        progress.phase("rollout", batch=5, update=4, total=8)
        progress.advance(3, num_tokens=30)
    display = file.getvalue()
    for text in ("batch 5/9", "update 4", "rollout 3/8", "tok/s", "▁█", "100.0%"):
        assert text in display


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
