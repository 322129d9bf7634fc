"""A local teacher beside the student, on devices that answer late: what both say, and when."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest

from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import LocalTeacher
from socpo_fast.socratic.teachers.calls import background
from socpo_fast.socratic.teachers.local import ENOUGH_REQUESTS
from socpo_fast.trace import recording
from socpo_fast.types import Rollout
from tests.helpers.late_devices import LateReadback, make_reads_late
from tests.helpers.local_teachers import heard, local_teacher, request, wait_until
from tests.helpers.scripted import PARAMS, TOKENIZER, contains, question

OPTIONS = RolloutOptions(group_size=6, max_attempts=2, guidance_limit=12)


def make_engine(folder: Path, tokens_per_sync: int) -> Engine:
    student = load_student(folder)
    return Engine(
        student, kv_cache_gib=0.02, page_size=16, max_running=9, tokens_per_sync=tokens_per_sync
    )


def teacher_on_a_card(folder: Path) -> LocalTeacher:
    """One that works while the student does, as on a stream of its own."""
    teacher = local_teacher(folder)
    teacher.occupies_host = False
    teacher._enough = ENOUGH_REQUESTS
    return teacher


def roll(engine: Engine, teacher: LocalTeacher) -> list[Rollout]:
    rollouts = socratic_rollouts(
        engine,
        TOKENIZER,
        [question(q, truth="impossible") for q in range(5)],
        teacher=teacher,
        grader=contains,
        params=PARAMS,
        options=OPTIONS,
        batch_idx=0,
    )
    return sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))


def outcome(rollout: Rollout) -> list[tuple]:
    return [
        (
            turn.attempt.token_ids,
            turn.attempt.logprobs.tolist(),
            turn.guidance and turn.guidance.text,
        )
        for turn in rollout.turns
    ]


@pytest.mark.parametrize("tokens_per_sync", [1, 4])
def test_when_numbers_come_changes_none(
    teacher_folder: Path, tokens_per_sync: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher finish their steps in any order; what they say is the same."""
    expected = list(
        map(outcome, roll(make_engine(teacher_folder, 1), local_teacher(teacher_folder)))
    )
    assert any(len(turns) == 2 for turns in expected)
    for seed in range(8):
        make_reads_late(monkeypatch, seed)
        engine = make_engine(teacher_folder, tokens_per_sync)
        teacher = teacher_on_a_card(teacher_folder)
        assert list(map(outcome, roll(engine, teacher))) == expected
        assert engine.stats.pages_free == engine.stats.pages_total


def test_nobody_waits_for_a_device_while_both_work(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is not ready is waited for only when the other one has nothing to do."""
    make_reads_late(monkeypatch, seed=3)
    engine = make_engine(teacher_folder, 4)
    teacher = teacher_on_a_card(teacher_folder)
    teacher._engine.keep_prefix(teacher._prefix_ids)  # once a run
    waits = []
    wait = LateReadback.wait

    def note_wait(late: LateReadback) -> object:
        if late._looks_left > 0 and engine.has_work and teacher._engine.has_work:
            waits.append(late)
        return wait(late)

    monkeypatch.setattr(LateReadback, "wait", note_wait)
    roll(engine, teacher)
    assert not waits


def test_on_a_cpu_they_take_turns(teacher_folder: Path, tmp_path: Path) -> None:
    """While the teacher has requests under way the student takes no step."""
    engine = make_engine(teacher_folder, 1)
    teacher = local_teacher(teacher_folder)
    assert teacher.occupies_host
    with recording(tmp_path, 1, 1):
        roll(engine, teacher)
    events = json.loads((tmp_path / "trace_000001.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    turns = [pid for pid, _ in groupby(steps, key=lambda event: event["pid"])]
    assert turns == ["student", "teacher", "student"] and len(steps) > 20


def test_it_starts_when_enough_wait(teacher_folder: Path) -> None:
    """Or when the student has nothing to do; requests join a teacher that runs at once."""
    teacher = teacher_on_a_card(teacher_folder)
    asked = [
        background(teacher.guide_in_time(request(i), None)) for i in range(ENOUGH_REQUESTS - 1)
    ]
    wait_until(lambda: teacher._arrived.qsize() == len(asked))
    assert not teacher.step(student_is_idle=False) and not teacher._engine.has_work
    asked.append(background(teacher.guide_in_time(request(99), None)))
    wait_until(lambda: teacher._arrived.qsize() == len(asked))
    assert teacher.step(student_is_idle=False) and teacher._engine.has_work
    asked.append(background(teacher.guide_in_time(request(100), None)))
    wait_until(
        lambda: teacher.step(student_is_idle=False) and len(teacher._running) > ENOUGH_REQUESTS
    )
    wait_until(lambda: not teacher.step(student_is_idle=False))
    assert all(map(heard, asked))
    late = background(teacher.guide_in_time(request(1), None))
    wait_until(lambda: not teacher._arrived.empty())
    assert not teacher.step(student_is_idle=False)
    wait_until(lambda: not teacher.step(student_is_idle=True) and late.done())


def test_the_prompts_prefix_is_prefilled_once(teacher_folder: Path) -> None:
    teacher = local_teacher(teacher_folder)
    prompts = [teacher._prompt_ids(request(i, answer=f"It is {i}.")) for i in range(3)]
    whole = len(teacher._prefix_ids) // 32 * 32
    assert whole > 0 and all(prompt[:whole] == teacher._prefix_ids[:whole] for prompt in prompts)
    for _ in range(2):
        before = teacher._engine.stats.prefill_tokens
        futures = [
            background(teacher.guide_in_time(request(i, answer=f"It is {i}."), None))
            for i in range(3)
        ]
        wait_until(lambda futures=futures: not teacher.step() and all(f.done() for f in futures))
        prefilled = teacher._engine.stats.prefill_tokens - before
    assert prefilled == sum(len(prompt) - whole for prompt in prompts), "the second time"


def test_a_trace_shows_who_worked_when(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reads_late(monkeypatch, seed=0)
    with recording(tmp_path, 1, 1):
        rollouts = roll(make_engine(teacher_folder, 4), teacher_on_a_card(teacher_folder))
    roll(make_engine(teacher_folder, 4), local_teacher(teacher_folder))  # recorded no more
    spans = defaultdict(list)
    for event in json.loads((tmp_path / "trace_000001.json").read_text())["traceEvents"]:
        spans[event["pid"], event["ph"]].append(event)
    assert set(spans) == {("student", "X"), ("teacher", "X"), ("guidance", "b"), ("guidance", "e")}
    for name in ("student", "teacher"):
        ends = 0.0
        for span in spans[name, "X"]:
            assert span["ts"] >= ends and span["dur"] >= 0, "steps of a stream follow each other"
            ends = span["ts"] + span["dur"]
    guided = sum(len(rollout.turns) > 1 for rollout in rollouts)
    assert len(spans["guidance", "b"]) == len(spans["guidance", "e"]) >= guided > 0
    rounds = [span["args"] for span in spans["student", "X"] if span["name"] == "4 decode rounds"]
    assert rounds and all(1 <= args["sequences"] <= 9 for args in rounds)
    begin = min(span["ts"] for span in spans["teacher", "X"])
    assert begin < max(span["ts"] for span in spans["student", "X"]), "they overlap"
