"""However socratic_rollouts ends, it leaves nothing in the engine; the same call works again."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.engine import sequence as sequences
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sequence import Sequence
from socpo_fast.files import StopRequested
from socpo_fast.model import Decoder
from socpo_fast.model.config import ModelConfig
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.types import GuidanceRequest, Question, Rollout
from tests.helpers.scripted import PARAMS, TOKENIZER, question

QUESTIONS = [question(q, truth="impossible") for q in range(3)]
OPTIONS = RolloutOptions(group_size=4, max_attempts=3, guidance_limit=50, attempt_limit=10)


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=402,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
    student = Decoder(config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    return Engine(student, kv_cache_gib=0.002, page_size=16)


class Stopped(StopRequested):
    """A stop by a signal, which no handler on the way must take for a failure."""


def never(_text: str, _question: Question) -> bool:
    return False


def say(_request: GuidanceRequest) -> str:
    return "look again"


def failing_at(
    number: int, function: Callable[..., Any], error: BaseException
) -> Callable[..., Any]:
    """Wraps a function so that its call `number`, counted from 1, raises the error."""
    calls = count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return function(*args, **kwargs)

    return wrapped


def start(engine: Engine, **changes: Any) -> Iterator[Rollout]:
    settings = {
        "teacher": say,
        "grader": never,
        "params": PARAMS,
        "options": OPTIONS,
        "batch_idx": 7,
    }
    return socratic_rollouts(engine, TOKENIZER, QUESTIONS, **(settings | changes))


def outcome(rollouts: Iterator[Rollout]) -> list[Any]:
    in_order = sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))
    return [
        (r.end_reason, [(a.token_ids, a.logprobs.tolist()) for a in r.attempts]) for r in in_order
    ]


def assert_nothing_stays(engine: Engine) -> None:
    """Checks that the same call works again: a pinned attempt's key would be refused."""
    assert not engine.has_work
    assert engine.stats.pages_free == engine.stats.pages_total
    outcomes = outcome(start(engine))
    assert len(outcomes) == 12
    assert outcomes == outcome(start(Engine(engine.student, kv_cache_gib=0.002, page_size=16)))


@pytest.mark.parametrize("number", [1, 2, 7, 15, 30])
@pytest.mark.parametrize("error", [KeyError("no such answer"), Stopped()], ids=["error", "signal"])
def test_a_grader_that_raises(engine: Engine, number: int, error: BaseException) -> None:
    with pytest.raises(ValueError if isinstance(error, KeyError) else Stopped):
        list(start(engine, grader=failing_at(number, never, error)))
    assert_nothing_stays(engine)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (Runner, "forward", 1),
        (Runner, "forward", 20),
        (Runner, "copy_pages", 1),  # while the group of a prompt is forked
        # Other attempts of this step have been pinned by then, but no caller knows them.
        (sequences, "Attempt", 5),
        (Sequence, "append", 30),
    ],
)
@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), Stopped()], ids=["error", "signal"]
)
def test_a_step_that_raises(
    engine: Engine, owner: Any, name: str, number: int, error: BaseException, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(number, getattr(owner, name), error))
        with pytest.raises(type(error)):
            list(start(engine))
    assert_nothing_stays(engine)


@pytest.mark.parametrize("number", [1, 2, 9])
@pytest.mark.parametrize("name", ["submit", "resume"])
def test_an_engine_that_refuses(engine: Engine, name: str, number: int, monkeypatch: Any) -> None:
    if name == "submit" and number > len(QUESTIONS):
        number = len(QUESTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(engine, name, failing_at(number, getattr(engine, name), ValueError("no")))
        with pytest.raises(ValueError, match="^no$"):
            list(start(engine))
    assert_nothing_stays(engine)


@pytest.mark.parametrize("name", ["decode", "fit", "bridge_ids", "prompt_ids"])
def test_a_bridge_that_raises(engine: Engine, name: str, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Bridge, name, failing_at(3, getattr(Bridge, name), UnicodeError("torn")))
        with pytest.raises(UnicodeError, match="torn"):
            list(start(engine))
    assert_nothing_stays(engine)


@pytest.mark.parametrize("num_taken", [0, 1, 5])
@pytest.mark.parametrize("ending", ["closed", "forgotten"])
def test_a_caller_that_stops(engine: Engine, num_taken: int, ending: str) -> None:
    rollouts = start(engine)
    for _ in range(num_taken):
        next(rollouts)
    if ending == "closed":
        rollouts.close()  # type: ignore[attr-defined]
    del rollouts
    gc.collect()
    assert_nothing_stays(engine)


def test_closing_cancels_teacher_calls(engine: Engine) -> None:
    """A call of an async teacher that is in flight is cancelled."""
    started: list[str] = []
    cancelled: list[str] = []

    async def slow(request: GuidanceRequest) -> str:
        import asyncio

        started.append(request.question)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(request.question)
            raise
        return "too late"

    rollouts = start(engine, teacher=slow, grader=lambda text, q: q.question_idx == 0)
    assert next(rollouts).question_idx == 0
    deadline = time.monotonic() + 20
    while len(started) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    rollouts.close()  # type: ignore[attr-defined]
    while len(cancelled) < len(started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started and sorted(cancelled) == sorted(started)
    assert_nothing_stays(engine)


def test_a_teacher_that_raises_costs_its_rollout_only(engine: Engine) -> None:
    with pytest.warns(
        UserWarning, match=r"wrapped raised ZeroDivisionError: \(test_leaving_early.py"
    ):
        rollouts = list(start(engine, teacher=failing_at(2, say, ZeroDivisionError())))
    assert [rollout.end_reason for rollout in rollouts].count("guidance_failed") == 1
    assert_nothing_stays(engine)


def test_error_keeps_attempts_of_other_calls(engine: Engine) -> None:
    """An error of a grader releases attempts of its own call, and no others."""
    [[pinned]] = engine.generate([[5, 6, 7]], PARAMS, keys=[(1, 1)], keep=True)
    with pytest.raises(
        ValueError, match=r"on question \d: .*wrapped raised KeyError: \(test_leaving"
    ):
        list(start(engine, grader=failing_at(5, never, KeyError())))
    engine.resume(pinned, [8], PARAMS, kept_tokens=2)
    while engine.has_work:
        engine.release(engine.step())
    assert_nothing_stays(engine)


def test_a_batch_in_flight_is_refused(engine: Engine) -> None:
    [[pinned]] = engine.generate([[5, 6, 7]], PARAMS, keys=[(7, 2)], keep=True)
    with pytest.raises(
        ValueError, match=r"submit: key must have no rollout in flight, got \(7, 2\)"
    ):
        list(start(engine))
    engine.release([pinned])
    assert_nothing_stays(engine)
