"""Functions of users: a failure costs one guidance, and a warning names the function."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path

import pytest

from socpo_fast.socratic.plugin import load_function
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import calls
from socpo_fast.socratic.teachers.calls import as_teacher, ask, background, result_of
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest, Rollout, RolloutKey
from tests.helpers.scripted import (
    END,
    PARAMS,
    TOKENIZER,
    ScriptedEngine,
    contains,
    encode,
    question,
)
from tests.socratic.test_rollout import options_of


def request(idx: int = 0) -> GuidanceRequest:
    return GuidanceRequest(
        question="1 + 1?",
        student_answer="3",
        ground_truth=None,
        reference_solution=None,
        key=RolloutKey(0, idx),
        rollout_idx=0,
        attempt_idx=0,
    )


def hear(function: Callable[[GuidanceRequest], object], timeout_s: float = 5.0) -> str:
    """Calls a function as a teacher; returns the text of its guidance, or the warning."""
    teacher = as_teacher(function)
    call = ask(teacher, request(), timeout_s)
    wait([call], timeout=30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = result_of(call, teacher)
    if isinstance(result, Guidance):
        return result.text
    (warning,) = caught
    assert teacher.failures == {result.kind: 1}
    return str(warning.message)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Bare(BaseException):
    """A BaseException that no handler of Exception catches."""


class OwnText(str):
    def strip(self, _letters: str | None = None) -> int:  # type: ignore[override]
        return 3


ENDS = [
    SystemExit(3),
    KeyboardInterrupt(),
    StopIteration(),
    asyncio.CancelledError(),
    TimeoutError("socket"),
    KeyError("x"),
    GeneratorExit(),
    Unspeakable(),
    Bare(),
]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["plain", "async", "promised"])
def test_whatever_a_function_raises_costs_one_guidance(error: BaseException, kind: str) -> None:
    async def later(_: GuidanceRequest) -> str:
        await asyncio.sleep(0)
        raise error

    def at_once(_: GuidanceRequest) -> str:
        raise error

    function = {"plain": at_once, "async": later, "promised": lambda r: later(r)}[kind]
    line = hear(function)
    assert type(error).__name__ in line
    if not isinstance(error, asyncio.CancelledError | StopIteration):
        assert "teacher: no guidance, exception: tests.socratic.test_user_functions:" in line
        assert "(test_user_functions.py line " in line
        assert "guidance/failed_exception" in line
    assert hear(lambda _: "Look.") == "Look."
    assert hear(as_async("Look.")) == "Look.", "the event loop of async functions still runs"


def as_async(text: str) -> Callable[[GuidanceRequest], object]:
    async def say(_: GuidanceRequest) -> str:
        await asyncio.sleep(0)
        return text

    return say


def test_sys_exit_in_a_task_of_its_own_ends_no_loop() -> None:
    async def start(_: GuidanceRequest) -> str:
        asyncio.create_task(leave())  # noqa: RUF006 - nobody waits for it, which is the point
        await asyncio.sleep(0.05)
        return "Look."

    async def leave() -> None:
        sys.exit(1)

    assert hear(start) == "Look."
    assert hear(as_async("Again.")) == "Again."


@pytest.mark.parametrize("answer", [3, b"Look.", Guidance(text=b"Look."), Guidance(text=3)])  # type: ignore[arg-type]
def test_wrong_return_type_is_named(answer: object) -> None:
    def wrong(_: GuidanceRequest) -> object:
        return answer

    assert "wrong must return Guidance, str or None, got " in hear(wrong)
    assert hear(lambda _: OwnText(" Look. ")) == "Look."


def test_the_first_failure_of_each_kind_is_told() -> None:
    outcomes = iter([None, KeyError("a"), None, KeyError("b"), "Look."])

    def rule(_: GuidanceRequest) -> str | None:
        outcome = next(outcomes)
        if isinstance(outcome, KeyError):
            raise outcome
        return outcome

    teacher = as_teacher(rule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            call = ask(teacher, request(), 5)
            wait([call])
            guidance = result_of(call, teacher)
    assert guidance == Guidance(text="Look.")
    assert teacher.failures == {"none": 2, "exception": 2}
    assert ["none:" in str(w.message) for w in caught] == [True, False]


def roll(
    teacher: Callable[[GuidanceRequest], object], num_questions: int, limit_s: float
) -> list[Rollout]:
    script = {
        (q, r): [[*encode("no"), END], [*encode("yes"), END]]
        for q in range(num_questions)
        for r in (0, 1)
    }
    return list(
        socratic_rollouts(
            ScriptedEngine(script),
            TOKENIZER,
            [question(q) for q in range(num_questions)],
            teacher=teacher,
            grader=contains,
            params=PARAMS,
            options=options_of(group_size=2, guidance_timeout_s=limit_s),
        )
    )


@pytest.mark.filterwarnings("ignore:teacher")
def test_calls_that_hang_cost_one_limit_together() -> None:
    """More calls hang than a pool has threads; the other ones are answered all the same.

    They wait for one timeout together, and the next batch works as usual.
    """
    stop = threading.Event()

    def hang(request: GuidanceRequest) -> str:
        if request.rollout_idx == 0:
            stop.wait(60)
        return "Look."

    started = time.perf_counter()
    rollouts = roll(hang, 40, limit_s=1.0)
    assert time.perf_counter() - started < 4.0
    reasons = {(r.rollout_idx, r.end_reason, r.failure) for r in rollouts}
    assert reasons == {(0, "guidance_failed", "timeout"), (1, "correct", "")}
    assert {r.end_reason for r in roll(lambda _: "Look.", 3, limit_s=5.0)} == {"correct"}
    stop.set()


def test_quick_functions_are_called_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine a thread may wait for a core longer than a function counts as quick.
    monkeypatch.setattr(calls, "IMMEDIATE_WAIT_S", 5.0)
    running = []
    num_running = []

    def rule(request: GuidanceRequest) -> str:
        running.append(request)
        num_running.append(len(running))
        time.sleep(0.002)
        running.remove(request)
        return "Look."

    roll(rule, 10, limit_s=5.0)
    assert max(num_running) == 1


HANGING = """
import asyncio, time
from socpo_fast.socratic.teachers.calls import as_teacher, ask
from tests.socratic.test_user_functions import request

async def blocks(_):
    time.sleep(10**6)

calls = [ask(as_teacher(f), request(), 0.2) for f in (lambda _: time.sleep(10**6), blocks)]
print([type(call.exception(timeout=30)).__name__ for call in calls])
"""


def test_the_process_ends_whatever_still_hangs() -> None:
    root = Path(__file__).parent.parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", HANGING],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        cwd=root,
    )
    assert (result.returncode, result.stdout) == (0, "['TimeoutError', 'TimeoutError']\n")


def test_fork_has_its_own_event_loops() -> None:
    assert hear(as_async("Look.")) == "Look."
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if hear(as_async("Look.")) == "Look." else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_timeout_cancels_a_returned_coroutine() -> None:
    cancelled = threading.Event()

    async def slow(_: GuidanceRequest) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "too late"

    assert "no guidance, timeout" in hear(lambda r: slow(r), 0.1)
    assert cancelled.wait(10)


@pytest.mark.parametrize(
    "line", ["raise KeyError('x')", "import sys; sys.exit(1)", "def", "import nowhere"]
)
def test_a_module_that_cannot_be_imported_is_refused(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError,
        match="teacher.rule must name a module that can be imported, got 'broken_module:f'",
    ):
        load_function("teacher.rule", "broken_module:f")


def test_the_working_directory_is_looked_into_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program socpo, unlike python -m, does not look there by itself."""
    (tmp_path / "my_rules_here.py").write_text("import sys\nsys.path.append('x')\ndef rule(r): ...")
    (tmp_path / "json.py").write_text("def dumps(r): ...")
    (tmp_path / "pytest.py").write_text("def rule(r): ...")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = list(sys.path)
    assert load_function("teacher.rule", "my_rules_here:rule").__module__ == "my_rules_here"
    assert sys.path == [*before, "x"], "what the module adds stays"
    assert "tmp" not in str(load_function("teacher.rule", "json:dumps").__code__.co_filename)
    with pytest.raises(ValueError, match=r"must name a function of pytest \(.*site-packages"):
        load_function("teacher.rule", "pytest:rule")


def test_what_is_not_found_names_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_other_rules.py").write_text("def guide(r): ...")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"PYTHONPATH=\. .*; did you mean my_other_rules\?"):
        load_function("teacher.rule", "my_other_rule:guide")
    with pytest.raises(ValueError, match=r"got 'guid'; did you mean guide\?"):
        load_function("teacher.rule", "my_other_rules:guid")
    monkeypatch.delitem(sys.modules, "my_other_rules")


def test_a_teacher_without_an_answer_says_why() -> None:
    """guide returns None then; guide_in_time raises the reason."""
    teacher = as_teacher(lambda _: 1 / 0)
    assert background(teacher.guide(request())).result(timeout=30) is None
    with pytest.raises(GuidanceFailed, match="raised ZeroDivisionError"):
        background(teacher.guide_in_time(request(), 5)).result(timeout=30)


@pytest.mark.filterwarnings("ignore:teacher")
def test_blocking_async_function_costs_one_guidance() -> None:
    """A call without await, say of the library requests, blocks the event loop that it runs on."""
    stop = threading.Event()

    async def sometimes_blocks(request: GuidanceRequest) -> str:
        if request.key.question == 0:
            stop.wait(60)
        await asyncio.sleep(0)
        return "Look."

    teacher = as_teacher(sometimes_blocks)
    blocked = ask(teacher, request(0), 0.2)
    wait([blocked], timeout=30)
    assert isinstance(blocked.exception(), TimeoutError)
    time.sleep(0.5)  # until the blocked loop has been noticed and replaced
    later = ask(teacher, request(1), 5.0)
    assert later.result(timeout=30) == Guidance(text="Look.")
    stop.set()
