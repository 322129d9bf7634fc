"""Functions of the user's own: whatever they do costs what it belongs to, and is told by name."""

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
    """What is told of one call in this thread, or the text."""
    teacher = as_teacher(function)
    asked = ask(teacher, request(), timeout_s)
    wait([asked], timeout=30)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcome = result_of(asked, teacher)
    if isinstance(outcome, Guidance):
        return outcome.text
    (warning,) = told
    assert teacher.failures == {outcome.kind: 1}
    return str(warning.message)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Bare(BaseException):
    """No Exception: nobody's handler takes it for one."""


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
    assert hear(as_async("Look.")) == "Look.", "the loop of async functions still turns"


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
def test_a_function_that_returns_anything_else_is_named(answer: object) -> None:
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
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            asked = ask(teacher, request(), 5)
            wait([asked])
            heard = result_of(asked, teacher)
    assert heard == Guidance(text="Look.")
    assert teacher.failures == {"none": 2, "exception": 2}
    assert ["none:" in str(w.message) for w in told] == [True, False]


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
    """More of them than any pool has threads; those that answer are heard, in this batch and the
    next.
    """
    stop = threading.Event()

    def hang(asked: GuidanceRequest) -> str:
        if asked.rollout_idx == 0:
            stop.wait(60)
        return "Look."

    since = time.perf_counter()
    rollouts = roll(hang, 40, limit_s=1.0)
    assert time.perf_counter() - since < 4.0
    reasons = {(r.rollout_idx, r.end_reason, r.failure) for r in rollouts}
    assert reasons == {(0, "guidance_failed", "timeout"), (1, "correct", "")}
    assert {r.end_reason for r in roll(lambda _: "Look.", 3, limit_s=5.0)} == {"correct"}
    stop.set()


def test_quick_functions_are_called_one_at_a_time() -> None:
    running = []
    most = []

    def rule(asked: GuidanceRequest) -> str:
        running.append(asked)
        most.append(len(running))
        time.sleep(0.002)
        running.remove(asked)
        return "Look."

    roll(rule, 10, limit_s=5.0)
    assert max(most) == 1


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
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        capture_output=True,
        text=True,
        timeout=60,
        env=env,
        cwd=root,
    )
    assert (done.returncode, done.stdout) == (0, "['TimeoutError', 'TimeoutError']\n")


def test_a_fork_has_loops_of_its_own() -> None:
    assert hear(as_async("Look.")) == "Look."
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if hear(as_async("Look.")) == "Look." else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_plain_function_that_makes_a_coroutine_can_be_given_up() -> None:
    given_up = threading.Event()

    async def slow(_: GuidanceRequest) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()
        return "too late"

    assert "no guidance, timeout" in hear(lambda r: slow(r), 0.1)
    assert given_up.wait(10)


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


def test_a_teacher_without_an_answer_says_why() -> None:
    """Asked directly it has nothing; through ask() the reason is known."""
    teacher = as_teacher(lambda _: 1 / 0)
    assert background(teacher.guide(request())).result(timeout=30) is None
    with pytest.raises(GuidanceFailed, match="raised ZeroDivisionError"):
        background(teacher.guide_in_time(request(), 5)).result(timeout=30)


@pytest.mark.filterwarnings("ignore:teacher")
def test_an_async_function_that_blocks_costs_its_own_guidance() -> None:
    """A call without await, as of requests in an async function, blocks the loop it runs on."""
    stop = threading.Event()

    async def sometimes_blocks(asked: GuidanceRequest) -> str:
        if asked.key.question == 0:
            stop.wait(60)
        await asyncio.sleep(0)
        return "Look."

    teacher = as_teacher(sometimes_blocks)
    blocked = ask(teacher, request(0), 0.2)
    wait([blocked], timeout=30)
    assert isinstance(blocked.exception(), TimeoutError)
    time.sleep(0.5)  # until the loop has been seen not to turn
    later = ask(teacher, request(1), 5.0)
    assert later.result(timeout=30) == Guidance(text="Look.")
    stop.set()
