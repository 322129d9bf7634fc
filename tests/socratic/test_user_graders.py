"""Graders of users: errors name them, and those that hang are stopped."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import pytest

from socpo_fast.files import StopRequested
from socpo_fast.socratic.graders import CheckedGrader, as_grader
from socpo_fast.socratic.plugin import TookTooLong, time_limit
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.stopping import StopSignals
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
from tests.socratic.test_user_functions import Bare, Unspeakable


@pytest.mark.parametrize("error", [ValueError("no number"), SystemExit(2), KeyError("x")])
def test_a_grader_that_raises_is_named(error: BaseException) -> None:
    def grade(_text: str, _question: object) -> bool:
        raise error

    line = (
        r"data.grader mine:grade .* on question 7: .*grade raised "
        rf"{type(error).__name__}.*\(test_user_gr.* line"
    )
    with pytest.raises(ValueError, match=line):
        CheckedGrader(grade, "mine:grade").grade("", question(7))


def spin(_text: str, _question: object) -> bool:
    while True:
        with suppress(Exception):
            time.sleep(0.01)


def wait_on_a_socket(_text: str, _question: object) -> bool:
    ours, _theirs = socket.socketpair()
    return bool(ours.recv(1))


@pytest.mark.parametrize("grade", [spin, wait_on_a_socket])
def test_a_grader_that_hangs_is_stopped_and_named(grade: Callable[[str, object], bool]) -> None:
    line = (
        rf"within grader.timeout_s 0.2, got an error on question 7: .*{grade.__name__} "
        r".*\(test_user_gr.* line"
    )
    started = time.perf_counter()
    with pytest.raises(ValueError, match=line):
        CheckedGrader(grade, "mine:grade", timeout_s=0.2).grade("", question(7))
    assert time.perf_counter() - started < 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Later:
    """An async grader that is an object."""

    async def __call__(self, text: str, _question: object) -> bool:
        await asyncio.sleep(0)
        if not text:
            raise KeyError("x")
        return "yes" in text


async def blocks(_text: str, _question: object) -> bool:
    time.sleep(2)
    return True


def test_an_async_grader_may_be_given_anywhere() -> None:
    """Its errors are named, and one that blocks the event loop of graders stops no other one."""
    [rollout] = socratic_rollouts(
        ScriptedEngine({(0, 0): [[*encode("yes"), END]]}),
        TOKENIZER,
        [question(0)],
        teacher=lambda _: None,
        grader=Later(),
        params=PARAMS,
        options=options_of(group_size=1),
    )
    assert rollout.end_reason == "correct"
    with pytest.raises(ValueError, match=r":Later raised KeyError: 'x' \(test_user_gr.* line"):
        as_grader(Later()).grade("", question(7))
    with pytest.raises(ValueError, match=":blocks raised TookTooLong"):
        CheckedGrader(blocks, "mine:grade", timeout_s=0.1).grade("", question(7))
    time.sleep(0.5)  # until the blocked loop has been noticed and replaced
    assert CheckedGrader(Later(), "later", timeout_s=1.0).grade("yes", question(7)).is_correct


def test_a_grader_leaves_the_alarm_of_others_alone() -> None:
    rung: list[int] = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert CheckedGrader(contains, "contains").grade("yes", question(7)).is_correct
        time.sleep(0.4)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert rung == [1]


def test_a_grader_works_on_any_thread() -> None:
    """There it has no time limit, as Python cannot interrupt another thread."""
    grades: list[object] = []
    grade = CheckedGrader(contains, "contains", timeout_s=0.01).grade
    thread = threading.Thread(target=lambda: grades.append(grade("yes", question(7)).is_correct))
    thread.start()
    thread.join()
    assert grades == [True]


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    """Sets Python's handler of Ctrl-C, which background processes of a script lack."""
    old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old_handler)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_ctrl_c_is_not_blamed_on_the_grader() -> None:
    """In training StopSignals handles Ctrl-C, so a KeyboardInterrupt is the grader's there."""

    def grade(_text: str, _question: object) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CheckedGrader(grade, "mine:grade").grade("", question(7))
    with StopSignals(), pytest.raises(ValueError, match="grade raised KeyboardInterrupt"):
        CheckedGrader(grade, "mine:grade").grade("", question(7))


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no picture")


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (Unspeakable(), "raised Unspeakable: a Unspeakable whose text raised RuntimeError"),
        (Bare("x"), "raised Bare: x"),
        (GeneratorExit(), "raised GeneratorExit"),
        (Unshowable(), "got a Unshowable whose text raised RuntimeError"),
        (10**400, "raised OverflowError"),
        ({"a": 10**400}, "raised OverflowError"),
        (np.complex128(1), "must return a bool, a number"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_unprintable_verdicts_are_refused(outcome: object, line: str) -> None:
    def grade(_text: str, _question: object) -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(ValueError, match=line):
        CheckedGrader(grade, "mine:grade").grade("", question(7))  # type: ignore[arg-type]


def test_a_stop_goes_through_a_grader() -> None:
    def grade(_text: str, _question: object) -> bool:
        raise StopRequested

    with pytest.raises(StopRequested):
        CheckedGrader(grade, "mine:grade").grade("", question(7))


def test_alarm_at_the_end_restores_the_outer_one() -> None:
    """Wherever the alarm rings, the outer alarm and its handler are restored."""
    previous = signal.getsignal(signal.SIGALRM)
    for idx in range(300):
        try:
            with time_limit(0.001):
                end = time.perf_counter() + 0.0008 + idx * 2e-6
                while time.perf_counter() < end:
                    pass
        except TookTooLong:
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) is previous
