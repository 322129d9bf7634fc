"""Runs an engine through random moves, and checks it after each against a model of its pages.

Trace does what a caller can do, in any order: submit, step, resume at any cut, release, cancel,
reset, change the weights, ask for what can never fit or under a key in flight, and stop a step
anywhere. It also takes pages away from any sequence, as a full pool does. The pool is tiny, so the
scheduler does that by itself as well.

After every move PageBook checks who holds a page and what its keys and values were computed from.
At the end `check_tokens` compares every attempt with the same attempt from an engine of its own.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch

from socpo_fast.engine import Engine
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model import Decoder
from socpo_fast.types import Attempt, RolloutKey, SamplingParams
from tests.helpers.interrupts import interrupted_at
from tests.helpers.tiny import POSITIONS, VOCAB, bits, expected_attempt, make_engine, make_student

Name = tuple[RolloutKey, int, int]  # key, rollout_idx, attempt_idx
STUDENTS = [make_student(seed) for seed in range(3)]  # policy_version % 3


class PageBook:
    """A model of the pages: a dictionary from slots to what their KV was computed from.

    That is a pair (policy_version, tokens up to the slot). It wraps the forward and the page copies
    of the engine's runner.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.pool = engine.pool
        self.computed = {}
        # Wraps both functions that write pages, so that every write is noted.
        self.forward, engine.runner.forward = engine.runner.forward, self.note_forward
        self.copy, engine.runner.copy_pages = engine.runner.copy_pages, self.note_copies

    def slots(self, sequence: Sequence, start: int, stop: int) -> list[tuple]:
        """Returns (slot, expected content) for the tokens start .. stop - 1 of a sequence."""
        size = self.pool.page_size
        version = self.engine.policy_version
        slots = [(sequence.pages[p // size], p % size) for p in range(start, stop)]
        return [
            (slot, (version, tuple(sequence.token_ids[: start + i + 1])))
            for i, slot in enumerate(slots)
        ]

    def note_forward(self, plan: list[tuple[Sequence, int]]) -> torch.Tensor:
        """Notes what a forward writes; it may write to pages of a single holder only."""
        for sequence, num_tokens in plan:
            for slot, content in self.slots(
                sequence, sequence.num_cached, sequence.num_cached + num_tokens
            ):
                assert self.pool.ref_count[slot[0]] == 1, "a page is written that others hold"
                self.computed[slot] = content
        return self.forward(plan)

    def note_copies(self, copies: list[tuple[int, int]]) -> None:
        """Notes that copied pages hold what their sources held."""
        for source, target in copies:
            for slot in range(self.pool.page_size):
                self.computed[target, slot] = self.computed.get((source, slot))
        self.copy(copies)

    def check(self) -> None:
        """Asserts that pages are held or free, never both, and hold what they should."""
        scheduler = self.engine.scheduler
        pages = range(self.pool.num_pages)
        live = [*scheduler.waiting, *scheduler.running, *scheduler.pinned.values()]
        launched = {
            s for launched_step in self.engine.steps._launched for s in launched_step.sequences
        }
        num_holders = Counter(page for sequence in live for page in sequence.pages)
        free = Counter(self.pool._free)
        assert all(free[page] + (num_holders[page] > 0) == 1 for page in pages), (
            "a page must be free once, or held"
        )
        assert self.pool.ref_count == [num_holders[page] for page in pages], (
            "references must be holders"
        )
        assert len(num_holders) + self.pool.num_free == self.pool.num_pages
        assert len(set(live)) == len(live)
        for sequence in live:
            assert len(set(sequence.pages)) == len(sequence.pages)
            num_spare = len(sequence.pages) - self.pool.pages_for(sequence.num_cached)
            assert num_spare == 0 or (num_spare > 0 and sequence in launched), "a page too many"
            assert all(
                self.computed[slot] == content
                for slot, content in self.slots(sequence, 0, sequence.num_cached)
            )


class Trace:
    """An engine, the moves that are made with it, and what each attempt should be."""

    def __init__(self, seed: int, student: Decoder):
        self.rng = random.Random(seed)
        self.student = student
        page_size = self.rng.choice([1, 2, 4, 8, 16])
        self.load_weights(0)
        self.max_total = self.rng.randint(16, 48)
        self.engine = make_engine(
            student,
            page_size=page_size,
            # Enough for the longest sequence, and little more: pages run out all the time.
            num_pages=-(-self.max_total // page_size) + self.rng.choice([0, 1, 3, 12, 60]),
            token_budget=self.rng.choice([1, 2, 3, 7, 64]),
            max_running=self.rng.choice([1, 2, 3, 64]),
        )
        self.book = PageBook(self.engine)
        # num_shared counts attempts that were resumed into a page that others hold too.
        self.num_questions = self.num_shared = 0
        self.num_interrupts = self.num_refused_keys = 0
        self.contexts: dict[Name, list[int]] = {}
        self.params: dict[Name, SamplingParams] = {}
        # (number of tokens sampled earlier, policy_version from there on)
        self.versions: dict[Name, list[tuple[int, int]]] = {}
        self.pinned: list[Attempt] = []
        self.finished: list[Attempt] = []

    def run(self, num_moves: int) -> None:
        """Makes random moves, then steps until the engine is idle."""
        moves = {
            self.submit: 3,
            self.steps: 8,
            self.resume: 8,
            self.take_pages: 1,
            self.release: 1,
            self.cancel: 1,
            self.change_weights: 1,
            self.ask_for_too_much: 1,
            self.submit_again: 0.5,
            self.interrupt: 0.4,
            self.reset: 0.1,
        }
        for move in self.rng.choices(list(moves), list(moves.values()), k=num_moves):
            move()
            self.book.check()
        num_steps = 0
        while self.engine.has_work:
            self.step()
            self.book.check()
            num_steps += 1
            assert num_steps < 5_000, "the engine must come to an end"
        self.engine.release(self.pinned)
        assert self.engine.stats.pages_free == self.engine.stats.pages_total

    def submit(self) -> None:
        """Submits a new question and notes what its first attempts should be."""
        params = self.random_params()
        prompt = self.random_ids(self.rng.randint(1, self.max_total - params.max_new_tokens))
        key = RolloutKey(7, self.num_questions)
        self.num_questions += 1
        self.engine.submit(prompt, params, key=key)
        for rollout_idx in range(params.n):
            self.expect((key, rollout_idx, 0), prompt, params)

    def steps(self) -> None:
        """Makes one to six steps, with a check after each."""
        for _ in range(self.rng.randint(1, 6)):
            self.step()
            self.book.check()

    def step(self) -> None:
        """Makes one step; it keeps to the token budget and the limit of running sequences."""
        old_stats = self.engine.stats
        attempts = self.engine.step()
        stats = self.engine.stats
        num_tokens = (
            stats.prefill_tokens
            + stats.decode_tokens
            - old_stats.prefill_tokens
            - old_stats.decode_tokens
        )
        assert num_tokens <= self.engine.scheduler.token_budget
        assert len(self.engine.scheduler.running) <= self.engine.scheduler.max_running
        self.pinned += attempts
        self.finished += attempts

    def resume(self) -> None:
        """Resumes a pinned attempt at a random cut; refused where no token would fit."""
        if not self.pinned:
            return
        # One of the latest, so that some rollouts reach many attempts.
        attempt = self.rng.choice(self.pinned[-4:])
        params = self.random_params()
        context = self.contexts[name_of(attempt)]
        token_ids = context + attempt.token_ids
        kept_tokens = self.rng.choice([len(token_ids), self.rng.randint(1, len(token_ids))])
        kept = token_ids[:kept_tokens]
        room = self.max_total - params.max_new_tokens - len(kept)
        if room < 1:
            with pytest.raises(ValueError, match="resume: (need|prompt [+] max_new_tokens must)"):
                self.engine.resume(attempt, [1] * POSITIONS, params, kept_tokens=kept_tokens)
            return
        suffix = self.random_ids(self.rng.randint(1, min(room, 9)))
        sequence = self.engine.scheduler.pinned[attempt]
        page_size = self.engine.pool.page_size
        if kept_into := len(kept) % page_size and sequence.pages[len(kept) // page_size :]:
            self.num_shared += self.engine.pool.ref_count[kept_into[0]] > 1
        self.engine.resume(attempt, suffix, params, kept_tokens=kept_tokens)
        self.pinned.remove(attempt)
        self.expect(
            (attempt.key, attempt.rollout_idx, attempt.attempt_idx + 1), kept + suffix, params
        )

    def release(self) -> None:
        """Releases a pinned attempt twice; the second time does nothing."""
        self.rng.shuffle(self.pinned)
        self.engine.release(self.pinned[:1] * 2)
        del self.pinned[:1]

    def cancel(self) -> None:
        """Cancels a random question, finished or not."""
        if self.num_questions:
            self.engine.cancel((7, self.rng.randrange(self.num_questions)))

    def take_pages(self) -> None:
        """Preempts any sequence at any moment, as the scheduler does when pages run out."""
        scheduler = self.engine.scheduler
        launched = {
            s for launched_step in self.engine.steps._launched for s in launched_step.sequences
        }
        live = [*scheduler.waiting, *scheduler.running, *scheduler.pinned.values()]
        live = [sequence for sequence in live if sequence not in launched]
        if live and (victim := self.rng.choice(live)) in scheduler.running:
            scheduler.preempt(victim)
        elif live:
            victim.drop_pages(self.engine.pool)

    def change_weights(self) -> None:
        """Loads other weights; waiting attempts go on under the new version."""
        self.engine.bump_policy_version()
        version = self.engine.policy_version
        self.load_weights(version % len(STUDENTS))
        for sequence in self.engine.scheduler.waiting:
            for i in range(sequence.num_rollouts):
                name = (sequence.key, sequence.rollout_idx + i, sequence.attempt_idx)
                self.versions[name].append((sequence.num_sampled, version))

    def ask_for_too_much(self) -> None:
        """Submits prompts that are refused and change nothing."""
        old_state = self.engine.stats, self.engine.scheduler.waiting.copy()
        for prompt in ([], [VOCAB], [1] * self.engine.max_tokens):
            with pytest.raises(
                ValueError, match="submit: (token ids must|need|prompt [+] max_new_tokens must)"
            ):
                self.engine.submit(prompt, self.random_params(), key=(8, 0))
        assert (self.engine.stats, self.engine.scheduler.waiting) == old_state

    def submit_again(self) -> None:
        """Submits an earlier key, which is refused while anything under it is in flight."""
        if self.num_questions == 0:
            return
        key = RolloutKey(7, self.rng.randrange(self.num_questions))
        scheduler = self.engine.scheduler
        params = self.random_params()
        live = [*scheduler.waiting, *scheduler.running, *scheduler.pinned.values()]
        if any(sequence.key == key for sequence in live):
            self.num_refused_keys += 1
            with pytest.raises(ValueError, match="submit: key must have no rollout in flight"):
                self.engine.submit([1], params, key=key)
        else:
            self.engine.submit([1], params, key=key)
            self.engine.cancel(key)

    def interrupt(self) -> None:
        """Raises Ctrl-C somewhere in a step, then resets; the step may end earlier."""
        try:
            with interrupted_at(self.rng.randint(1, 150)):
                attempts = self.engine.step()
        except KeyboardInterrupt:
            self.num_interrupts += 1
            self.reset()
        else:
            self.pinned += attempts
            self.finished += attempts

    def reset(self) -> None:
        """Resets the engine, after which all pages are free."""
        self.engine.reset()
        self.pinned = []
        assert self.engine.stats.pages_free == self.engine.stats.pages_total
        assert not self.engine.has_work

    def check_tokens(self) -> None:
        """Compares every attempt with `expected_attempt`.

        Each of its tokens is compared under the weights that it was sampled with.
        """
        for attempt in self.finished:
            name = name_of(attempt)
            starts = [*self.versions[name], (attempt.num_tokens, -1)]
            first_version = None
            token_ids = []
            logprobs = []
            kept_mass = []
            reason = None
            for (start, version), (stop, _) in pairwise(starts):
                if start < stop:
                    first_version = version if start == 0 else first_version
                    *pieces, reason = expected_attempt(
                        STUDENTS[version % len(STUDENTS)],
                        self.contexts[name],
                        self.params[name],
                        key=attempt.key,
                        rollout_idx=attempt.rollout_idx,
                        attempt_idx=attempt.attempt_idx,
                        sampled=attempt.token_ids[:start],
                        max_sampled=stop,
                    )
                    for so_far, values in zip(
                        (token_ids, logprobs, kept_mass), pieces, strict=True
                    ):
                        so_far += values
            assert bits(attempt) == (token_ids, logprobs, kept_mass, reason), (
                f"attempt {name} of the trace"
            )
            assert attempt.policy_version == first_version

    def expect(self, name: Name, context: list[int], params: SamplingParams) -> None:
        """Notes what an attempt will be sampled behind and how."""
        self.contexts[name] = context
        self.params[name] = params
        self.versions[name] = [(0, self.engine.policy_version)]

    def load_weights(self, idx: int) -> None:
        for parameter, value in zip(
            self.student.parameters(), STUDENTS[idx].parameters(), strict=True
        ):
            parameter.data.copy_(value.data)

    def random_ids(self, length: int) -> list[int]:
        return self.rng.choices(range(VOCAB), k=length)

    def random_params(self) -> SamplingParams:
        rng = self.rng
        return SamplingParams(
            n=rng.choice([1, 2, 5]),
            temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
            max_new_tokens=rng.randint(1, 8),
            eos_ids=rng.choice([(2,), (0, 5, 9, 11, 30)]),
            ignore_eos=rng.random() < 0.2,
            top_p=rng.choice([1.0, 1.0, 0.8]),
            top_k=rng.choice([0, 0, 5]),
            min_p=rng.choice([0.0, 0.0, 0.1]),
            seed=rng.choice([0, 1, 2**40]),
        )


def name_of(attempt: Attempt) -> Name:
    return attempt.key, attempt.rollout_idx, attempt.attempt_idx
