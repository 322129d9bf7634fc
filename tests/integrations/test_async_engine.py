"""AsyncEngine: exact tokens and prefills by request_id, under concurrency, cancels and errors."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from socpo_fast import AsyncEngine, SamplingParams
from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.model import Decoder
from socpo_fast.types import Attempt
from tests.helpers.tiny import VOCAB, bits, expected_attempt, make_engine, make_student

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=8, eos_ids=(0,))
PROMPT = list(range(3, 14))


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def assert_idle(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.stats.pages_free == engine.stats.pages_total


def serve(engine: Engine, play: Callable[[AsyncEngine], Awaitable[Any]], **options: float) -> Any:
    """Plays with an AsyncEngine on an event loop; afterwards the engine must be as new."""

    async def run() -> Any:
        async with AsyncEngine(engine, **options) as server:
            result = await play(server)
        assert_idle(engine)
        return result

    return asyncio.run(run())


async def num_prefilled(server: AsyncEngine, engine: Engine) -> int:
    return await server.run(lambda: engine.stats.prefill_tokens)


async def assert_all_free(server: AsyncEngine, engine: Engine) -> None:
    stats = await server.run(lambda: engine.stats)
    assert stats.pages_free == stats.pages_total


@pytest.mark.parametrize(
    ("num_common", "num_new", "expected_prefill"),
    [
        (19, 2, 3),  # the whole row; its last token was sampled, but never forwarded
        (19, 0, 1),  # one token must be left to prefill
        (18, 0, 1),
        (16, 2, 2),  # cut in the attempt
        (11, 1, 1),
        (4, 3, 3),  # cut in the prompt, as a template that rewrites the history does
        (1, 1, 1),
        (0, 3, 3),  # submitted anew
    ],
)
def test_follow_ups_prefill_what_is_new(
    student: Decoder, num_common: int, num_new: int, expected_prefill: int
) -> None:
    """Exact counts; the tokens are those of an engine that prefills the whole context."""
    engine = make_engine(student)
    params = replace(PARAMS, ignore_eos=True)

    async def play(server: AsyncEngine) -> None:
        first = await server.generate("a", PROMPT, params)
        assert await num_prefilled(server, engine) == len(PROMPT)
        row = PROMPT + first.token_ids
        # Tokens that differ from those of the row.
        new = [(token_id + 1) % VOCAB for token_id in [*row, 5, 6][num_common:][:num_new]]
        context = row[:num_common] + new
        second = await server.generate("a", context, params)
        assert await num_prefilled(server, engine) == len(PROMPT) + expected_prefill
        assert (second.key == first.key) == (num_common > 0)
        assert second.attempt_idx == (1 if num_common else 0)
        for ids, attempt in ((PROMPT, first), (context, second)):
            assert bits(attempt) == expected_attempt(
                student, ids, params, key=attempt.key, attempt_idx=attempt.attempt_idx
            )
        assert (await server.run(lambda: engine.stats)).pages_free < engine.stats.pages_total
        server.end("a")
        await assert_all_free(server, engine)

    serve(engine, play)


async def play_episode(server: AsyncEngine, name: str, num_turns: int = 3) -> list[tuple]:
    """Plays an agent's episode; returns (context, params, attempt) of every turn."""
    rng = random.Random(name)
    context = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(2, 20))]
    turns = []
    for _ in range(num_turns):
        params = replace(PARAMS, max_new_tokens=rng.randrange(1, 9))
        attempt = await server.generate(name, context, params)
        turns.append((context, params, attempt))
        row = context + attempt.token_ids
        await asyncio.sleep(rng.random() * 0.002)
        context = [*row[: rng.randrange(1, len(row) + 1)], rng.randrange(1, VOCAB)]
    return turns


def check_episodes(student: Decoder, episodes: list[list[tuple]]) -> None:
    for turns in episodes:
        for context, params, attempt in turns:
            alone = expected_attempt(
                student, context, params, key=attempt.key, attempt_idx=attempt.attempt_idx
            )
            assert bits(attempt) == alone
        context, params, attempt = turns[0]
        [[same]] = make_engine(student).generate([context], params, keys=[attempt.key])
        assert bits(attempt) == bits(same)
    keys = [attempt.key for turns in episodes for _, _, attempt in turns if not attempt.attempt_idx]
    assert len(set(keys)) == len(keys) >= len(episodes)


@pytest.mark.parametrize("num_pages", [200, 24])
def test_many_requests_in_one_batch(student: Decoder, num_pages: int) -> None:
    """Tokens do not depend on what runs beside them, nor on preemption, nor on kept pages."""
    engine = make_engine(student, num_pages=num_pages)
    num_steps = [0]
    step = engine.step

    def counted() -> list[Attempt]:
        num_steps[0] += 1
        return step()

    engine.step = counted  # type: ignore[method-assign]

    async def play(server: AsyncEngine) -> list[list[tuple]]:
        return await asyncio.gather(*(play_episode(server, str(i)) for i in range(20)))

    episodes = serve(engine, play)
    check_episodes(student, episodes)
    num_tokens = sum(attempt.num_tokens for turns in episodes for _, _, attempt in turns)
    if num_pages == 200:
        assert num_steps[0] < num_tokens / 3, "requests are batched"


def test_many_threads_and_loops(student: Decoder) -> None:
    engine = make_engine(student)
    threads: set[int] = set()
    step = engine.step

    def recorded() -> list[Attempt]:
        threads.add(threading.get_ident())
        return step()

    engine.step = recorded  # type: ignore[method-assign]
    server = AsyncEngine(engine)
    episodes: list[list[tuple]] = []

    async def play(idx: int) -> None:
        episodes.extend(
            await asyncio.gather(*(play_episode(server, f"{idx} {i}") for i in range(5)))
        )

    workers = [threading.Thread(target=lambda idx=idx: asyncio.run(play(idx))) for idx in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(episodes) == 20
    check_episodes(student, episodes)
    asyncio.run(server.aclose())
    assert_idle(engine)
    assert len(threads) == 1 and threading.get_ident() not in threads


@pytest.mark.parametrize("seed", range(6))
def test_cancels_at_any_moment(student: Decoder, seed: int) -> None:
    """A cancelled request gives its pages back; all others get the tokens they get alone."""
    rng = random.Random(seed)
    engine = make_engine(student, num_pages=60)

    async def play(server: AsyncEngine) -> list[list[tuple]]:
        names = [f"{seed} {i}" for i in range(24)]
        tasks = {name: asyncio.create_task(play_episode(server, name, 4)) for name in names}
        for name in names[:12]:
            await asyncio.sleep(rng.random() * 0.004)
            for _ in range(rng.randrange(1, 3)):
                tasks[name].cancel()
        done, _ = await asyncio.wait(tasks.values(), timeout=60)
        assert len(done) == 24
        whole = [task.result() for task in done if not task.cancelled()]
        # One that was cancelled between two turns still waits for its follow-up.
        for name in names:
            server.end(name)
        await assert_all_free(server, engine)
        return whole

    check_episodes(student, serve(engine, play))


def test_a_cancelled_await_frees_its_pages(student: Decoder) -> None:
    """In flight, as a follow-up, and before it has started; its name can be used again at once."""
    engine = make_engine(student)
    long = replace(PARAMS, max_new_tokens=100, ignore_eos=True)

    async def play(server: AsyncEngine) -> None:
        for _ in range(2):
            for delay_s in (0.0, 0.005):
                await server.generate("a", PROMPT, PARAMS)
                task = asyncio.create_task(server.generate("a", [*PROMPT, 5], long))
                await asyncio.sleep(delay_s)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                again = await server.generate("a", PROMPT, PARAMS)
                assert again.attempt_idx == 0
                server.end("a")
                await assert_all_free(server, engine)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await server.generate("b", PROMPT, long)
        await assert_all_free(server, engine)

    serve(engine, play)


def test_refusals_leave_the_request_as_it_was(student: Decoder) -> None:
    engine = make_engine(student)
    long = replace(PARAMS, max_new_tokens=100, ignore_eos=True)

    async def play(server: AsyncEngine) -> None:
        with pytest.raises(ValueError, match=r"AsyncEngine: params.n must be 1, got 2"):
            await server.generate("a", PROMPT, replace(PARAMS, n=2))
        first = await server.generate("a", PROMPT, PARAMS)
        row = PROMPT + first.token_ids
        for bad in ([], [VOCAB], [*row, -1], [*row, *[3] * 200]):
            with pytest.raises(ValueError, match="(submit|resume): (token ids|prompt)"):
                await server.generate("a", bad, PARAMS)
        task = asyncio.create_task(server.generate("b", PROMPT, long))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="request_id must be one that is not in flight, got"):
            await server.generate("b", PROMPT, PARAMS)
        with pytest.raises(ValueError, match="thread must be that of the arollouts or AsyncEngine"):
            engine.step()
        assert (await task).num_tokens == 100
        before = await num_prefilled(server, engine)
        second = await server.generate("a", [*row, 4], PARAMS)
        assert second.attempt_idx == 1 and await num_prefilled(server, engine) == before + 2
        server.end("unknown")

    serve(engine, play)


def test_idle_requests_are_ended(student: Decoder) -> None:
    engine = make_engine(student)

    async def play(server: AsyncEngine) -> None:
        for name in "abc":
            await server.generate(name, PROMPT, PARAMS)
        held = await server.run(lambda: engine.stats.pages_free)
        await asyncio.sleep(0.3)
        first = await server.generate("d", PROMPT, PARAMS)
        server.end("d")
        stats = await server.run(lambda: engine.stats)
        assert held < stats.pages_free == stats.pages_total
        again = await server.generate("a", PROMPT, PARAMS)
        assert again.attempt_idx == 0 and again.key != first.key

    serve(engine, play, max_idle_s=0.2)


@pytest.mark.parametrize("number", [1, 3, 9])
def test_a_failed_step_reaches_all(student: Decoder, number: int, monkeypatch: Any) -> None:
    """Afterwards the engine is as new, and requests start anew."""
    engine = make_engine(student)
    forward = Runner.forward
    num_calls = [0]

    def failing(runner: Runner, plan: Any) -> Any:
        num_calls[0] += 1
        if num_calls[0] == number:
            raise torch.OutOfMemoryError("no memory")
        return forward(runner, plan)

    async def play(server: AsyncEngine) -> list[list[tuple]]:
        params = replace(PARAMS, ignore_eos=True, max_new_tokens=20)
        kept = await server.generate("kept", PROMPT, PARAMS)
        monkeypatch.setattr(Runner, "forward", failing)
        errors = await asyncio.gather(
            *(server.generate(str(i), PROMPT[i:], params) for i in range(5)),
            return_exceptions=True,
        )
        assert len({id(error) for error in errors}) == 5
        for error in errors:
            assert isinstance(error, RuntimeError)
            assert "got a failed step, OutOfMemoryError: no memory; ask again" in str(error)
            assert isinstance(error.__cause__, torch.OutOfMemoryError)
        await assert_all_free(server, engine)
        again = await server.generate("kept", [*PROMPT, *kept.token_ids, 4], PARAMS)
        assert again.attempt_idx == 0
        return await asyncio.gather(*(play_episode(server, str(i)) for i in range(5)))

    check_episodes(student, serve(engine, play))


def test_new_weights_between_two_steps(student: Decoder) -> None:
    """Requests in flight and kept ones go on; KV of the old weights is recomputed."""
    old = make_student(0)
    new = make_student(1)
    engine = make_engine(old)

    async def play(server: AsyncEngine) -> None:
        first = await server.generate("a", PROMPT, PARAMS)
        task = asyncio.create_task(
            server.generate("b", PROMPT, replace(PARAMS, max_new_tokens=90, ignore_eos=True))
        )
        await asyncio.sleep(0.01)

        def copy() -> None:
            with torch.no_grad():
                for mine, theirs in zip(old.parameters(), new.parameters(), strict=True):
                    mine.copy_(theirs)
            engine.bump_policy_version()

        await server.run(copy)
        context = [*PROMPT, *first.token_ids, 5]
        second = await server.generate("a", context, PARAMS)
        alone = expected_attempt(new, context, PARAMS, key=second.key, attempt_idx=1)
        assert bits(second) == alone
        assert (first.policy_version, second.policy_version) == (0, 1)
        assert (await task).num_tokens == 90
        await server.run(engine.update_weights)
        third = await server.generate("c", PROMPT, PARAMS)
        assert third.policy_version == 2
        with pytest.raises(ZeroDivisionError):
            await server.run(lambda: 1 / 0)

    serve(engine, play)


def test_one_that_is_dropped_gives_all_back(student: Decoder) -> None:
    """Without aclose, the kept pages and keys of finished requests are given back as well."""
    engine = make_engine(student)

    asyncio.run(AsyncEngine(engine).generate("kept", PROMPT, PARAMS))
    deadline = time.monotonic() + 10
    while engine.stats.pages_free < engine.stats.pages_total:  # the thread may hold its last job
        gc.collect()
        assert time.monotonic() < deadline


def test_closing_answers_everybody(student: Decoder) -> None:
    engine = make_engine(student)
    long = replace(PARAMS, max_new_tokens=100, ignore_eos=True)

    async def run() -> None:
        server = AsyncEngine(engine)
        await server.generate("kept", PROMPT, PARAMS)
        tasks = [asyncio.create_task(server.generate(str(i), PROMPT, long)) for i in range(4)]
        await asyncio.sleep(0.005)
        server.end("0")
        await asyncio.gather(server.aclose(), server.aclose())
        assert_idle(engine)
        for task in tasks:
            with pytest.raises(RuntimeError, match="got end or aclose; ask again|closed one"):
                await task
        with pytest.raises(RuntimeError, match="AsyncEngine: must be open, got a closed one"):
            await server.generate("a", PROMPT, PARAMS)
        server.end("kept")
        await server.aclose()
        # The engine belongs to the caller again.
        assert len(engine.generate([PROMPT], PARAMS)) == 1

    asyncio.run(run())
    deadline = time.monotonic() + 10
    while any("socpo-engine" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
