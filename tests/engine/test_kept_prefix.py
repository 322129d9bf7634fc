"""What many prompts begin with is prefilled once, as long as there is room; tokens are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder
from socpo_fast.types import SamplingParams
from tests.helpers.tiny import bits, drain, generate_same, make_engine, make_student

PREFIX = list(range(1, 15))  # three pages of four tokens and a half
PROMPTS = [[*PREFIX, 20 + q, 3] for q in range(5)]
PARAMS = SamplingParams(n=2, temperature=1.0, max_new_tokens=9, eos_ids=(), ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def prefilled(engine: Engine, prompts: list[list[int]]) -> tuple[int, list[list[tuple]]]:
    """How many tokens were prefilled for the prompts, and what was drawn behind them."""
    before = engine.stats.prefill_tokens
    groups = generate_same(engine, prompts, PARAMS)
    return engine.stats.prefill_tokens - before, [list(map(bits, group)) for group in groups]


@pytest.mark.parametrize("tokens_per_sync", [1, 4])
def test_whole_pages_are_prefilled_once(student: Decoder, tokens_per_sync: int) -> None:
    engine = make_engine(student, tokens_per_sync=tokens_per_sync)
    whole, expected = prefilled(engine, PROMPTS)
    assert whole == 5 * 16
    engine.keep_prefix(PREFIX)
    assert engine.stats.prefill_tokens == whole + 14
    engine.keep_prefix(PREFIX)
    assert engine.stats.prefill_tokens == whole + 14, "kept, not computed again"
    assert prefilled(engine, PROMPTS) == (5 * (16 - 12), expected)
    assert engine.stats.pages_total - engine.stats.pages_free == 4


def test_other_prompts_share_nothing(student: Decoder) -> None:
    engine = make_engine(student)
    others = [[7, *PREFIX], PREFIX[:12], PREFIX[:3]]
    whole, expected = prefilled(engine, others)
    engine.keep_prefix(PREFIX)
    num_tokens, drawn = prefilled(engine, others)
    assert drawn == expected
    assert num_tokens == whole, "12 tokens are whole pages, of which one must be left to forward"


def test_a_prefix_gives_way_and_comes_back(student: Decoder) -> None:
    """Sequences that need the room take its pages; the next keep_prefix computes it again."""
    engine = make_engine(student, num_pages=14)
    engine.keep_prefix(PREFIX)
    expected = [list(map(bits, g)) for g in generate_same(make_engine(student), PROMPTS, PARAMS)]
    assert prefilled(engine, PROMPTS)[1] == expected
    assert engine.stats.preemptions > 0 and engine.stats.pages_free == 14
    engine.keep_prefix(PREFIX)
    assert engine.stats.pages_free == 10
    assert len(engine._scheduler.pinned) == 1, "the one before is not kept beside it"


def test_new_weights_and_a_reset_end_it(student: Decoder) -> None:
    own = make_student()
    engine = make_engine(own)
    engine.keep_prefix(PREFIX)
    own.load_state_dict(make_student(1).state_dict())
    engine.bump_policy_version()
    expected = [
        list(map(bits, g)) for g in generate_same(make_engine(make_student(1)), PROMPTS, PARAMS)
    ]
    assert prefilled(engine, PROMPTS) == (5 * 16, expected)
    engine.keep_prefix(PREFIX)
    assert prefilled(engine, PROMPTS) == (5 * 4, expected)
    engine.reset()
    assert engine.stats.pages_free == engine.stats.pages_total
    assert prefilled(engine, PROMPTS) == (5 * 16, expected)


def test_a_group_is_forked_behind_it(student: Decoder) -> None:
    """The partial page of the prompt is copied for each of eight rollouts, the prefix's pages are
    not.
    """
    engine = make_engine(student)
    engine.keep_prefix(PREFIX)
    engine.submit(PROMPTS[0], replace(PARAMS, n=8), key=(0, 0))
    engine.step()
    first_pages = {tuple(s.pages[:3]) for s in engine._scheduler.running}
    assert len(first_pages) == 1 and engine._pool.ref_count[next(iter(first_pages))[0]] == 9
    engine.release(drain(engine))
