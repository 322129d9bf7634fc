"""The rules of an episode without an engine, and two drivers that play the same episode.

The drivers are socratic_rollouts (with an engine) and socratic_episode (with a function).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from socpo_fast import RolloutOptions, socratic_episode
from socpo_fast.socratic.episode import Episode, Limits
from socpo_fast.socratic.graders import CheckedGrader
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import RuleTeacher
from socpo_fast.socratic.thoughts import without_thoughts
from socpo_fast.types import (
    Attempt,
    Guidance,
    GuidanceRequest,
    Question,
    Rollout,
    RolloutKey,
    SamplingParams,
)
from tests.helpers.scripted import (
    BRIDGE,
    END,
    PARAMS,
    TOKENIZER,
    ScriptedEngine,
    contains,
    encode,
    question,
)
from tests.helpers.tiny import drain, make_engine, make_student

LIMITS = Limits(max_new_tokens=20, max_tokens=500)
WRONG = [*encode("no"), END]
RIGHT = [*encode("yes"), END]


def options_of(**changes) -> RolloutOptions:
    return RolloutOptions(**{"group_size": 1, "guidance_limit": 50} | changes)


def episode_of(**changes) -> Episode:
    return Episode(
        question(4), bridge=BRIDGE, grader=contains, options=options_of(**changes), limits=LIMITS
    )


def rollouts_of(engine: ScriptedEngine, **changes) -> Iterator[Rollout]:
    """Starts rollouts of one question, with a teacher that always says the same."""
    settings = {"teacher": RuleTeacher(lambda _: "x"), "grader": contains, "options": options_of()}
    return socratic_rollouts(engine, TOKENIZER, [question(4)], params=PARAMS, **settings | changes)


def sampled(token_ids: list[int], attempt_idx: int) -> Attempt:
    ones = torch.ones(len(token_ids))
    return Attempt(token_ids, -ones, ones, "stop", RolloutKey(0, 4), 0, attempt_idx, 0)


def test_an_episode_step_by_step() -> None:
    episode = episode_of(max_attempts=3)
    rollout = episode.rollout
    request = episode.add_attempt(sampled(WRONG, 0))
    assert (request.question, request.student_answer, request.attempt_idx) == (
        "question 4",
        "no",
        0,
    )
    context = episode.add_guidance(Guidance(text="look again"))
    bridge = BRIDGE.bridge_ids("look again", ended=True)
    assert context == (len(rollout.prompt_ids + WRONG), bridge)
    assert rollout.context_ids(1) == rollout.prompt_ids + WRONG + bridge
    assert episode.add_attempt(sampled(WRONG, 1)).attempt_idx == 1
    assert episode.add_guidance(Guidance(text="and again")) is not None
    assert (episode.add_attempt(sampled(RIGHT, 2)), rollout.end_reason) == (None, "correct")
    assert [turn.raw_reward for turn in rollout.turns] == [0.0, 0.0, 1.0]
    assert [turn.reward for turn in rollout.turns] == [None] * 3, "credit needs the whole batch"


def test_thoughts_the_prompt_opens_are_no_answer() -> None:
    """The template opens the thoughts, so an answer cut inside them has no mark of its own."""
    answers: list[str] = []

    def grader(text: str, _question: Question) -> bool:
        answers.append(without_thoughts(text))
        return False

    bridge = copy.copy(BRIDGE)
    bridge.after = f"{bridge.after}<think>\n"
    episode = Episode(
        question(4), bridge=bridge, grader=grader, options=options_of(), limits=LIMITS
    )
    episode.add_attempt(sampled(WRONG, 0))
    assert answers == [""] and episode.rollout.turns[0].text == "no"


@pytest.mark.parametrize(
    ("changes", "guidance", "reason"),
    [
        ({}, None, "guidance_failed"),
        ({"on_leak": "drop"}, "It is yes.", "leaked"),
        ({}, "x " * 400, None),
    ],
)
def test_guidance_that_ends_an_episode(
    changes: dict, guidance: str | None, reason: str | None
) -> None:
    episode = episode_of(**changes)
    episode.add_attempt(sampled(WRONG, 0))
    context = episode.add_guidance(None if guidance is None else Guidance(text=guidance))
    assert (context is None) == (reason is not None)
    assert episode.rollout.end_reason == reason


def test_overflow_is_by_the_token() -> None:
    fits = episode_of()
    fits.add_attempt(sampled(WRONG, 0))
    kept_tokens, suffix_ids = fits.add_guidance(Guidance(text="look"))
    needed = kept_tokens + len(suffix_ids) + 20
    for room, reason in ((needed, None), (needed - 1, "overflow")):
        limits = Limits(20, room)
        episode = Episode(
            question(4), bridge=BRIDGE, grader=contains, options=options_of(), limits=limits
        )
        episode.add_attempt(sampled(WRONG, 0))
        episode.add_guidance(Guidance(text="look"))
        assert episode.rollout.end_reason == reason


def script_of(answers: list[list[int]]) -> tuple[Callable[[list[int]], list[int]], list[list[int]]]:
    """Returns a function that gives one answer after the other, and the contexts that it saw."""
    contexts: list[list[int]] = []

    def generate(context: list[int]) -> list[int]:
        contexts.append(context)
        return answers[len(contexts) - 1]

    return generate, contexts


def record(rollout: Rollout) -> list:
    """Returns everything of a rollout except for log-probs, keys and times."""
    turns = [
        (
            turn.attempt.token_ids,
            turn.attempt.finish_reason,
            turn.text,
            turn.is_correct,
            turn.guidance,
        )
        for turn in rollout.turns
    ]
    guidances = [
        (g.raw_text, g.text, g.kept_tokens, g.bridge_ids) if g else None for *_, g in turns
    ]
    return [rollout.prompt_ids, rollout.end_reason, [turn[:-1] for turn in turns], guidances]


@pytest.mark.parametrize("context", ["tokens", "template"])
@pytest.mark.parametrize(
    "answers",
    [
        [WRONG, RIGHT],
        [WRONG, WRONG, WRONG],
        [encode("no no no no no no no"), [*encode("no"), END], RIGHT],
    ],
)
def test_both_drivers_play_the_same_episode(answers: list[list[int]], context: str) -> None:
    def rule(request: GuidanceRequest) -> str:
        return f"look again, {request.attempt_idx}, at {request.student_answer}"

    settings = {"teacher": RuleTeacher(rule), "grader": contains}
    options = options_of(max_attempts=3, attempt_limit=4, context=context)
    engine = ScriptedEngine({(4, 0): answers})
    [by_engine] = socratic_rollouts(
        engine, TOKENIZER, [question(4)], params=PARAMS, options=options, bridge=BRIDGE, **settings
    )
    generate, contexts = script_of(answers)
    limits = {"max_new_tokens": PARAMS.max_new_tokens, "max_tokens": engine.max_tokens}
    function_settings = {
        "generate": generate,
        "bridge": BRIDGE,
        "options": options,
        **settings,
        **limits,
    }
    by_function = socratic_episode(question(4), rollout_idx=2, **function_settings)
    assert record(by_function) == record(by_engine)
    assert {
        by_function.rollout_idx,
        *(attempt.rollout_idx for attempt in by_function.attempts),
    } == {2}
    assert contexts == [engine.contexts[4, 0, k] for k in range(len(contexts))]
    assert all(turn.attempt.logprobs.isnan().all() for turn in by_function.turns)


def test_partial_reward_is_kept_and_thresholded() -> None:
    """A reward below correct_at means a wrong attempt, which gets guidance; its parts are kept."""

    def half(text: str, _question: Question) -> dict[str, float]:
        return {"answer": 0.5 * ("yes" in text), "form": 0.25}

    generate, _ = script_of([WRONG, RIGHT])
    rollout = socratic_episode(
        question(4),
        generate=generate,
        teacher=lambda request: "look again",
        grader=CheckedGrader(half, "half", correct_at=0.75),
        bridge=BRIDGE,
        options=options_of(),
        max_new_tokens=20,
        max_tokens=500,
    )
    assert [turn.raw_reward for turn in rollout.turns] == [0.25, 0.75]
    assert [turn.is_correct for turn in rollout.turns] == [False, True]
    assert rollout.turns[1].reward_parts == {"answer": 0.5, "form": 0.25}


def test_a_generator_is_held_to_its_limit() -> None:
    settings = {"teacher": RuleTeacher(lambda _: "x"), "grader": contains, "bridge": BRIDGE}
    limits = {"max_new_tokens": 3, "max_tokens": 100}
    for ids, num_ids in (([], 0), ([1] * 4, 4)):
        with pytest.raises(
            ValueError, match=f"generate must return 1 to 3 token ids, got {num_ids}"
        ):
            socratic_episode(
                question(4),
                generate=lambda _, ids=ids: ids,
                options=options_of(),
                **settings,
                **limits,
            )


def test_a_bridge_with_another_limit_is_refused() -> None:
    """Both drivers refuse it before anything is sampled."""
    options = options_of(guidance_limit=7)
    message = "bridge.guidance_limit must be options.guidance_limit 7, got 50"
    with pytest.raises(ValueError, match=message):
        next(rollouts_of(ScriptedEngine({}), options=options, bridge=BRIDGE))
    settings = {
        "teacher": lambda request: "x",
        "grader": contains,
        "max_new_tokens": 9,
        "max_tokens": 99,
    }
    with pytest.raises(ValueError, match=message):
        socratic_episode(question(4), generate=list, bridge=BRIDGE, options=options, **settings)


def test_a_grader_that_raises_leaves_no_attempt_pinned() -> None:
    """This includes attempts that finished in the same step and were not graded yet."""

    def grader(_text: str, _question: Question) -> bool:
        raise KeyError("no such answer")

    engine = ScriptedEngine({(4, r): [WRONG] for r in range(5)})
    rollouts = rollouts_of(engine, grader=grader, options=options_of(group_size=5))
    with pytest.raises(ValueError, match="grader raised KeyError: .no such answer"):
        next(rollouts)
    assert engine.pinned == [] and not engine.has_work


def test_calls_without_batch_idx_use_distinct_keys() -> None:
    keys = []

    class Recording(ScriptedEngine):
        def submit(self, prompt_ids, params, *, key) -> None:
            keys.append(key)
            super().submit(prompt_ids, params, key=key)

    for batch_idx in (None, None, 3):
        list(rollouts_of(Recording({(4, 0): [RIGHT]}), batch_idx=batch_idx))
    assert len({batch for batch, _ in keys}) == 3 and keys[2] == (3, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size must be in \\[1, 262144\\], got 0"),
        ({"guidance_limit": 0}, "guidance_limit must be >= 1, got 0"),
        ({"view": "tail"}, "view must be one of head_tail, head, got 'tail'"),
        ({"guidance_timeout_s": 0.0}, "guidance_timeout_s must be finite and > 0, got 0.0"),
    ],
)
def test_options_check_themselves(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"RolloutOptions: {message}"):
        options_of(**changes)


def test_resume_continues_the_recorded_prefix() -> None:
    """kept_tokens counts prompt and answer: 5 are the 3 of the prompt and 2 of the answer."""
    engine = make_engine(make_student())
    params = SamplingParams(temperature=0.0, max_new_tokens=4, eos_ids=(), ignore_eos=True)
    [[attempt]] = engine.generate([[1, 2, 3]], params, keep=True)
    engine.resume(attempt, [7], params, kept_tokens=5)
    [resumed] = drain(engine)
    [[fresh]] = engine.generate([[1, 2, 3, *attempt.token_ids[:2], 7]], params)
    assert resumed.token_ids == fresh.token_ids
    assert torch.equal(resumed.logprobs, fresh.logprobs)
