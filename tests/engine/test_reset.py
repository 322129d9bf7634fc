"""Checks that reset makes an engine as new, whatever was running and wherever it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.model import Decoder
from socpo_fast.types import SamplingParams
from tests.engine.test_storage import storage_of
from tests.helpers.interrupts import interrupted_at
from tests.helpers.tiny import bits, drain, keys_of, make_engine, make_student

PROMPTS = [[3, 5, 7], list(range(1, 20)), [9] * 8]
KEYS = keys_of(PROMPTS)
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=7, eos_ids=(), ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def draws(engine: Engine) -> list[tuple]:
    """Returns the attempts of all prompts, to be compared bitwise."""
    return [
        bits(attempt) for group in engine.generate(PROMPTS, PARAMS, keys=KEYS) for attempt in group
    ]


@contextmanager
def failing(student: Decoder, error: BaseException, *, at_call: int) -> Iterator[None]:
    """Makes the student's at_call-th forward within the block raise in its second layer."""
    num_calls = [0]

    def hook(_module: torch.nn.Module, _args: object) -> None:
        num_calls[0] += 1
        if num_calls[0] == at_call:
            raise error

    handle = student.layers[1].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("tokens_per_sync", [1, 4])
def test_reset_in_the_middle_of_everything(student: Decoder, tokens_per_sync: int) -> None:
    """Reset drops waiting, running, pinned and resumed sequences at once.

    The policy version, the counts of tokens and the memory addresses stay.
    """
    engine = make_engine(student, max_running=4, tokens_per_sync=tokens_per_sync)
    engine.policy_version = 7
    storage = storage_of(engine)
    expected = draws(engine)
    (group,) = engine.generate(PROMPTS[:1], PARAMS, keys=[(1, 0)], keep=True)
    engine.resume(group[0], [8], PARAMS, kept_tokens=4)
    for prompt, key in zip(PROMPTS, KEYS, strict=True):
        engine.submit(prompt, PARAMS, key=key)
    for _ in range(3):
        engine.step()
    old_stats = engine.stats
    engine.reset()
    new_stats = engine.stats
    assert not engine.has_work and engine.step() == []
    assert new_stats.pages_free == new_stats.pages_total
    counts = [(s.prefill_tokens, s.decode_tokens, s.preemptions) for s in (old_stats, new_stats)]
    assert counts[0] == counts[1]
    with pytest.raises(ValueError, match="resume: attempt must be finished, neither released nor"):
        engine.resume(group[1], [8], PARAMS, kept_tokens=4)
    engine.release(group)  # skipped: a page must not be freed twice
    assert draws(engine) == expected and engine.policy_version == 7
    assert storage_of(engine) == storage
    assert engine.stats.pages_free == engine.stats.pages_total


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_half_way(student: Decoder, error: BaseException) -> None:
    engine = make_engine(student, num_pages=24)
    expected = draws(engine)
    for prompt, key in zip(PROMPTS, KEYS, strict=True):
        engine.submit(prompt, PARAMS, key=key)
    with failing(student, error, at_call=3), pytest.raises(type(error)):
        drain(engine)
    engine.reset()
    assert engine.stats.pages_free == 24
    assert draws(engine) == expected


def test_generate_that_is_interrupted_leaves_nothing(student: Decoder) -> None:
    """An interrupt at any line of the engine leaves no page and no request behind.

    Some lines are between removing a sequence from one list and adding it to the next, or between
    allocating a page and storing it.
    """
    engine = make_engine(student, num_pages=24, max_running=4)
    expected = draws(engine)
    for keep in (False, True):
        with interrupted_at(-1) as num_lines:
            engine.generate(PROMPTS, PARAMS, keys=KEYS, keep=keep)
        engine.reset()
        total = num_lines[0]
        assert total > 2000
        for line in [*range(50, total, total // 60), total - 1, total]:
            with pytest.raises(KeyboardInterrupt), interrupted_at(line):
                engine.generate(PROMPTS, PARAMS, keys=KEYS, keep=keep)
            assert not engine.has_work
            assert engine.stats.pages_free == 24, f"stopped at line {line} of {total}"
    assert draws(engine) == expected


def test_a_failed_copy_leaves_the_attempt(
    student: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume that runs out of memory may be retried, and reads no page that was not copied."""
    expected = second_attempts(make_engine(student))
    engine = make_engine(student)
    group = engine.generate([PROMPTS[1]], PARAMS, keys=[(0, 0)], keep=True)[0]
    with monkeypatch.context() as patch:
        # A negative size makes torch raise a RuntimeError, as running out of memory does.
        patch.setattr(Runner, "copy_pages", lambda runner, copies: torch.empty(-1))
        with pytest.raises(RuntimeError):
            engine.resume(group[0], [8, 9], PARAMS, kept_tokens=18)
    assert not engine.has_work
    engine.resume(group[0], [8, 9], PARAMS, kept_tokens=18)
    assert [bits(attempt) for attempt in drain(engine)] == expected
    engine.cancel((0, 0))
    engine.reset()


def second_attempts(engine: Engine) -> list[tuple]:
    """Returns the attempt that resumes the first rollout of a group, cut within its prompt."""
    group = engine.generate([PROMPTS[1]], PARAMS, keys=[(0, 0)], keep=True)[0]
    engine.resume(group[0], [8, 9], PARAMS, kept_tokens=18)
    return [bits(attempt) for attempt in drain(engine)]
