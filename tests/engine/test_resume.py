"""Second attempts on the pages of the first: every cut, into pages that siblings hold too, and what
is refused.
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
    generate_same,
    kept,
    make_engine,
    make_student,
    untouched,
)

PROMPT = list(
    range(1, 15)
)  # three pages of 4 and a half: two full ones shared, then what a fork copies
SUFFIX = [30, 31, 32]
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=6, eos_ids=(), ignore_eos=True, seed=3)
# All; a part; none, up to the shared prompt's end; into the copied page; its border; into, and to
# the border of, shared pages; a single token left.
CUTS = [None, 6, 4, 0, -1, -2, -3, -6, -10, -13]


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def first_attempts(engine: Engine, params: SamplingParams = PARAMS) -> list[Attempt]:
    return generate_same(engine, [PROMPT], params, keep=True)[0]


def context_of(first: Attempt, cut: int | None) -> list[int]:
    path = PROMPT + first.token_ids
    return path[: len(path) if cut is None else len(PROMPT) + cut] + SUFFIX


@pytest.mark.parametrize("cut", CUTS)
def test_resume_equals_a_fresh_run_of_the_same_context(student: Decoder, cut: int | None) -> None:
    engine = make_engine(student)
    group = first_attempts(engine)
    before = engine.stats.prefill_tokens
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    (second,) = drain(engine)
    context = context_of(group[1], cut)
    assert engine.stats.prefill_tokens - before == len(SUFFIX) + (cut in (None, 6)), (
        "only what is new is prefilled"
    )
    assert bits(second) == untouched(student, context, PARAMS, rollout_idx=1, attempt_idx=1)
    assert (second.key, second.rollout_idx, second.attempt_idx) == (group[1].key, 1, 1)
    engine.release([*group, second])
    assert engine.stats.pages_free == engine.stats.pages_total


@pytest.mark.parametrize("cut", CUTS)
def test_greedy_resume_equals_submit(student: Decoder, cut: int | None) -> None:
    """Public calls only: without noise the attempt's number does not matter."""
    params = replace(PARAMS, n=2, temperature=0.0)
    engine = make_engine(student)
    group = first_attempts(engine, params)
    engine.resume(group[0], SUFFIX, params, kept_tokens=kept(PROMPT, group[0], cut))
    fresh = generate_same(make_engine(student), [context_of(group[0], cut)], replace(params, n=1))[
        0
    ][0]
    assert bits(drain(engine)[0]) == bits(fresh)


@pytest.mark.parametrize("cut", [-1, -3, -6, -10, -13])
@pytest.mark.parametrize(
    "num_pages", [200, 9]
)  # 9: the group just fits, so the pages of a pinned one are taken
def test_siblings_do_not_see_what_is_written(student: Decoder, cut: int, num_pages: int) -> None:
    """Two go back into the prompt's shared pages at once, each with another suffix; then the third
    goes on.
    """
    engine = make_engine(student, num_pages=num_pages)
    group = first_attempts(engine)
    suffixes = [[20 + i] * 3 for i in range(3)]
    for attempt, suffix in zip(group[:2], suffixes, strict=False):
        engine.resume(attempt, suffix, PARAMS, kept_tokens=kept(PROMPT, attempt, cut))
    engine.step()
    all_of_it = kept(PROMPT, group[2])
    engine.resume(
        group[2], suffixes[2], PARAMS, kept_tokens=all_of_it
    )  # on all pages that the others left
    for i, second in enumerate(drain(engine)):
        path = PROMPT[:cut] if i < 2 else PROMPT + group[2].token_ids
        assert bits(second) == untouched(
            student, path + suffixes[i], PARAMS, rollout_idx=i, attempt_idx=1
        )


def test_without_a_free_page_to_copy_to_the_part_is_computed_again(student: Decoder) -> None:
    params = replace(PARAMS, max_new_tokens=1)
    engine = make_engine(student, num_pages=6)
    prompt = PROMPT[
        :12
    ]  # whole pages, and a single token sampled: siblings hold nothing but shared pages
    group = generate_same(engine, [prompt], params, keep=True)[0]
    engine.generate(
        [[1] * 9], replace(params, n=1), keys=[(1, 0)], keep=True
    )  # the other three pages
    before = engine.stats
    assert before.pages_free == 0
    engine.resume(group[0], SUFFIX, params, kept_tokens=len(prompt) - 2)
    engine.resume(group[2], SUFFIX, params, kept_tokens=kept(prompt, group[2]))
    seconds = drain(engine)
    assert engine.stats.prefill_tokens - before.prefill_tokens == (2 + len(SUFFIX)) + (
        1 + len(SUFFIX)
    )
    for second, row in zip(seconds, (prompt[:-2], prompt + group[2].token_ids), strict=True):
        names = {"rollout_idx": second.rollout_idx, "attempt_idx": 1}
        assert bits(second) == untouched(student, row + SUFFIX, params, **names)


def test_a_sibling_still_running_does_not_see_a_write(student: Decoder) -> None:
    """Rollout 0 ends early and goes back into the prompt while the others still decode on the
    shared pages.
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
        names = {"rollout_idx": attempt.rollout_idx, "attempt_idx": attempt.attempt_idx}
        assert bits(attempt) == untouched(student, context, params, **names)


@pytest.mark.parametrize("cut", [None, 3, 0, -1, -6, -13])
@pytest.mark.parametrize("taken", ["before it is resumed", "while it runs", "twice"])
def test_preempted_and_computed_again(student: Decoder, cut: int | None, taken: str) -> None:
    engine = make_engine(student, num_pages=8)
    group = first_attempts(engine, replace(PARAMS, n=2))
    other = replace(PARAMS, n=1, max_new_tokens=10)
    if taken != "while it runs":
        engine.generate([list(range(22))], other, keys=[(1, 0)])  # takes all eight pages
        assert engine.stats.preemptions >= 2
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    if taken != "before it is resumed":
        engine.step()
        engine._scheduler._give_way(engine._scheduler.running[-1])
    second = drain(engine)[0]
    assert bits(second) == untouched(
        student, context_of(group[1], cut), PARAMS, rollout_idx=1, attempt_idx=1
    )


def test_back_over_several_bridges(student: Decoder) -> None:
    """Attempt 2 keeps none of attempt 1, nothing of its bridge, and less than all of attempt 0."""
    engine = make_engine(student)
    group = first_attempts(engine)
    engine.resume(group[0], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[0]))
    (second,) = drain(engine)
    engine.resume(second, [33], PARAMS, kept_tokens=kept(PROMPT, group[0]) - 2)
    (third,) = drain(engine)
    context = PROMPT + group[0].token_ids[:-2] + [33]
    assert third.attempt_idx == 2
    assert bits(third) == untouched(student, context, PARAMS, attempt_idx=2)


def weights(student: Decoder) -> Iterator[torch.Tensor]:
    return (parameter.data for parameter in student.parameters())


@pytest.mark.parametrize("cut", [None, 3, 0, -1, -6, -13])
def test_stale_pages_are_never_reused(cut: int | None) -> None:
    """Weights change between the attempts: everything is computed again, as in a fresh run under
    the new ones.
    """
    student = make_student(0)
    new = make_student(1)
    engine = make_engine(student)
    group = first_attempts(engine)
    for parameter, value in zip(weights(student), weights(new), strict=True):
        parameter.copy_(value)
    engine.bump_policy_version()
    assert engine.stats.pages_free == engine.stats.pages_total, (
        "pages of an older version hold nothing of use"
    )
    before = engine.stats.prefill_tokens
    engine.resume(group[1], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[1], cut))
    (second,) = drain(engine)
    context = context_of(group[1], cut)
    assert engine.stats.prefill_tokens - before == len(context)
    assert bits(second) == untouched(new, context, PARAMS, rollout_idx=1, attempt_idx=1)
    assert (second.policy_version, engine.policy_version) == (1, 1)
    assert bits(second) != untouched(make_student(0), context, PARAMS, rollout_idx=1, attempt_idx=1)


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
def test_a_refused_resume_leaves_everything_as_it_was(
    student: Decoder, suffix: list[int], cut: int | None, message: str
) -> None:
    engine = make_engine(student, num_pages=12)
    group = first_attempts(engine)
    before = engine.stats
    with pytest.raises(ValueError, match=f"resume: .*{message}"):
        engine.resume(group[0], suffix, PARAMS, kept_tokens=kept(PROMPT, group[0], cut))
    assert engine.stats == before and not engine.has_work
    engine.resume(
        group[0], SUFFIX, PARAMS, kept_tokens=kept(PROMPT, group[0])
    )  # the attempt is still there, with its pages
    assert bits(drain(engine)[0]) == untouched(
        student, context_of(group[0], None), PARAMS, attempt_idx=1
    )
    assert engine.stats.prefill_tokens - before.prefill_tokens == 1 + len(SUFFIX)


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
