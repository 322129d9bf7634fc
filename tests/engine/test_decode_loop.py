"""Checks that decoding several tokens between two host reads changes no attempt, bitwise.

On a GPU the decode loop pads rows and pages and replays each round as a CUDA graph. Here the same
code runs on a CPU with a stand-in for the graph. The reference is always an engine that reads every
token (tokens_per_sync=1), which has no decode loop.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from socpo_fast.device import Readback
from socpo_fast.engine import Engine
from socpo_fast.engine.decode import DecodeLoop
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sequence import Sequence
from socpo_fast.engine.steps import StepQueue
from socpo_fast.model import Decoder
from socpo_fast.types import SamplingParams
from tests.helpers.late_devices import FakeCuda, FakeGraph, make_reads_late
from tests.helpers.tiny import (
    bits,
    drain,
    expected_attempt,
    generate_same,
    kept,
    make_engine,
    make_student,
)
from tests.helpers.traces import PageBook, Trace

PROMPTS = [[3, 5, 7], list(range(1, 30)), [9] * 8, [4]]
Size = tuple[int, int, bool]  # rows, pages, is_filtered: what a captured round is made for
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=23, eos_ids=(2, 17), seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


@pytest.fixture
def launched_rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the number of rounds of each launch of a decode loop.

    Engines with tokens_per_sync=1 have no loop, so reference engines add nothing to it.
    """
    counts: list[int] = []
    launch = DecodeLoop.launch

    def note_rounds(
        loop: DecodeLoop, sequences: list[Sequence], num_rounds: int, *, is_ahead: bool
    ) -> Readback:
        counts.append(num_rounds)
        return launch(loop, sequences, num_rounds, is_ahead=is_ahead)

    monkeypatch.setattr(DecodeLoop, "launch", note_rounds)
    return counts


def run_two_attempts(engine: Engine, params: list[SamplingParams]) -> list[Any]:
    """Returns first and second attempts of every prompt, and the engine's counts in between."""
    for q, prompt in enumerate(PROMPTS):
        engine.submit(prompt, params[q % len(params)], key=(1, q))
    first = drain(engine)
    record: list[Any] = [*map(bits, first), engine.stats]
    for attempt in first[::2]:
        cut = None if attempt.rollout_idx else attempt.num_tokens // 2
        kept_tokens = kept(PROMPTS[attempt.key.question], attempt, cut)
        engine.resume(attempt, [8, 1, 6], params[0], kept_tokens=kept_tokens)
    second = drain(engine)
    record += [*map(bits, second), engine.stats]
    engine.release(first + second)
    return [*record, engine.stats]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[Size, FakeGraph]:
    """Makes every decode loop pad and capture, as on a GPU; returns the graphs by their size."""
    captured: dict[Size, FakeGraph] = {}
    init = DecodeLoop.__init__
    make = DecodeLoop.graph_for

    def init_as_on_gpu(self: DecodeLoop, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.captures = True

    def graph_of(self: DecodeLoop, *size: Any) -> FakeGraph:
        old = [cache.clone() for cache in (self.runner.k_cache_LPSKE, self.runner.v_cache_LPSKE)]
        graph = captured[size] = make(self, *size)
        # The warm-up round before a capture must write nothing into pages of live sequences.
        assert all(map(torch.equal, old, (self.runner.k_cache_LPSKE, self.runner.v_cache_LPSKE)))
        graph.round = lambda: self.run_round(*size)
        return graph

    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(DecodeLoop, "__init__", init_as_on_gpu)
    monkeypatch.setattr(DecodeLoop, "graph_for", graph_of)
    return captured


# Requests that end at different steps, some greedy and some with a filtered distribution.
MIXED = [
    PARAMS,
    replace(PARAMS, temperature=0.0, n=1, max_new_tokens=30),
    replace(PARAMS, temperature=0.3, top_p=0.7, seed=9, max_new_tokens=5),
    replace(PARAMS, ignore_eos=True, max_new_tokens=14),
]
CASES = {
    "groups, eos in the middle": ([PARAMS], {}),
    "different lengths, some filtered": (MIXED, {}),
    "all filtered": ([replace(PARAMS, top_k=9, min_p=0.02)], {}),
    "forks wait for a place": (MIXED, {"max_running": 4}),
    "chunks": (MIXED, {"token_budget": 5, "max_running": 5}),
    "few pages": (MIXED, {"num_pages": 24}),
    "one sequence fills the pool": ([replace(PARAMS, ignore_eos=True)], {"num_pages": 20}),
}


@pytest.mark.parametrize("tokens_per_sync", [2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_token_per_step(
    student: Decoder, case: str, tokens_per_sync: int, launched_rounds: list[int]
) -> None:
    """Attempts and the engine's counts do not depend on tokens_per_sync."""
    params, options = CASES[case]
    engine = make_engine(student, **options, tokens_per_sync=tokens_per_sync)
    expected = run_two_attempts(make_engine(student, **options, tokens_per_sync=1), params)
    assert run_two_attempts(engine, params) == expected
    assert max(launched_rounds) == tokens_per_sync
    assert (engine.stats.preemptions > 0) == ("num_pages" in options)
    assert engine.stats.pages_free == engine.stats.pages_total


def test_padded_and_replayed_rounds_draw_the_same(
    student: Decoder, graphs: dict[Size, FakeGraph]
) -> None:
    """Padding rows and pages and replaying a captured round change no attempt."""
    captured: set[Size] = set()
    for params, options in CASES.values():
        graphs.clear()
        engine = make_engine(student, **options, tokens_per_sync=8)
        expected = run_two_attempts(make_engine(student, **options, tokens_per_sync=1), params)
        assert run_two_attempts(engine, params) == expected
        loop = engine.steps.loop
        # Sizes are rounded up to powers of two, so that a run captures few graphs.
        for size in graphs:
            for n, largest in zip(size[:2], (loop.max_running, loop.max_pages), strict=True):
                assert n == largest or n & (n - 1) == 0, size
        captured |= set(graphs)
    assert len({rows for rows, *_ in captured}) > 2
    assert {is_filtered for *_, is_filtered in captured} == {False, True}


def test_host_reads_once_per_tokens_per_sync(student: Decoder, launched_rounds: list[int]) -> None:
    engine = make_engine(student, tokens_per_sync=8)
    generate_same(engine, [[3, 5, 7]], replace(PARAMS, ignore_eos=True))
    assert launched_rounds == [8, 8, 6]  # 23 tokens, the first of them by the prefill


def test_full_queue_does_not_shorten_the_rounds(
    student: Decoder, launched_rounds: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that wait for a free row, as in an evaluation, do not make the host read more often.

    12 prompts share 4 rows. Only prompts go through a forward of a step; every decoded token comes
    from rounds.
    """
    engine = make_engine(student, max_running=4, tokens_per_sync=8)
    forwards = []
    forward = Runner.forward

    def note_forward(runner: Runner, plan: list[tuple[Sequence, int]]) -> torch.Tensor:
        forwards.append([num_tokens for _, num_tokens in plan])
        return forward(runner, plan)

    monkeypatch.setattr(Runner, "forward", note_forward)
    params = replace(PARAMS, n=1, ignore_eos=True, max_new_tokens=17)
    groups = generate_same(engine, [[3, 5, 7]] * 12, params)
    assert all(attempt.num_tokens == 17 for (attempt,) in groups)
    assert forwards == [[3] * 4] * 3 and launched_rounds == [8, 8] * 3


def test_rounds_run_ahead_of_the_host(student: Decoder) -> None:
    """Two launches are in flight while no prompt waits to be admitted, otherwise one."""
    engine = make_engine(student, max_running=4, tokens_per_sync=4)
    engine.submit([3, 5, 7], replace(PARAMS, n=4, ignore_eos=True, max_new_tokens=40), key=(0, 0))
    engine.step()
    engine.launch()
    assert [step.num_rounds for step in engine.steps._launched] == [4, 4]
    engine.submit([4], PARAMS, key=(0, 1))
    assert engine.collect() == []
    engine.launch()
    assert [step.num_rounds for step in engine.steps._launched] == [4]
    with pytest.raises(ValueError, match="lend_memory"), engine.lend_memory():
        pass
    engine.reset()
    assert not engine.steps._launched and engine.collect() == [] and engine.is_ready


def test_lookahead_takes_free_pages_only(student: Decoder, launched_rounds: list[int]) -> None:
    """Rounds launched ahead reserve only free pages; they never preempt for them.

    Two sequences of 3 + 17 tokens need ten pages of four. With eleven pages none is taken away.
    With seven one of the two sequences must be preempted.
    """
    engine = make_engine(student, num_pages=11, tokens_per_sync=8)
    params = replace(PARAMS, n=2, ignore_eos=True, max_new_tokens=17)
    expected = generate_same(make_engine(student), [[3, 5, 7]], params)
    pinned = engine.generate(
        [[1] * 4], replace(PARAMS, n=1, max_new_tokens=1), keys=[(9, 9)], keep=True
    )[0]
    assert [list(map(bits, g)) for g in generate_same(engine, [[3, 5, 7]], params)] == [
        list(map(bits, g)) for g in expected
    ]
    assert engine.stats.preemptions == 0 and sum(launched_rounds) == 16
    engine.release(pinned)
    assert engine.stats.pages_free == 11

    launched_rounds.clear()
    engine = make_engine(student, num_pages=7, tokens_per_sync=8)
    assert [list(map(bits, g)) for g in generate_same(engine, [[3, 5, 7]], params)] == [
        list(map(bits, g)) for g in expected
    ]
    assert engine.stats.preemptions > 0 and min(launched_rounds) < 8
    assert engine.stats.pages_free == 7


def test_cancel_between_steps(student: Decoder, launched_rounds: list[int]) -> None:
    """Cancelling one question while its rounds are in flight leaves the other one untouched."""
    engine = make_engine(student, tokens_per_sync=4)
    params = replace(PARAMS, ignore_eos=True)
    for q in range(2):
        engine.submit(PROMPTS[q], params, key=(0, q))
    while len(launched_rounds) < 2:
        assert not engine.step()
    engine.cancel((0, 0))
    assert engine.step() == [], "what is under way for the other question goes on"
    done = drain(engine)
    assert [(a.key.question, a.rollout_idx) for a in done] == [(1, 0), (1, 1), (1, 2)]
    for attempt in done:
        assert bits(attempt) == expected_attempt(
            student, PROMPTS[1], params, key=(0, 1), rollout_idx=attempt.rollout_idx
        )
    engine.release(done)
    assert engine.stats.pages_free == engine.stats.pages_total


def test_new_weights_between_steps(student: Decoder) -> None:
    """Tokens still in flight when the weights change are drawn again, with the new weights."""
    params = replace(PARAMS, ignore_eos=True)
    trained = make_student()
    engine = make_engine(trained, tokens_per_sync=4)
    engine.submit(PROMPTS[1], params, key=(0, 0))
    for _ in range(3):
        engine.step()
    sampled = {sequence.num_sampled for sequence in engine.scheduler.running}
    assert sampled == {9}, "one by the prefill, four by each launch that was read"
    trained.load_state_dict(make_student(1).state_dict())
    engine.bump_policy_version()
    for attempt in drain(engine):
        context = {"context": PROMPTS[1], "params": params, "rollout_idx": attempt.rollout_idx}
        old_part = expected_attempt(student, **context, max_sampled=9)
        new_part = expected_attempt(make_student(1), **context, sampled=old_part[0])
        assert bits(attempt)[:3] == tuple(
            a + b for a, b in zip(old_part[:3], new_part[:3], strict=True)
        )
        assert attempt.policy_version == 0


class LoopBook(PageBook):
    """Extends the dictionary model by the KV that rounds write before the host has read them."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self.launch = engine.steps.loop.launch
        engine.steps.loop.launch = self.note_rounds
        self.row_ids: dict[Sequence, list[int]] = {}  # tokens in flight included

    def note_rounds(self, sequences: list[Sequence], num_rounds: int, *, is_ahead: bool) -> Any:
        drawn = self.launch(sequences, num_rounds, is_ahead=is_ahead)
        size = self.pool.page_size
        version = self.engine.policy_version
        for row, sequence in enumerate(sequences):
            if not sequence.is_live:
                continue
            ids = self.row_ids[sequence] if is_ahead else list(sequence.token_ids)
            for token_id in drawn.wait()[:, 0, row].tolist():
                page = sequence.pages[(len(ids) - 1) // size]
                slot = (len(ids) - 1) % size
                assert self.pool.ref_count[page] == 1, "a page is written to while others hold it"
                self.computed[page, slot] = (version, tuple(ids))
                ids.append(int(token_id))
            self.row_ids[sequence] = ids
        return drawn


class LoopTrace(Trace):
    """A random trace with several tokens a step, whose launches and reads are separate moves."""

    def __init__(self, seed: int, student: Decoder):
        super().__init__(seed, student)
        engine = self.engine
        scheduler = self.engine.scheduler
        # With fewer rows than 3 a prompt would wait nearly always, and no launch runs ahead then.
        scheduler.max_running = self.rng.choice([3, 64])
        vars(engine.runner).pop("forward", None), vars(engine.runner).pop("copy_pages", None)
        rounds = self.rng.choice([2, 3, 8])
        engine.steps = StepQueue(
            scheduler, engine.runner, engine._arrivals, tokens_per_sync=rounds, name="student"
        )
        self.book = LoopBook(engine)
        self.num_late = 0

    def step(self) -> None:
        if self.rng.random() < 0.5:
            self.engine.launch()
            if not self.engine.is_ready:  # collect only after another move
                self.num_late += 1
                return
        done = self.engine.step()
        assert len(self.engine.scheduler.running) <= self.engine.scheduler.max_running
        self.pinned += done
        self.finished += done


@pytest.mark.parametrize("padded", [False, True])
def test_traces(
    padded: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    launched_rounds: list[int],
) -> None:
    """Any order of moves leaves the pages consistent and every attempt as if run by itself."""
    if padded:
        request.getfixturevalue("graphs")
    make_reads_late(monkeypatch, seed=1)
    student = make_student()
    num_late = 0
    for seed in range(60):
        trace = LoopTrace(seed, student)
        try:
            trace.run(num_moves=40)
            trace.check_tokens()
        except BaseException as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
        num_late += trace.num_late
    assert sum(launched_rounds) > 400 and num_late > 100
