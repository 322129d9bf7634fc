"""Checks the keys of noise: each is in flight once at a time, and calls without keys get new ones.

A key is free again when every rollout under it is released or cancelled.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from socpo_fast.types import SamplingParams
from tests.helpers.tiny import bits, drain, make_engine, make_student

PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=6, eos_ids=(3,), seed=5)
PROMPT = [5, 7, 9, 11, 13]
KEY = (4, 2)
REFUSED = (
    r"submit: key must have no rollout in flight, got \(4, 2\) with 3; release or cancel them first"
)


def test_a_key_in_flight_is_refused() -> None:
    """A key is refused while its prompt waits, while it runs, and while its attempts are pinned."""
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
    engine.submit(PROMPT, PARAMS, key=(4, 3))  # another key is accepted
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
    """Cancelling frees the key of a queued prompt and of rollouts that were forked from it."""
    engine = make_engine(make_student(), token_budget=4)
    engine.submit(PROMPT, PARAMS, key=KEY)
    for _ in range(num_steps):
        engine.step()
    engine.cancel(KEY)
    engine.cancel(KEY)  # a second cancel does nothing
    engine.submit(PROMPT, PARAMS, key=KEY)
    assert [a.rollout_idx for a in drain(engine)] == [0, 1, 2]


def test_generate_with_a_key_in_flight_queues_none() -> None:
    """One refused key refuses all prompts of the call, so that none is left in the queue."""
    engine = make_engine(make_student())
    [pinned] = engine.generate([PROMPT], PARAMS, keys=[KEY], keep=True)
    with pytest.raises(
        ValueError, match=r"generate: key must have no rollout in flight, got \(4, 2\)"
    ):
        engine.generate([[1], [2]], PARAMS, keys=[(9, 9), KEY])
    assert not engine.has_work
    engine.release(pinned)
    engine.generate([[1], [2]], PARAMS, keys=[(9, 9), KEY])


def test_calls_without_keys_draw_fresh_noise() -> None:
    """Two calls without keys share no noise; a call with the key of an attempt draws it again."""
    engine = make_engine(make_student())
    params = replace(PARAMS, max_new_tokens=12, ignore_eos=True)
    first = engine.generate([PROMPT], params)
    second = engine.generate([PROMPT], params)
    token_ids = [tuple(attempt.token_ids) for [group] in (first, second) for attempt in group]
    assert len(set(token_ids)) == 6
    keys = [attempt.key for [group] in (first, second) for attempt in group]
    # The batch of fresh keys is a count, not random, so a program that runs twice draws the same.
    assert keys[3].batch == keys[0].batch + 1 > 2**40
    [again] = engine.generate([PROMPT], params, keys=[tuple(keys[0])])
    assert [bits(a) for a in again] == [bits(a) for a in first[0]]


@pytest.mark.parametrize("key", [(1, 2, 3), (1.5, 2), (2**63, 0), ("a", 0)])
def test_a_key_is_two_integers(key: tuple) -> None:
    """A wrong key is refused at once; in the middle of a step it would break the engine."""
    engine = make_engine(make_student())
    with pytest.raises(ValueError, match="submit: key must be two 64-bit integers"):
        engine.submit(PROMPT, PARAMS, key=key)
    with pytest.raises(ValueError, match="generate: key must be two 64-bit integers"):
        engine.generate([PROMPT], PARAMS, keys=[key])
    assert not engine.has_work
    assert (
        len(engine.generate([PROMPT], PARAMS, keys=[[1, 2]])[0]) == 3
    )  # a list of two integers is accepted
