"""The Socratic loop, token by token: a scripted student and teacher first, then a real engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from socpo_fast.engine import Engine
from socpo_fast.model import load_student
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers import RuleTeacher
from socpo_fast.types import Attempt, Guidance, GuidanceRequest, Question, Rollout
from tests.helpers.episodes import bridges, cuts, shown
from tests.helpers.scripted import (
    END,
    PARAMS,
    TOKENIZER,
    ScriptedEngine,
    contains,
    encode,
    question,
)


def options_of(**changes) -> RolloutOptions:
    return RolloutOptions(**{"group_size": 1, "max_attempts": 2, "guidance_limit": 50} | changes)


def verdicts(rollout: Rollout) -> list[bool]:
    return [turn.is_correct for turn in rollout.turns]


def roll(
    engine: ScriptedEngine, questions: list[Question], teacher, **options
) -> dict[tuple[int, int], Rollout]:
    rollouts = socratic_rollouts(
        engine,
        TOKENIZER,
        questions,
        teacher=teacher,
        grader=contains,
        params=PARAMS,
        options=options_of(**options),
    )
    return {(rollout.question_idx, rollout.rollout_idx): rollout for rollout in rollouts}


def saying(text: str) -> RuleTeacher:
    return RuleTeacher(lambda _request: text)


def test_a_rescued_rollout_token_by_token() -> None:
    wrong = [*encode("no"), END]
    right = [*encode("yes"), END]
    engine = ScriptedEngine({(4, 0): [wrong, right], (4, 1): [right]})
    rollouts = roll(engine, [question(4)], saying("look again"), group_size=2)
    rescued = rollouts[4, 0]
    unassisted = rollouts[4, 1]
    prompt = encode("<|im_start|>user\nquestion 4<|im_end|>\n<|im_start|>assistant\n")
    bridge = encode("\n<|im_start|>user\nlook again<|im_end|>\n<|im_start|>assistant\n")
    assert engine.contexts[4, 0, 1] == prompt + wrong + bridge
    assert [a.token_ids for a in rescued.attempts] == [wrong, right]
    assert (rescued.prompt_ids, rescued.next_context(0)) == (prompt, (len(prompt + wrong), bridge))
    assert rescued.context_ids(1) == prompt + wrong + bridge
    assert (verdicts(rescued), rescued.end_reason) == ([False, True], "correct")
    assert [turn.raw_reward for turn in rescued.turns] == [0.0, 1.0]
    assert [turn.text for turn in rescued.turns] == ["no", "yes"]
    assert (verdicts(unassisted), unassisted.turns[0].guidance, unassisted.end_reason) == (
        [True],
        None,
        "correct",
    )
    assert not engine.pinned


def test_ended_by_length_gets_a_synthetic_end_of_turn() -> None:
    engine = ScriptedEngine({(0, 0): [encode("no"), [*encode("no"), END]]})
    rollout = roll(engine, [question(0)], saying("go on"))[0, 0]
    assert bridges(rollout)[0][0] == END
    assert rollout.end_reason == "max_attempts"
    assert [turn.raw_reward for turn in rollout.turns] == [0.0, 0.0]


def test_cut_at_the_limit() -> None:
    too_long = [*encode("no no no no no no"), END]
    engine = ScriptedEngine({(0, 0): [too_long, [*encode("yes"), END]]})
    requests: list[GuidanceRequest] = []
    teacher = RuleTeacher(lambda request: requests.append(request) or "shorter")
    rollout = roll(engine, [question(0)], teacher, attempt_limit=4)[0, 0]
    assert cuts(rollout) == [4]
    assert rollout.attempts[0].token_ids == too_long, (
        "the tail stays in the attempt, since it is trained"
    )
    assert engine.contexts[0, 0, 1] == rollout.prompt_ids + too_long[:4] + bridges(rollout)[0]
    assert bridges(rollout)[0][0] == END
    first_tokens = TOKENIZER.decode(too_long[:2])
    last_tokens = TOKENIZER.decode(too_long[-2:], skip_special_tokens=True)
    assert requests[0].student_answer == f"{first_tokens}\n[...]\n{last_tokens}"


def test_teacher_sees_the_answer_only_if_revealed() -> None:
    requests: list[GuidanceRequest] = []
    teacher = RuleTeacher(lambda request: requests.append(request) or "x")
    for reveal in (False, True):
        engine = ScriptedEngine({(0, 0): [[*encode("no"), END]] * 2})
        roll(engine, [question(0)], teacher, reveal_answer=reveal)
    assert [request.ground_truth for request in requests] == [None, "yes"]
    assert (requests[0].question, requests[0].student_answer, requests[0].attempt_idx) == (
        "question 0",
        "no",
        0,
    )


@pytest.mark.parametrize("max_attempts", [1, 2, 4])
def test_any_number_of_attempts(max_attempts: int) -> None:
    engine = ScriptedEngine({(0, 0): [[*encode(f"no {k}"), END] for k in range(5)]})
    rollout = roll(engine, [question(0)], saying("again"), max_attempts=max_attempts)[0, 0]
    assert len(rollout.attempts) == max_attempts
    assert shown(rollout) == ["again"] * (max_attempts - 1)
    assert rollout.turns[-1].guidance is None
    context = list(rollout.prompt_ids)
    for k, attempt in enumerate(rollout.attempts):
        assert engine.contexts[0, 0, k] == context == rollout.context_ids(k)
        assert rollout.context_length(k) == len(context)
        context += attempt.token_ids + (bridges(rollout)[k] if k < max_attempts - 1 else [])


def test_no_guidance_ends_with_the_first_attempt() -> None:
    def rule(request: GuidanceRequest) -> str | None:
        if request.rollout_idx == 1:
            raise KeyError("broken rule")
        return "right there" if request.rollout_idx == 2 else None

    script = {(0, r): [[*encode("no"), END], [*encode("yes"), END]] for r in range(3)}
    engine = ScriptedEngine(script)
    with pytest.warns(
        UserWarning, match=r"rule raised KeyError: .broken rule. \(test_rollout.py line"
    ):
        rollouts = roll(engine, [question(0)], RuleTeacher(rule), group_size=3)
    assert [rollouts[0, r].end_reason for r in range(3)] == [
        "guidance_failed",
        "guidance_failed",
        "correct",
    ]
    assert [len(rollouts[0, r].attempts) for r in range(3)] == [1, 1, 2]
    assert not engine.pinned


def test_overflow_ends_with_the_first_attempt() -> None:
    engine = ScriptedEngine({(0, 0): [[*encode("no"), END]]}, max_tokens=60)
    rollout = roll(engine, [question(0)], saying("a message that is long enough to matter"))[0, 0]
    assert rollout.end_reason == "overflow"
    guidance = rollout.turns[0].guidance
    assert guidance.raw_text == guidance.text == "a message that is long enough to matter"
    assert (guidance.kept_tokens, guidance.bridge_ids, shown(rollout)) == (None, None, [])
    with pytest.raises(ValueError, match=r"turns\[0\].guidance must have been shown"):
        rollout.context_ids(1)


@pytest.mark.parametrize("text", ["look \ud83d", "\x00\u2028<|im_end|>" * 500])
def test_odd_guidance_costs_nothing_else(text: str) -> None:
    engine = ScriptedEngine({(0, 0): [[*encode("no"), END], [*encode("yes"), END]]})
    rollout = roll(engine, [question(0)], saying(text))[0, 0]
    assert rollout.end_reason == "correct"
    assert bridges(rollout)[0].count(END) == 1, "the user turn's own"
    shown(rollout)[0].encode()


def test_a_rule_that_hangs_or_is_cancelled() -> None:
    def rule(request: GuidanceRequest) -> str:
        if request.rollout_idx == 1:
            raise asyncio.CancelledError
        time.sleep(0.6)
        return "too late"

    script = {(0, r): [[*encode("no"), END]] for r in range(2)}
    with pytest.warns(UserWarning, match=r"timeout|CancelledError") as warnings:
        rollouts = roll(
            ScriptedEngine(script),
            [question(0)],
            RuleTeacher(rule),
            group_size=2,
            guidance_timeout_s=0.2,
        )
    assert [rollouts[0, r].end_reason for r in range(2)] == ["guidance_failed"] * 2
    assert {"timeout:" in str(w.message) for w in warnings} == {True, False}


@dataclass
class SlowTeacher:
    """A teacher that answers after delay_s, and hangs on rollout 0."""

    delay_s: float
    immediate: bool = False
    closed: int = 0

    async def guide(self, request: GuidanceRequest) -> Guidance | None:
        await asyncio.sleep(60 if request.rollout_idx == 0 else self.delay_s)
        return Guidance(text="look")

    def step(self, *, student_is_idle: bool = True) -> bool:
        return False


def test_students_go_on_while_the_teacher_works() -> None:
    script = {
        (q, r): [[*encode("no"), END], [*encode("yes"), END]] for q in range(20) for r in (0, 1)
    }
    engine = ScriptedEngine(script, per_step=1)
    collect = engine.collect

    def collect_slowly() -> list[Attempt]:
        time.sleep(0.005)
        return collect()

    engine.collect = collect_slowly
    started = time.perf_counter()
    with pytest.warns(UserWarning, match="no guidance, timeout: no answer within"):
        rollouts = roll(
            engine,
            [question(q) for q in range(20)],
            SlowTeacher(0.02),
            group_size=2,
            guidance_timeout_s=0.5,
        )
    assert time.perf_counter() - started < 5
    assert {rollouts[q, 0].end_reason for q in range(20)} == {"guidance_failed"}
    assert {rollouts[q, 1].end_reason for q in range(20)} == {"correct"}
    assert engine.steps_at_resume[0] < 40, (
        "the first second attempt starts before all first ones are done"
    )
    assert not engine.pinned


def test_stopping_early_leaves_nothing_behind() -> None:
    script = {(0, 0): [[*encode("no"), END]] * 2, (0, 1): [[*encode("yes"), END]]}
    engine = ScriptedEngine(script)
    rollouts = socratic_rollouts(
        engine,
        TOKENIZER,
        [question(0)],
        teacher=SlowTeacher(60),
        grader=contains,
        params=PARAMS,
        options=options_of(group_size=2),
    )
    assert next(rollouts).rollout_idx == 1
    rollouts.close()
    assert not engine.pinned
    assert not engine.has_work


@pytest.mark.parametrize("options", [{"group_size": 0}, {"max_attempts": 0}, {"attempt_limit": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"RolloutOptions: .* must be (>= 1|in \[1, \d+\]), got 0"):
        roll(ScriptedEngine({}), [question(0)], saying("x"), **options)


def test_a_question_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="question_idx must be unique"):
        roll(ScriptedEngine({}), [question(0), question(0)], saying("x"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student")
    config = LlamaConfig(
        vocab_size=402,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return Engine(load_student(path), kv_cache_gib=0.01, page_size=16)


def test_real_engine_reuses_prefixes_and_repeats(engine: Engine) -> None:
    """Later attempts prefill only the bridge and at most one token, and a second run is equal.

    The one token is the last one sampled, whose KV was not computed yet. With a cut it is gone.
    """

    def run() -> list[Rollout]:
        rollouts = socratic_rollouts(
            engine,
            TOKENIZER,
            [question(q, truth="impossible") for q in range(4)],
            teacher=saying("look again"),
            grader=contains,
            params=PARAMS,
            options=options_of(group_size=4, max_attempts=3, attempt_limit=10),
            batch_idx=0,
        )
        return sorted(rollouts, key=lambda rollout: (rollout.question_idx, rollout.rollout_idx))

    old_prefill_tokens = engine.stats.prefill_tokens
    first = run()
    num_resumed = [
        len(bridge) + (cut is None)
        for rollout in first
        for bridge, cut in zip(bridges(rollout), cuts(rollout), strict=True)
    ]
    prompts = {rollout.question_idx: len(rollout.prompt_ids) for rollout in first}
    assert engine.stats.prefill_tokens - old_prefill_tokens == sum(prompts.values()) + sum(
        num_resumed
    )
    assert engine.stats.pages_free == engine.stats.pages_total
    assert {cut for rollout in first for cut in cuts(rollout)} == {10, None}
    for repeated, rollout in zip(run(), first, strict=True):
        assert [a.token_ids for a in repeated.attempts] == [a.token_ids for a in rollout.attempts]
        assert all(
            torch.equal(a.logprobs, b.logprobs)
            for a, b in zip(repeated.attempts, rollout.attempts, strict=True)
        )


def test_context_larger_than_the_pool_overflows(engine: Engine) -> None:
    small = Engine(engine.student, kv_cache_gib=4.01 * 16 * 2 * 2 * 2 * 8 * 4 / 2**30, page_size=16)
    assert small.max_tokens == 64
    rollouts = socratic_rollouts(
        small,
        TOKENIZER,
        [question(0, truth="impossible")],
        teacher=saying("a message that is long enough to matter"),
        grader=contains,
        params=PARAMS,
        options=options_of(group_size=2),
    )
    assert [rollout.end_reason for rollout in rollouts] == ["overflow"] * 2
    assert small.stats.pages_free == 4
