"""Keys name noise: one is taken once at a time, a call without keys gets fresh ones, and reset frees them all."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from socpo_fast.engine import Engine
from socpo_fast.engine import engine as engine_module
from socpo_fast.engine.runner import Runner
from socpo_fast.types import Attempt, SamplingParams
from tests.engine.tiny import bits, drain, generate_same, make_engine, make_student, untouched

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=6, eos_ids=(3,), seed=5)
PROMPT = [5, 7, 9, 11, 13]
KEY = (4, 2)
REFUSED = r"submit: key must have no rollout in flight, got \(4, 2\) with 3; release or cancel them first"


def test_a_key_in_flight_is_refused() -> None:
    """While it waits, while it runs, and while its attempts are kept for a second one."""
    engine = make_engine(make_student())
    engine.submit(PROMPT, PARAMS, key=KEY)
    with pytest.raises(ValueError, match=REFUSED):
        engine.submit(PROMPT, PARAMS, key=KEY)
    engine.step()
    with pytest.raises(ValueError, match=REFUSED):
        engine.submit([8], PARAMS, key=KEY)
    attempts = drain(engine)
    with pytest.raises(ValueError, match=REFUSED):
        engine.submit(PROMPT, PARAMS, key=KEY)
    engine.submit(PROMPT, PARAMS, key=(4, 3))  # another one is not concerned
    assert len(drain(engine)) == 3
    engine.release(attempts[:2])
    with pytest.raises(ValueError, match=r"got \(4, 2\) with 1;"):
        engine.submit(PROMPT, PARAMS, key=KEY)
    engine.resume(attempts[2], [4, 6], replace(PARAMS, n=1), kept_tokens=len(PROMPT))
    with pytest.raises(ValueError, match=r"got \(4, 2\) with 1;"):
        engine.submit(PROMPT, PARAMS, key=KEY)
    engine.release(drain(engine))
    engine.submit(PROMPT, PARAMS, key=KEY)
    assert [bits(a) for a in drain(engine)] == [bits(a) for a in attempts]


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_cancelled_key_is_free(num_steps: int) -> None:
    """Queued whole, or torn apart into rollouts."""
    engine = make_engine(make_student(), token_budget=4)
    engine.submit(PROMPT, PARAMS, key=KEY)
    for _ in range(num_steps):
        engine.step()
    engine.cancel(KEY)
    engine.cancel(KEY)  # twice is once
    engine.submit(PROMPT, PARAMS, key=KEY)
    assert [a.rollout_idx for a in drain(engine)] == [0, 1, 2]


def test_generate_refuses_a_key_in_flight_as_a_whole() -> None:
    engine = make_engine(make_student())
    [kept] = engine.generate([PROMPT], PARAMS, keys=[KEY], keep=True)
    with pytest.raises(ValueError, match=r"generate: key must have no rollout in flight, got \(4, 2\)"):
        engine.generate([[1], [2]], PARAMS, keys=[(9, 9), KEY])
    assert not engine.has_work
    engine.release(kept)
    engine.generate([[1], [2]], PARAMS, keys=[(9, 9), KEY])


def test_calls_without_keys_draw_fresh_noise() -> None:
    """No two calls share it; under a key of one's own the tokens come again."""
    engine = make_engine(make_student())
    params = replace(PARAMS, max_new_tokens=12, ignore_eos=True)
    first, second = engine.generate([PROMPT], params), engine.generate([PROMPT], params)
    drawn = [tuple(attempt.token_ids) for [group] in (first, second) for attempt in group]
    assert len(set(drawn)) == 6
    keys = [attempt.key for [group] in (first, second) for attempt in group]
    assert keys[3].batch == keys[0].batch + 1 > 2**40  # a count, so a program run twice draws the same
    [again] = engine.generate([PROMPT], params, keys=[tuple(keys[0])])
    assert [bits(a) for a in again] == [bits(a) for a in first[0]]


class Stopped(BaseException):
    """Ctrl-C, a signal, or no memory, in the middle of a step."""


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("where", ["forward", "draw"])
def test_generate_that_is_stopped_leaves_nothing(monkeypatch: pytest.MonkeyPatch, where: str, after: int) -> None:
    engine = make_engine(make_student(), num_pages=30)
    owner: Any = engine_module if where == "draw" else Runner
    name = "sample_tokens" if where == "draw" else "forward"
    real, calls = getattr(owner, name), count(1)

    def failing(*given: Any, **options: Any) -> Any:
        if next(calls) == after:
            raise Stopped
        return real(*given, **options)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(Stopped):
        generate_same(engine, [PROMPT, [8]], PARAMS)
    assert_as_new(engine)


def assert_as_new(engine: Engine) -> None:
    """Nothing queued, held or remembered; what is drawn next is what a fresh engine draws."""
    assert not engine.has_work
    assert engine.stats.pages_free == engine.stats.pages_total
    groups = generate_same(engine, [PROMPT, [8]], PARAMS)
    for question, (prompt, group) in enumerate(zip([PROMPT, [8]], groups, strict=True)):
        for idx, attempt in enumerate(group):
            expected = untouched(engine.student, prompt, PARAMS, key=(0, question), rollout_idx=idx)
            assert bits(attempt) == expected


def test_reset_at_any_moment() -> None:
    """Between any two steps of any history: waiting, running, forked, preempted, pinned and resumed attempts."""
    student, rng = make_student(), random.Random(0)
    engine = make_engine(student, num_pages=14, max_running=4, token_budget=8)
    pages = engine.stats.pages_total
    kinds: set[str] = set()
    for _ in range(60):
        finished: list[Attempt] = []
        for _ in range(rng.randrange(1, 25)):
            kind = rng.choice(["submit", "step", "step", "step", *["resume"] * bool(finished)])
            if kind == "submit":
                prompt = [rng.randrange(37) for _ in range(rng.randrange(1, 12))]
                engine.submit(prompt, PARAMS, key=(1, rng.randrange(10**9)))
            elif kind == "step":
                finished += engine.step()
            else:
                attempt = finished.pop(rng.randrange(len(finished)))
                engine.resume(attempt, [1, 2], replace(PARAMS, n=1), kept_tokens=1)
            kinds.add(kind)
        before = engine.stats
        engine.reset()
        assert not engine.has_work and engine.stats.pages_free == pages
        assert engine.stats.prefill_tokens == before.prefill_tokens  # counts go on
        for attempt in finished:
            with pytest.raises(ValueError, match="resume: attempt must be finished"):
                engine.resume(attempt, [1], PARAMS, kept_tokens=1)
    assert kinds == {"submit", "step", "resume"} and engine.stats.preemptions > 0
    assert_as_new(engine)


def test_reset_keeps_weights_version_and_storage() -> None:
    engine = make_engine(make_student())
    engine.bump_policy_version()
    generate_same(engine, [PROMPT], PARAMS, keep=True)
    engine.reset()
    assert engine.policy_version == 1
    assert_as_new(engine)
