"""A local teacher beside the student, on devices that answer late: their tokens and their timing.

LateReadback plays a copy from the device that is ready only after a random number of looks, as a
CUDA event would be.
"""

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
from socpo_fast.socratic.teachers.local import MIN_QUEUED_REQUESTS
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
    """Returns a teacher that works while the student does, as on a CUDA stream of its own."""
    teacher = local_teacher(folder)
    teacher.shares_cpu = False
    teacher.min_queued = MIN_QUEUED_REQUESTS
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
def test_timing_changes_no_rollout(
    teacher_folder: Path, tokens_per_sync: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student and teacher finish their steps in any order; tokens and guidance stay the same."""
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
    """The loop waits for an unfinished step of one engine only if the other one is idle."""
    make_reads_late(monkeypatch, seed=3)
    engine = make_engine(teacher_folder, 4)
    teacher = teacher_on_a_card(teacher_folder)
    teacher.engine.keep_prefix(teacher.prefix_ids)  # done once a run, so it may wait
    waits = []
    wait = LateReadback.wait

    def note_wait(readback: LateReadback) -> object:
        if readback._polls_left > 0 and engine.has_work and teacher.engine.has_work:
            waits.append(readback)
        return wait(readback)

    monkeypatch.setattr(LateReadback, "wait", note_wait)
    roll(engine, teacher)
    assert not waits


def test_student_and_teacher_alternate_on_a_cpu(teacher_folder: Path, tmp_path: Path) -> None:
    """The student takes no step while the teacher has requests in flight."""
    engine = make_engine(teacher_folder, 1)
    teacher = local_teacher(teacher_folder)
    assert teacher.shares_cpu
    with recording(tmp_path, 1, 1):
        roll(engine, teacher)
    events = json.loads((tmp_path / "trace_000001.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    turns = [pid for pid, _ in groupby(steps, key=lambda event: event["pid"])]
    assert turns == ["student", "teacher", "student"] and len(steps) > 20


def test_teacher_starts_with_enough_requests(teacher_folder: Path) -> None:
    """It also starts if the student is idle. Once it runs, further requests join it at once."""
    teacher = teacher_on_a_card(teacher_folder)
    calls = [
        background(teacher.guide_in_time(request(i), None)) for i in range(MIN_QUEUED_REQUESTS - 1)
    ]
    wait_until(lambda: teacher.queued.qsize() == len(calls))
    assert not teacher.step(student_is_idle=False) and not teacher.engine.has_work
    calls.append(background(teacher.guide_in_time(request(99), None)))
    wait_until(lambda: teacher.queued.qsize() == len(calls))
    assert teacher.step(student_is_idle=False) and teacher.engine.has_work
    calls.append(background(teacher.guide_in_time(request(100), None)))
    wait_until(
        lambda: teacher.step(student_is_idle=False) and len(teacher.running) > MIN_QUEUED_REQUESTS
    )
    wait_until(lambda: not teacher.step(student_is_idle=False))
    assert all(map(heard, calls))
    last_call = background(teacher.guide_in_time(request(1), None))
    wait_until(lambda: not teacher.queued.empty())
    assert not teacher.step(student_is_idle=False)
    wait_until(lambda: not teacher.step(student_is_idle=True) and last_call.done())


def test_the_prompts_prefix_is_prefilled_once(teacher_folder: Path) -> None:
    teacher = local_teacher(teacher_folder)
    prompts = [teacher.prompt_ids(request(i, answer=f"It is {i}.")) for i in range(3)]
    shared = len(teacher.prefix_ids) // 32 * 32
    assert shared > 0 and all(prompt[:shared] == teacher.prefix_ids[:shared] for prompt in prompts)
    for _ in range(2):
        old_prefill_tokens = teacher.engine.stats.prefill_tokens
        futures = [
            background(teacher.guide_in_time(request(i, answer=f"It is {i}."), None))
            for i in range(3)
        ]
        wait_until(lambda futures=futures: not teacher.step() and all(f.done() for f in futures))
        prefilled = teacher.engine.stats.prefill_tokens - old_prefill_tokens
    assert prefilled == sum(len(prompt) - shared for prompt in prompts), "the second time"


def test_trace_shows_the_steps_of_both(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reads_late(monkeypatch, seed=0)
    with recording(tmp_path, 1, 1):
        rollouts = roll(make_engine(teacher_folder, 4), teacher_on_a_card(teacher_folder))
    # Behind the recording, so it leaves no events.
    roll(make_engine(teacher_folder, 4), local_teacher(teacher_folder))
    spans = defaultdict(list)
    for event in json.loads((tmp_path / "trace_000001.json").read_text())["traceEvents"]:
        spans[event["pid"], event["ph"]].append(event)
    assert set(spans) == {("student", "X"), ("teacher", "X"), ("guidance", "b"), ("guidance", "e")}
    for name in ("student", "teacher"):
        last_end = 0.0
        for span in spans[name, "X"]:
            assert span["ts"] >= last_end and span["dur"] >= 0, (
                "steps of a stream follow each other"
            )
            last_end = span["ts"] + span["dur"]
    num_guided = sum(len(rollout.turns) > 1 for rollout in rollouts)
    assert len(spans["guidance", "b"]) == len(spans["guidance", "e"]) >= num_guided > 0
    rounds = [span["args"] for span in spans["student", "X"] if span["name"] == "4 decode rounds"]
    assert rounds and all(1 <= args["sequences"] <= 9 for args in rounds)
    first_teacher_step = min(span["ts"] for span in spans["teacher", "X"])
    assert first_teacher_step < max(span["ts"] for span in spans["student", "X"]), "they overlap"
