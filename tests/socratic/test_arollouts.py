"""arollouts: tokens of socratic_rollouts, teachers on the caller's loop, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from contextvars import ContextVar
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from socpo_fast import AsyncEngine, arollouts, socratic_rollouts
from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.socratic.teachers import EndpointTeacher, TeacherPrompt
from socpo_fast.types import GuidanceRequest, Rollout
from tests.helpers.endpoints import hear
from tests.helpers.faulty_server import Server
from tests.helpers.local_teachers import local_teacher
from tests.helpers.scripted import PARAMS, TOKENIZER
from tests.socratic.test_leaving_early import (
    OPTIONS,
    QUESTIONS,
    assert_nothing_stays,
    engine,
    failing_at,
    never,
    outcome,
    say,
    start,
)

__all__ = ["engine"]  # a fixture


def astart(
    engine: Engine, questions: Any = QUESTIONS, **changes: Any
) -> AsyncGenerator[Rollout, None]:
    settings = {
        "teacher": say,
        "grader": never,
        "params": PARAMS,
        "options": OPTIONS,
        "batch_idx": 7,
    }
    return arollouts(engine, TOKENIZER, questions, **(settings | changes))


async def collect(rollouts: AsyncGenerator[Rollout, None]) -> list[Rollout]:
    return [rollout async for rollout in rollouts]


def assert_idle(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.stats.pages_free == engine.stats.pages_total


class Tutor:
    """An async teacher whose client belongs to one event loop; it counts its calls."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.loop = asyncio.get_running_loop()
        self.client = asyncio.Semaphore(2)
        self.delay_s = delay_s
        self.num_started = self.num_ended = 0

    async def __call__(self, request: GuidanceRequest) -> str:
        assert asyncio.get_running_loop() is self.loop
        self.num_started += 1
        try:
            async with self.client:
                await asyncio.sleep(self.delay_s)
        finally:
            self.num_ended += 1
        return "look again"

    async def guide(self, request: GuidanceRequest) -> str:
        return await self(request)


@pytest.mark.parametrize("kind", ["plain", "async", "promised", "object"])
def test_same_tokens_as_without_a_loop(engine: Engine, kind: str) -> None:
    async def run() -> list[Rollout]:
        tutor = Tutor(0.001)
        teachers: dict[str, Any] = {
            "plain": say,
            "async": tutor.guide,
            "promised": lambda request: tutor(request),
            "object": tutor,
        }
        rollouts = await collect(astart(engine, teacher=teachers[kind]))
        assert tutor.num_started == tutor.num_ended == (0 if kind == "plain" else 24)
        return rollouts

    expected = outcome(start(engine))
    assert {reason for reason, _ in expected} == {"max_attempts"}
    for _ in range(2):  # the second time on another event loop
        assert outcome(iter(asyncio.run(run()))) == expected
    assert_nothing_stays(engine)


def test_the_callers_loop_stays_free(engine: Engine, monkeypatch: Any) -> None:
    """The engine steps in one other thread; a function that blocks has a thread of its own."""
    threads: set[int] = set()
    forward = Runner.forward

    def slow_forward(runner: Runner, plan: Any) -> Any:
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return forward(runner, plan)

    def blocking(_: GuidanceRequest) -> str:
        time.sleep(0.05)
        return "look again"

    async def run() -> float:
        longest_s, last_s = 0.0, time.perf_counter()
        task = asyncio.create_task(collect(astart(engine, teacher=blocking)))
        while not task.done():
            await asyncio.sleep(0.001)
            longest_s = max(longest_s, time.perf_counter() - last_s)
            last_s = time.perf_counter()
        assert len(task.result()) == 12
        return longest_s

    started_s = time.perf_counter()
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "forward", slow_forward)
        longest_s = asyncio.run(run())
    assert longest_s < (time.perf_counter() - started_s) / 3
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert_idle(engine)


@pytest.mark.parametrize("seed", range(8))
def test_cancelled_at_any_moment(engine: Engine, seed: int) -> None:
    """Once the cancelled task is awaited, the engine is usable on the same loop."""
    rng = random.Random(seed)
    expected = outcome(start(engine))

    async def run() -> None:
        for _ in range(6):
            tutor = Tutor(rng.choice([0.0, 0.002, 10.0]))
            task = asyncio.create_task(collect(astart(engine, teacher=tutor)))
            await asyncio.sleep(rng.random() * 0.08)
            for _ in range(rng.randrange(1, 4)):
                task.cancel()
                await asyncio.sleep(rng.choice([0.0, 0.0, 0.003]))
            done = (await asyncio.wait([task]))[0].pop()
            assert done.cancelled() or len(done.result()) == 12
            assert_idle(engine)
            assert tutor.num_started == tutor.num_ended
            assert len(asyncio.all_tasks()) == 1
        assert outcome(iter(await collect(astart(engine)))) == expected

    asyncio.run(run())
    assert_nothing_stays(engine)


def test_cancel_waits_for_the_step_that_runs(engine: Engine, monkeypatch: Any) -> None:
    is_inside = threading.Event()
    may_go_on = threading.Event()
    forward = Runner.forward

    def held_forward(runner: Runner, plan: Any) -> Any:
        is_inside.set()
        assert may_go_on.wait(30)
        return forward(runner, plan)

    async def run() -> None:
        task = asyncio.create_task(collect(astart(engine)))
        await asyncio.to_thread(is_inside.wait, 30)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        with pytest.raises(ValueError, match="arollouts: the engine must be idle, got unfinished"):
            await anext(astart(engine))
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_idle(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "forward", held_forward)
        asyncio.run(run())
    assert_nothing_stays(engine)


@pytest.mark.parametrize("num_taken", [0, 1, 12])
@pytest.mark.parametrize("ending", ["aclose", "error", "forgotten"])
def test_a_caller_that_stops(engine: Engine, num_taken: int, ending: str) -> None:
    async def take(rollouts: AsyncGenerator[Rollout, None]) -> None:
        for _ in range(num_taken):
            await anext(rollouts)

    async def run() -> None:
        rollouts = astart(engine, teacher=Tutor(0.001))
        if ending == "error":
            with suppress(KeyError):
                async with aclosing(rollouts):
                    await take(rollouts)
                    raise KeyError
        else:
            await take(rollouts)
        if ending == "aclose":
            await rollouts.aclose()
        if ending != "forgotten":
            assert_idle(engine)
        del rollouts
        gc.collect()

    asyncio.run(run())
    assert_nothing_stays(engine)


def test_two_calls_at_once_are_refused(engine: Engine) -> None:
    """Even while the engine has no work because all rollouts wait for the teacher."""

    async def run() -> None:
        teacher = Tutor(10.0)
        async with aclosing(astart(engine, teacher=teacher)) as rollouts:
            task = asyncio.create_task(anext(rollouts))
            while teacher.num_started < 12 or engine.has_work:
                await asyncio.sleep(0.001)
            with pytest.raises(ValueError, match="an arollouts or AsyncEngine that drives"):
                await anext(astart(engine))
            with pytest.raises(ValueError, match="socratic_rollouts: the engine must be idle"):
                next(start(engine))
            task.cancel()
            await asyncio.wait([task])
        assert teacher.num_ended == 12

    asyncio.run(run())
    assert_nothing_stays(engine)


def test_an_engine_has_one_driver(engine: Engine) -> None:
    """While it is served, no rollouts run on it; once closed or forgotten, they do."""

    async def run() -> None:
        async with AsyncEngine(engine) as server:
            await server.generate("a", [5, 6], PARAMS)
            with pytest.raises(ValueError, match="AsyncEngine that drives it in another"):
                await collect(astart(engine))
            with pytest.raises(ValueError, match="AsyncEngine: the engine must be idle"):
                AsyncEngine(engine)
        assert len(await collect(astart(engine))) == 12
        server = AsyncEngine(engine)
        await server.generate("a", [5, 6], PARAMS)
        server.end("a")
        await server.run(lambda: None)

    asyncio.run(run())
    gc.collect()
    assert_nothing_stays(engine)


@pytest.mark.parametrize("number", [1, 7, 20])
def test_errors_reach_the_caller(engine: Engine, number: int, monkeypatch: Any) -> None:
    """A grader's comes after the rollouts that finished before it; a step's resets the engine."""
    with pytest.raises(ValueError, match="wrapped raised KeyError"):
        asyncio.run(collect(astart(engine, grader=failing_at(number, never, KeyError()))))
    assert_idle(engine)
    with monkeypatch.context() as patch:
        error = RuntimeError("out of memory")
        patch.setattr(Runner, "forward", failing_at(number, Runner.forward, error))
        with pytest.raises(RuntimeError, match="out of memory"):
            asyncio.run(collect(astart(engine)))
    with pytest.raises(ValueError, match="arollouts: question_idx must be unique"):
        asyncio.run(collect(astart(engine, QUESTIONS[:1] * 2)))
    assert_nothing_stays(engine)


@pytest.mark.filterwarnings("ignore:teacher")
def test_a_teacher_that_fails_costs_its_rollout(engine: Engine) -> None:
    """On the caller's loop as well, whatever it raises; the time limit holds, too."""
    errors: list[Callable[[], BaseException]] = [SystemExit, asyncio.CancelledError, KeyError]

    async def teacher(request: GuidanceRequest) -> str:
        if request.rollout_idx == 3:
            await asyncio.sleep(60)
        raise errors[request.rollout_idx]()

    async def run() -> list[Rollout]:
        options = type(OPTIONS)(**(vars(OPTIONS) | {"guidance_timeout_s": 0.2}))
        return await collect(astart(engine, teacher=teacher, options=options))

    rollouts = asyncio.run(run())
    assert {r.end_reason for r in rollouts} == {"guidance_failed"}
    assert {(r.rollout_idx, r.failure) for r in rollouts} == {
        (0, "exception"),
        (1, "exception"),
        (2, "exception"),
        (3, "timeout"),
    }
    assert_nothing_stays(engine)


def test_a_local_teacher(engine: Engine, teacher_folder: Path) -> None:
    """Its engine runs on the thread of the student's, also right after a cancelled call."""
    teacher = local_teacher(teacher_folder)
    expected = outcome(start(engine, teacher=teacher))

    async def run() -> list[Rollout]:
        async with aclosing(astart(engine, teacher=teacher)) as rollouts:
            await anext(rollouts)
        assert_idle(engine)
        return await collect(astart(engine, teacher=teacher))

    assert outcome(iter(asyncio.run(run()))) == expected
    assert not teacher.engine.has_work


def test_an_endpoint_on_many_loops(engine: Engine, server: Server) -> None:
    """Training's loop, the caller's, two in a row and two at once: every call is answered."""
    teacher = EndpointTeacher(
        server.url, model="m", prompt=TeacherPrompt(), max_concurrency=2, max_retries=0
    )

    async def ask() -> None:
        texts.extend(await asyncio.gather(*(hear(teacher, i) for i in range(6))))

    texts: list[str] = []
    expected = outcome(start(engine, teacher=teacher))
    for _ in range(2):
        assert outcome(iter(asyncio.run(collect(astart(engine, teacher=teacher))))) == expected
    threads = [threading.Thread(target=lambda: asyncio.run(ask())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == ["Check the sum."] * 12
    assert outcome(start(engine, teacher=teacher)) == expected
    assert not teacher.failures
    assert server.most_in_flight <= 4

    asyncio.run(teacher.aclose())


def test_a_loop_that_ends_without_closing(engine: Engine) -> None:
    """The thread notices that nobody can take its rollouts, and gives the engine back."""
    loop = asyncio.new_event_loop()

    async def begin() -> AsyncGenerator[Rollout, None]:
        rollouts = astart(engine, grader=lambda _text, q: q.question_idx == 0)
        await anext(rollouts)
        return rollouts

    rollouts = loop.run_until_complete(begin())
    loop.close()
    deadline = time.monotonic() + 30
    while engine.has_work or any("socpo-rollouts" in t.name for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert_nothing_stays(engine)
    del rollouts


def test_the_callers_context_is_kept(engine: Engine) -> None:
    """A teacher on the caller's loop sees the caller's context variables."""
    trace_id: ContextVar[str] = ContextVar("trace_id", default="none")
    seen: set[str] = set()

    async def teacher(_: GuidanceRequest) -> str:
        seen.add(trace_id.get())
        return "look again"

    async def run() -> None:
        trace_id.set("mine")
        await collect(astart(engine, teacher=teacher))

    asyncio.run(run())
    assert seen == {"mine"}


def test_the_arguments_are_those_of_the_other() -> None:
    assert signature(arollouts).parameters == signature(socratic_rollouts).parameters
