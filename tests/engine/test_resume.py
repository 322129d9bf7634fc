"""Checks second attempts on the pages of the first: every cut, shared pages, and refusals.

With pages of four tokens, three rollouts of PROMPT share its three full pages. Each has its own
copy of the half page, and appends its six sampled tokens there:

    shared by all   | p p p p | p p p p | p p p p |
    of each rollout                               | p p s s | s s s s |

A cut keeps a prefix of this row. Behind it the second attempt prefills SUFFIX. It may never write
into a page that siblings hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.model import Decoder
from socpo_fast.types import Attempt, SamplingParams
from tests.helpers.tiny import (
    bits,
    drain,
    expected_attempt,
    generate_same,
    kept,
    make_engine,
    make_student,
)

PROMPT = list(range(1, 15))
SUFFIX = [30, 31, 32]
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=6, eos_ids=(), ignore_eos=True, seed=3)
# Sampled tokens kept: all (None and 6), four, none. A negative cut also drops tokens of the prompt:
# into the copied page, to its border, into shared pages and to their border, all but one token.
CUTS = [None, 6, 4, 0, -1, -2, -3, -6, -10, -13]


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def first_attempts(engine: Engine, params: SamplingParams = PARAMS) -> list[Attempt]:
    return generate_same(engine, [PROMPT], params, keep=True)[0]


def context_of(first: Attempt, cut: int | None) -> list[int]:
    """Returns the context of the second attempt: the row up to the cut, then SUFFIX."""
    row = PROMPT + first.token_ids
    return row[: len(row) if cut is None else len(PROMPT) + cut] + SUFFIX


@pytest.mark.parametrize("cut", CUTS)
def test_resume_equals_a_fresh_run_of_the_same_context(student: Decoder, cut: int | None) -> None:
    engine = make_engine(student)
    group = first_attempts(engine)
    old_prefill_tokens = engine.stats.prefill_tokens
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    (second,) = drain(engine)
    context = context_of(group[1], cut)
    # The last sampled token has no KV yet. If the cut keeps it, it is new, too.
    assert engine.stats.prefill_tokens - old_prefill_tokens == len(SUFFIX) + (cut in (None, 6)), (
        "only what is new is prefilled"
    )
    assert bits(second) == expected_attempt(student, context, PARAMS, rollout_idx=1, attempt_idx=1)
    assert (second.key, second.rollout_idx, second.attempt_idx) == (group[1].key, 1, 1)
    engine.release([*group, second])
    assert engine.stats.pages_free == engine.stats.pages_total


@pytest.mark.parametrize("cut", CUTS)
def test_greedy_resume_equals_submit(student: Decoder, cut: int | None) -> None:
    """Without noise, resuming equals submitting the same context as a new prompt."""
    params = replace(PARAMS, n=2, temperature=0.0)
    engine = make_engine(student)
    group = first_attempts(engine, params)
    engine.resume(group[0], SUFFIX, params, kept_tokens=kept(PROMPT, group[0], cut))
    fresh = generate_same(make_engine(student), [context_of(group[0], cut)], replace(params, n=1))[
        0
    ][0]
    assert bits(drain(engine)[0]) == bits(fresh)


@pytest.mark.parametrize("cut", [-1, -3, -6, -10, -13])
# With 9 pages the group just fits, so the pages of a pinned attempt are taken.
@pytest.mark.parametrize("num_pages", [200, 9])
def test_siblings_do_not_see_each_others_writes(student: Decoder, cut: int, num_pages: int) -> None:
    """Two siblings cut back into the prompt's shared pages at once, with different suffixes.

    Then the third resumes with everything it has, so also on the pages that they left.
    """
    engine = make_engine(student, num_pages=num_pages)
    group = first_attempts(engine)
    suffixes = [[20 + i] * 3 for i in range(3)]
    for attempt, suffix in zip(group[:2], suffixes, strict=False):
        engine.resume(attempt, suffix, PARAMS, kept_tokens=kept(PROMPT, attempt, cut))
    engine.step()
    num_kept = kept(PROMPT, group[2])
    engine.resume(group[2], suffixes[2], PARAMS, kept_tokens=num_kept)
    for i, second in enumerate(drain(engine)):
        kept_ids = PROMPT[:cut] if i < 2 else PROMPT + group[2].token_ids
        assert bits(second) == expected_attempt(
            student, kept_ids + suffixes[i], PARAMS, rollout_idx=i, attempt_idx=1
        )


def test_partial_page_recomputed_if_no_page_is_free(student: Decoder) -> None:
    """Where a shared page would have to be copied and none is free, its tokens are prefilled."""
    params = replace(PARAMS, max_new_tokens=1)
    engine = make_engine(student, num_pages=6)
    # Full pages and one sampled token, which has no KV: siblings hold nothing but shared pages.
    prompt = PROMPT[:12]
    group = generate_same(engine, [prompt], params, keep=True)[0]
    # Another prompt fills the other three pages.
    engine.generate([[1] * 9], replace(params, n=1), keys=[(1, 0)], keep=True)
    old_stats = engine.stats
    assert old_stats.pages_free == 0
    engine.resume(group[0], SUFFIX, params, kept_tokens=len(prompt) - 2)
    engine.resume(group[2], SUFFIX, params, kept_tokens=kept(prompt, group[2]))
    seconds = drain(engine)
    assert engine.stats.prefill_tokens - old_stats.prefill_tokens == (2 + len(SUFFIX)) + (
        1 + len(SUFFIX)
    )
    for second, kept_ids in zip(seconds, (prompt[:-2], prompt + group[2].token_ids), strict=True):
        indices = {"rollout_idx": second.rollout_idx, "attempt_idx": 1}
        assert bits(second) == expected_attempt(student, kept_ids + SUFFIX, params, **indices)


def test_a_sibling_still_running_does_not_see_a_write(student: Decoder) -> None:
    """One rollout ends early and resumes inside the prompt while its siblings still decode.

    They read the shared pages into which its suffix would be written.
    """
    params = replace(
        PARAMS, temperature=1.5, max_new_tokens=30, ignore_eos=False, eos_ids=tuple(range(0, 37, 5))
    )
    engine = make_engine(student)
    engine.submit(PROMPT, params, key=(0, 0))
    done: list[Attempt] = []
    while not done:
        done = engine.step()
    early = done[0]
    assert engine.has_work, "somebody must still run"
    engine.resume(early, SUFFIX, params, kept_tokens=len(PROMPT) - 9)
    for attempt in [early, *done[1:], *drain(engine)]:
        context = PROMPT if attempt.attempt_idx == 0 else PROMPT[:-9] + SUFFIX
        indices = {"rollout_idx": attempt.rollout_idx, "attempt_idx": attempt.attempt_idx}
        assert bits(attempt) == expected_attempt(student, context, params, **indices)


@pytest.mark.parametrize("cut", [None, 3, 0, -1, -6, -13])
@pytest.mark.parametrize("preempted", ["before it is resumed", "while it runs", "twice"])
def test_preempted_resume_is_recomputed(student: Decoder, cut: int | None, preempted: str) -> None:
    """Losing its pages before or after it is resumed changes nothing about a second attempt."""
    engine = make_engine(student, num_pages=8)
    group = first_attempts(engine, replace(PARAMS, n=2))
    other_params = replace(PARAMS, n=1, max_new_tokens=10)
    if preempted != "while it runs":
        engine.generate([list(range(22))], other_params, keys=[(1, 0)])  # takes all eight pages
        assert engine.stats.preemptions >= 2
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    if preempted != "before it is resumed":
        engine.step()
        engine.scheduler.preempt(engine.scheduler.running[-1])
    second = drain(engine)[0]
    assert bits(second) == expected_attempt(
        student, context_of(group[1], cut), PARAMS, rollout_idx=1, attempt_idx=1
    )


def test_back_over_several_bridges(student: Decoder) -> None:
    """A third attempt may cut behind the second and its bridge, into the first attempt."""
    engine = make_engine(student)
    group = first_attempts(engine)
    engine.resume(group[0], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[0]))
    (second,) = drain(engine)
    engine.resume(second, [33], PARAMS, kept_tokens=kept(PROMPT, group[0]) - 2)
    (third,) = drain(engine)
    context = PROMPT + group[0].token_ids[:-2] + [33]
    assert third.attempt_idx == 2
    assert bits(third) == expected_attempt(student, context, PARAMS, attempt_idx=2)


def weights(student: Decoder) -> Iterator[torch.Tensor]:
    return (parameter.data for parameter in student.parameters())


@pytest.mark.parametrize("cut", [None, 3, 0, -1, -6, -13])
def test_stale_pages_are_never_reused(cut: int | None) -> None:
    """If weights change between attempts, the second one prefills all of its context.

    It equals a fresh run with the new weights, since no page of the old ones is read.
    """
    student = make_student(0)
    new_student = make_student(1)
    engine = make_engine(student)
    group = first_attempts(engine)
    for parameter, value in zip(weights(student), weights(new_student), strict=True):
        parameter.copy_(value)
    engine.bump_policy_version()
    assert engine.stats.pages_free == engine.stats.pages_total, (
        "pages of an older version hold nothing of use"
    )
    old_prefill_tokens = engine.stats.prefill_tokens
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    (second,) = drain(engine)
    context = context_of(group[1], cut)
    assert engine.stats.prefill_tokens - old_prefill_tokens == len(context)
    assert bits(second) == expected_attempt(
        new_student, context, PARAMS, rollout_idx=1, attempt_idx=1
    )
    assert (second.policy_version, engine.policy_version) == (1, 1)
    assert bits(second) != expected_attempt(
        make_student(0), context, PARAMS, rollout_idx=1, attempt_idx=1
    )


@pytest.mark.parametrize(
    ("suffix", "cut", "message"),
    [
        ([], None, "suffix_ids must be non-empty"),
        (
            SUFFIX,
            7,
            r"kept_tokens must be in \[1, 20\], got 21; the row is 14 tokens of context and 6 "
            r"sampled ones",
        ),
        (SUFFIX, -14, r"kept_tokens must be in \[1, 20\], got 0"),
        ([37], None, r"in \[0, 37\), got \[1, 2"),
        ([-1], 0, r"in \[0, 37\)"),
        ([1] * 110, 0, "128 positions, got 124 [+] 6"),
        ([1] * 28, None, "need 14 pages of 4 tokens, the pool has 12"),
    ],
)
def test_a_refused_resume_changes_nothing(
    student: Decoder, suffix: list[int], cut: int | None, message: str
) -> None:
    """After a refused resume the attempt can still be resumed, on the pages it had."""
    engine = make_engine(student, num_pages=12)
    group = first_attempts(engine)
    old_stats = engine.stats
    with pytest.raises(ValueError, match=f"resume: .*{message}"):
        engine.resume(group[0], suffix, PARAMS, kept_tokens=kept(PROMPT, group[0], cut))
    assert engine.stats == old_stats and not engine.has_work
    engine.resume(group[0], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[0]))
    assert bits(drain(engine)[0]) == expected_attempt(
        student, context_of(group[0], None), PARAMS, attempt_idx=1
    )
    # Were its pages lost, the whole context would have been prefilled.
    assert engine.stats.prefill_tokens - old_stats.prefill_tokens == 1 + len(SUFFIX)


def test_released_and_foreign_attempts_are_refused(student: Decoder) -> None:
    engine = make_engine(student)
    group = first_attempts(engine)
    engine.release(group[:1])
    for attempt in (group[0], first_attempts(make_engine(student))[1]):
        with pytest.raises(
            ValueError,
            match="resume: attempt must be finished, neither released nor resumed before",
        ):
            engine.resume(attempt, SUFFIX, PARAMS, kept_tokens=1)
