"""Checks keep_prefix: a common start of prompts is prefilled once and changes no token.

With pages of four tokens, PREFIX fills three pages and half of a fourth. Prompts share full pages:

    prefix   | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 14
    prompt      shared    shared      shared     13 14 20+q 3  (prefilled again)
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder
from socpo_fast.types import SamplingParams
from tests.helpers.tiny import bits, drain, generate_same, make_engine, make_student

PREFIX = list(range(1, 15))
PROMPTS = [[*PREFIX, 20 + q, 3] for q in range(5)]
PARAMS = SamplingParams(n=2, temperature=1.0, max_new_tokens=9, eos_ids=(), ignore_eos=True, seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def prefilled(engine: Engine, prompts: list[list[int]]) -> tuple[int, list[list[tuple]]]:
    """Returns the number of tokens prefilled for the prompts, and the attempts drawn after them."""
    old_prefill_tokens = engine.stats.prefill_tokens
    groups = generate_same(engine, prompts, PARAMS)
    return engine.stats.prefill_tokens - old_prefill_tokens, [
        list(map(bits, group)) for group in groups
    ]


@pytest.mark.parametrize("tokens_per_sync", [1, 4])
def test_whole_pages_are_prefilled_once(student: Decoder, tokens_per_sync: int) -> None:
    engine = make_engine(student, tokens_per_sync=tokens_per_sync)
    num_unshared, expected = prefilled(engine, PROMPTS)
    assert num_unshared == 5 * 16
    engine.keep_prefix(PREFIX)
    assert engine.stats.prefill_tokens == num_unshared + 14
    engine.keep_prefix(PREFIX)
    assert engine.stats.prefill_tokens == num_unshared + 14, "kept, not computed again"
    assert prefilled(engine, PROMPTS) == (5 * (16 - 12), expected)
    assert engine.stats.pages_total - engine.stats.pages_free == 4


def test_other_prompts_share_nothing(student: Decoder) -> None:
    """A prompt that starts differently, or has no token after its full pages, is prefilled whole.

    The last prompt token must be forwarded to sample from it, so a prompt of exactly three pages
    cannot share all of them.
    """
    engine = make_engine(student)
    prompts = [[7, *PREFIX], PREFIX[:12], PREFIX[:3]]
    num_unshared, expected = prefilled(engine, prompts)
    engine.keep_prefix(PREFIX)
    num_tokens, actual = prefilled(engine, prompts)
    assert actual == expected
    assert num_tokens == num_unshared, (
        "12 tokens are whole pages, of which one must be left to forward"
    )


def test_prefix_is_preempted_and_recomputed(student: Decoder) -> None:
    """Sequences that need its pages take them; the next keep_prefix computes it again."""
    engine = make_engine(student, num_pages=14)
    engine.keep_prefix(PREFIX)
    expected = [list(map(bits, g)) for g in generate_same(make_engine(student), PROMPTS, PARAMS)]
    assert prefilled(engine, PROMPTS)[1] == expected
    assert engine.stats.preemptions > 0 and engine.stats.pages_free == 14
    engine.keep_prefix(PREFIX)
    assert engine.stats.pages_free == 10
    # Only the new prefix is pinned. The preempted one, which has no pages, is not kept beside it.
    with pytest.raises(ValueError, match="must be none, got 1;"), engine.lend_memory():
        pass


def test_new_weights_and_reset_drop_the_prefix(student: Decoder) -> None:
    trained = make_student()
    engine = make_engine(trained)
    engine.keep_prefix(PREFIX)
    trained.load_state_dict(make_student(1).state_dict())
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


def test_group_forks_share_the_prefix_pages(student: Decoder) -> None:
    """Eight rollouts copy the prompt's last page but hold the prefix's pages by reference.

    So the first page has nine references: theirs, and that of the prefix itself.
    """
    engine = make_engine(student)
    engine.keep_prefix(PREFIX)
    engine.submit(PROMPTS[0], replace(PARAMS, n=8), key=(0, 0))
    engine.step()
    first_pages = {tuple(s.pages[:3]) for s in engine.scheduler.running}
    assert len(first_pages) == 1 and engine.pool.ref_count[next(iter(first_pages))[0]] == 9
    engine.release(drain(engine))
