"""Several tokens between two reads by the host: the same attempts, bit for bit, as one token a
step.

The loop as a GPU runs it, rows and pages padded and rounds replayed, is run here with a stand-in
for the CUDA graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from socpo_fast.device import Readback
from socpo_fast.engine import Engine
from socpo_fast.engine.decode import DecodeLoop
from socpo_fast.engine.sequence import Sequence
from socpo_fast.engine.steps import StepQueue
from socpo_fast.model import Decoder
from socpo_fast.types import SamplingParams
from tests.helpers.late_devices import FakeCuda, FakeGraph, make_reads_late
from tests.helpers.tiny import (
    bits,
    drain,
    generate_same,
    kept,
    make_engine,
    make_student,
    untouched,
)
from tests.helpers.traces import PageBook, Trace

PROMPTS = [[3, 5, 7], list(range(1, 30)), [9] * 8, [4]]
Size = tuple[int, int, bool]
PARAMS = SamplingParams(n=3, temperature=1.0, max_new_tokens=23, eos_ids=(2, 17), seed=5)


@pytest.fixture(scope="module")
def student() -> Decoder:
    return make_student()


def rounds_of(engine: Engine) -> list[int]:
    """Notes the number of rounds of each launch of the loop."""
    counts: list[int] = []
    if (loop := engine._steps.loop) is not None:
        launch = loop.launch

        def note(sequences: list[Sequence], num_rounds: int, *, is_ahead: bool) -> Readback:
            counts.append(num_rounds)
            return launch(sequences, num_rounds, is_ahead=is_ahead)

        loop.launch = note
    return counts


def live_through(engine: Engine, params: list[SamplingParams]) -> list[Any]:
    """First and second attempts of every prompt, and the engine's counts on the way."""
    for q, prompt in enumerate(PROMPTS):
        engine.submit(prompt, params[q % len(params)], key=(1, q))
    first = drain(engine)
    seen: list[Any] = [*map(bits, first), engine.stats]
    for attempt in first[::2]:
        cut = None if attempt.rollout_idx else attempt.num_tokens // 2
        kept_tokens = kept(PROMPTS[attempt.key.question], attempt, cut)
        engine.resume(attempt, [8, 1, 6], params[0], kept_tokens=kept_tokens)
    second = drain(engine)
    seen += [*map(bits, second), engine.stats]
    engine.release(first + second)
    return [*seen, engine.stats]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[Size, FakeGraph]:
    """Every loop pads and captures; the graphs by (rows, pages, is_filtered)."""
    captured: dict[Size, FakeGraph] = {}
    init = DecodeLoop.__init__
    make = DecodeLoop._graph

    def init_as_on_a_gpu(self: DecodeLoop, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.captures = True

    def graph_of(self: DecodeLoop, *size: Any) -> FakeGraph:
        before = [cache.clone() for cache in (self.runner.k_cache_LPSKE, self.runner.v_cache_LPSKE)]
        graph = captured[size] = make(self, *size)
        assert all(map(torch.equal, before, (self.runner.k_cache_LPSKE, self.runner.v_cache_LPSKE)))
        graph.round = lambda: self._round(*size)
        return graph

    FakeCuda().install(monkeypatch)
    monkeypatch.setattr(DecodeLoop, "__init__", init_as_on_a_gpu)
    monkeypatch.setattr(DecodeLoop, "_graph", graph_of)
    return captured


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
def test_attempts_and_counts_are_those_of_one_token_a_step(
    student: Decoder, case: str, tokens_per_sync: int
) -> None:
    params, options = CASES[case]
    engine = make_engine(student, **options, tokens_per_sync=tokens_per_sync)
    counts = rounds_of(engine)
    expected = live_through(make_engine(student, **options, tokens_per_sync=1), params)
    assert live_through(engine, params) == expected
    assert max(counts) == tokens_per_sync
    assert (engine.stats.preemptions > 0) == ("num_pages" in options)
    assert engine.stats.pages_free == engine.stats.pages_total


def test_padded_and_replayed_rounds_draw_the_same(
    student: Decoder, graphs: dict[Size, FakeGraph]
) -> None:
    captured: set[Size] = set()
    for params, options in CASES.values():
        graphs.clear()
        engine = make_engine(student, **options, tokens_per_sync=8)
        expected = live_through(make_engine(student, **options, tokens_per_sync=1), params)
        assert live_through(engine, params) == expected
        loop = engine._steps.loop
        for size in graphs:
            for n, most in zip(size[:2], (loop.max_running, loop.max_pages), strict=True):
                assert n == most or n & (n - 1) == 0, size
        captured |= set(graphs)
    assert len({rows for rows, *_ in captured}) > 2
    assert {is_filtered for *_, is_filtered in captured} == {False, True}


def test_the_host_reads_once_a_few_tokens(student: Decoder) -> None:
    engine = make_engine(student, tokens_per_sync=8)
    counts = rounds_of(engine)
    generate_same(engine, [[3, 5, 7]], replace(PARAMS, ignore_eos=True))
    assert counts == [8, 8, 6]  # 23 tokens, the first of them by the prefill


def test_a_full_queue_does_not_end_the_rounds(student: Decoder) -> None:
    """As in an evaluation: 12 prompts for 4 places. A step forwards prompts; all else is rounds."""
    engine = make_engine(student, max_running=4, tokens_per_sync=8)
    counts = rounds_of(engine)
    forwards = []
    forward = engine._runner.forward
    engine._runner.forward = lambda plan: forwards.append([n for _, n in plan]) or forward(plan)
    params = replace(PARAMS, n=1, ignore_eos=True, max_new_tokens=17)
    groups = generate_same(engine, [[3, 5, 7]] * 12, params)
    assert all(attempt.num_tokens == 17 for (attempt,) in groups)
    assert forwards == [[3] * 4] * 3 and counts == [8, 8] * 3


def test_rounds_go_ahead_of_the_host(student: Decoder) -> None:
    """Two launches are in flight while nobody waits to be admitted; with somebody waiting, one."""
    engine = make_engine(student, max_running=4, tokens_per_sync=4)
    engine.submit([3, 5, 7], replace(PARAMS, n=4, ignore_eos=True, max_new_tokens=40), key=(0, 0))
    engine.step()
    engine.launch()
    assert [step.num_rounds for step in engine._steps._launched] == [4, 4]
    engine.submit([4], PARAMS, key=(0, 1))
    assert engine.collect() == []
    engine.launch()
    assert [step.num_rounds for step in engine._steps._launched] == [4]
    with pytest.raises(ValueError, match="lend_memory"), engine.lend_memory():
        pass
    engine.reset()
    assert not engine._steps._launched and engine.collect() == [] and engine.is_ready


def test_looking_ahead_takes_free_pages_only(student: Decoder) -> None:
    """Eleven pages of four tokens for two sequences of 3 + 17: no page is taken away. Seven: one
    has to give way.
    """
    engine = make_engine(student, num_pages=11, tokens_per_sync=8)
    counts = rounds_of(engine)
    params = replace(PARAMS, n=2, ignore_eos=True, max_new_tokens=17)
    expected = generate_same(make_engine(student), [[3, 5, 7]], params)
    pinned = engine.generate(
        [[1] * 4], replace(PARAMS, n=1, max_new_tokens=1), keys=[(9, 9)], keep=True
    )[0]
    assert [list(map(bits, g)) for g in generate_same(engine, [[3, 5, 7]], params)] == [
        list(map(bits, g)) for g in expected
    ]
    assert engine.stats.preemptions == 0 and sum(counts) == 16
    engine.release(pinned)
    assert engine.stats.pages_free == 11

    engine = make_engine(student, num_pages=7, tokens_per_sync=8)
    counts = rounds_of(engine)
    assert [list(map(bits, g)) for g in generate_same(engine, [[3, 5, 7]], params)] == [
        list(map(bits, g)) for g in expected
    ]
    assert engine.stats.preemptions > 0 and min(counts) < 8 and engine.stats.pages_free == 7


def test_cancel_between_steps(student: Decoder) -> None:
    engine = make_engine(student, tokens_per_sync=4)
    params = replace(PARAMS, ignore_eos=True)
    for q in range(2):
        engine.submit(PROMPTS[q], params, key=(0, q))
    counts = rounds_of(engine)
    while len(counts) < 2:
        assert not engine.step()
    engine.cancel((0, 0))
    assert engine.step() == [], "what is under way for the other question goes on"
    done = drain(engine)
    assert [(a.key.question, a.rollout_idx) for a in done] == [(1, 0), (1, 1), (1, 2)]
    for attempt in done:
        assert bits(attempt) == untouched(
            student, PROMPTS[1], params, key=(0, 1), rollout_idx=attempt.rollout_idx
        )
    engine.release(done)
    assert engine.stats.pages_free == engine.stats.pages_total


def test_new_weights_between_steps(student: Decoder) -> None:
    """Tokens that are under way when the weights change are drawn again, with the new ones."""
    params = replace(PARAMS, ignore_eos=True)
    own = make_student()
    engine = make_engine(own, tokens_per_sync=4)
    engine.submit(PROMPTS[1], params, key=(0, 0))
    for _ in range(3):
        engine.step()
    sampled = {sequence.num_sampled for sequence in engine._scheduler.running}
    assert sampled == {9}, "one by the prefill, four by each launch that was read"
    own.load_state_dict(make_student(1).state_dict())
    engine.bump_policy_version()
    for attempt in drain(engine):
        context = {"context": PROMPTS[1], "params": params, "rollout_idx": attempt.rollout_idx}
        before = untouched(student, **context, max_sampled=9)
        after = untouched(make_student(1), **context, sampled=before[0])
        assert bits(attempt)[:3] == tuple(a + b for a, b in zip(before[:3], after[:3], strict=True))
        assert attempt.policy_version == 0


class LoopBook(PageBook):
    """Also knows what the loop writes, of which the host has read a part only."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self.launch = engine._steps.loop.launch
        engine._steps.loop.launch = self.note_rounds
        self.row_ids: dict[Sequence, list[int]] = {}  # with what is under way

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
    """A random life with several tokens a step, launched and read apart."""

    def __init__(self, seed: int, student: Decoder):
        super().__init__(seed, student)
        engine = self.engine
        scheduler = self.engine._scheduler
        scheduler.max_running = self.rng.choice([3, 64])  # fewer would mostly have somebody wait
        vars(engine._runner).pop("forward", None), vars(engine._runner).pop("copy_pages", None)
        rounds = self.rng.choice([2, 3, 8])
        engine._steps = StepQueue(
            scheduler, engine._runner, engine._arrivals, tokens_per_sync=rounds, name="student"
        )
        self.book = LoopBook(engine)
        self.num_late = 0

    def step(self) -> None:
        if self.rng.random() < 0.5:
            self.engine.launch()
            if not self.engine.is_ready:  # look again after another move
                self.num_late += 1
                return
        done = self.engine.step()
        assert len(self.engine._scheduler.running) <= self.engine._scheduler.max_running
        self.pinned += done
        self.finished += done


@pytest.mark.parametrize("padded", [False, True])
def test_traces(
    padded: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if padded:
        request.getfixturevalue("graphs")
    make_reads_late(monkeypatch, seed=1)
    student = make_student()
    num_rounds = num_late = 0
    for seed in range(60):
        trace = LoopTrace(seed, student)
        counts = rounds_of(trace.engine)
        try:
            trace.run(num_moves=40)
            trace.check_tokens()
        except BaseException as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
        num_rounds += sum(counts)
        num_late += trace.num_late
    assert num_rounds > 400 and num_late > 100
