"""Episodes driven by the paged engine, or by anybody's generator. Read socratic_rollouts, then _Driver.

The rules of an episode stand in episode.py. Here the engine and the teacher overlap: teachers are
coroutines on one background event loop; between two engine steps the loop here collects what they
said and resumes those rollouts on the pages of their first attempt, so a slow teacher delays nobody
but the rollout it belongs to.
"""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from socpo_fast.engine import Engine
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader, as_grader
from socpo_fast.socratic.teachers import Teacher
from socpo_fast.socratic.teachers.simple import TeacherFunction, as_teacher
from socpo_fast.types import (
    Attempt,
    Guidance,
    GuidanceRequest,
    Question,
    Rollout,
    RolloutKey,
    SamplingParams,
)

_fresh_batches = count(2**40)  # far from any batch that a trainer numbers


def socratic_rollouts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    teacher: Teacher | TeacherFunction,
    grader: Grader,
    params: SamplingParams,
    options: RolloutOptions,
    batch_idx: int | None = None,
    bridge: Bridge | None = None,
) -> Iterator[Rollout]:
    """Roll out options.group_size episodes of every question; yields each Rollout as it finishes.

    Its pages are given back by then.

    Args:
        teacher:   a Teacher, or a plain or async function of the request.
        grader:    text and question -> a bool, a number in [0, 1], or named parts of one.
        params:    sampling of every attempt; its n is replaced by options.group_size.
        options:   the rules of an episode.
        batch_idx: with question_idx the name of the sampling noise: the same one gives the same
                   tokens. None: one that no other call has.
        bridge:    the tokenizer's, where the caller has one already; its guidance_limit must be that
                   of the options.

    Raises:
        ValueError: a question twice, a prompt that can never fit, a busy engine, another limit.
    """
    if len({question.question_idx for question in questions}) != len(questions):
        raise ValueError("socratic_rollouts: question_idx must be unique in a batch; the noise is keyed by it")
    if engine.has_work:
        raise ValueError("socratic_rollouts: the engine must be idle, got unfinished requests; step until it is done")
    bridge = bridge or Bridge(tokenizer, guidance_limit=options.guidance_limit)
    if bridge.guidance_limit != options.guidance_limit:
        raise ValueError(
            f"socratic_rollouts: bridge.guidance_limit must be options.guidance_limit {options.guidance_limit}, "
            f"got {bridge.guidance_limit}; make both from one number"
        )
    driver = _Driver(
        engine=engine,
        bridge=bridge,
        teacher=as_teacher(teacher),
        grader=as_grader(grader),
        params=replace(params, n=1),
        options=options,
        batch_idx=next(_fresh_batches) if batch_idx is None else batch_idx,
    )
    try:
        for question in questions:
            driver.start(question)
        while engine.has_work or driver.waiting:
            driver.arrived += engine.step()
            driver.take_arrived()
            teacher_worked = bool(driver.waiting) and driver.teacher.step()
            driver.collect_guidance(idle=not engine.has_work and not teacher_worked)
            yield from driver.take_finished()
    finally:
        driver.abandon()


def socratic_episode(
    question: Question,
    *,
    generate: Callable[[list[int]], Sequence[int]],
    teacher: Teacher | TeacherFunction,
    grader: Grader,
    bridge: Bridge,
    options: RolloutOptions,
    max_new_tokens: int,
    max_tokens: int,
) -> Rollout:
    """Play one episode with anybody's generator.

    Args:
        generate:       token ids of a context -> ids that were sampled behind it, the end of turn
                        included; at least one and at most max_new_tokens.
        bridge:         the student's chat template; its guidance_limit must be that of the options.
        max_new_tokens: that the generator samples at most.
        max_tokens:     that a context and its attempt may have together.

    Returns:
        the rollout. Its attempts have no log-probs (NaN): recompute them before training.

    Raises:
        ValueError: the generator returned no token, or more than max_new_tokens.
    """
    limits, guide = Limits(max_new_tokens, max_tokens), as_teacher(teacher)
    episode = Episode(question, bridge=bridge, grader=grader, options=options, limits=limits)
    rollout = episode.rollout
    while True:
        turn_idx = len(rollout.turns)
        token_ids = list(generate(rollout.context_ids(turn_idx)))
        if not 1 <= len(token_ids) <= max_new_tokens:
            raise ValueError(
                f"socratic_episode: generate must return 1 to {max_new_tokens} token ids, got {len(token_ids)}"
            )
        unknown = torch.full((len(token_ids),), torch.nan)
        attempt = Attempt(
            token_ids=token_ids,
            logprobs=unknown,
            kept_mass=unknown,
            finish_reason="stop" if token_ids[-1] in bridge.eos_ids else "length",
            key=RolloutKey(0, question.question_idx),
            rollout_idx=0,
            attempt_idx=turn_idx,
            policy_version=0,
        )
        request = episode.attempted(attempt)
        if request is None:
            break
        asked, since = ask(guide, request, options.guidance_timeout_s), time.perf_counter()
        while not asked.done():
            if not guide.step():
                wait([asked], timeout=0.02)
        rollout.teacher_wait_s += time.perf_counter() - since
        if episode.guided(result_of(asked)) is None:
            break
    tell(episode)
    return rollout


@dataclass(kw_only=True)
class _Driver:
    """The episodes in flight of one batch, on one engine."""

    engine: Engine
    bridge: Bridge
    teacher: Teacher
    grader: Grader
    params: SamplingParams
    options: RolloutOptions
    batch_idx: int
    # By (question_idx, rollout_idx).
    in_flight: dict[tuple[int, int], Episode] = field(default_factory=dict)
    # For the teacher, and since when.
    waiting: dict[Future[Guidance | None], tuple[Episode, float]] = field(default_factory=dict)
    arrived: list[Attempt] = field(default_factory=list)  # sampled, not yet an episode's
    finished: list[Rollout] = field(default_factory=list)

    def start(self, question: Question) -> None:
        prompt_ids = self.bridge.prompt_ids(question.messages)
        params = replace(self.params, n=self.options.group_size)
        self.engine.submit(prompt_ids, params, key=(self.batch_idx, question.question_idx))
        limits = Limits(self.params.max_new_tokens, self.engine.max_tokens)
        for idx in range(params.n):
            self.in_flight[question.question_idx, idx] = Episode(
                question,
                bridge=self.bridge,
                grader=self.grader,
                options=self.options,
                limits=limits,
                rollout_idx=idx,
                prompt_ids=prompt_ids,
            )

    def take_arrived(self) -> None:
        """Hand attempts to their episodes; their pages stay pinned while the teacher works."""
        while self.arrived:
            attempt = self.arrived[0]
            episode = self.in_flight[attempt.key.question, attempt.rollout_idx]
            request = episode.attempted(attempt)
            self.arrived.pop(0)
            if request is None:
                self.end(episode)
            else:
                asked = ask(self.teacher, request, self.options.guidance_timeout_s)
                self.waiting[asked] = (episode, time.perf_counter())

    def collect_guidance(self, *, idle: bool) -> None:
        """Resume the rollouts whose teacher has answered; when idle, wait for one (at most 20 ms, then look again)."""
        if idle and self.waiting:
            wait(self.waiting, timeout=0.02, return_when=FIRST_COMPLETED)
        for future in [future for future in self.waiting if future.done()]:
            episode, since = self.waiting.pop(future)
            episode.rollout.teacher_wait_s += time.perf_counter() - since
            context = episode.guided(result_of(future))
            if context is None:
                self.end(episode)
                continue
            attempt = episode.rollout.turns[-1].attempt
            kept_tokens, suffix_ids = context
            self.engine.resume(attempt, suffix_ids, self.params, kept_tokens=kept_tokens)

    def end(self, episode: Episode) -> None:
        rollout = episode.rollout
        tell(episode)
        self.engine.release(rollout.attempts[-1:])
        del self.in_flight[rollout.question_idx, rollout.rollout_idx]
        self.finished.append(rollout)

    def take_finished(self) -> list[Rollout]:
        finished, self.finished = self.finished, []
        return finished

    def abandon(self) -> None:
        """Leave nothing behind when the caller stops early: no call in flight, no sequence, no page."""
        for future in self.waiting:
            future.cancel()
        for episode in self.in_flight.values():
            self.engine.cancel((self.batch_idx, episode.rollout.question_idx))
            self.engine.release(episode.rollout.attempts)
        self.engine.release(self.arrived)


def tell(episode: Episode) -> None:
    """What the episode has to say to a person."""
    for note in episode.notes:
        warnings.warn(note, stacklevel=3)


def ask(teacher: Teacher, request: GuidanceRequest, timeout_s: float) -> Future[Guidance | None]:
    """Start teacher.guide(request); an immediate teacher has answered on return, so runs with one are repeatable."""
    future = background(asyncio.wait_for(teacher.guide(request), timeout_s))
    if teacher.immediate:
        wait([future])
    return future


def result_of(future: Future[Guidance | None]) -> Guidance | None:
    """What the teacher said; None, with a warning, when it raised, was cancelled or took too long."""
    try:
        return future.result(timeout=0)
    except CancelledError:
        warnings.warn("teacher: guide() was cancelled", stacklevel=3)
    except Exception as error:  # noqa: BLE001 - whatever a teacher raises costs its own rollout, and is told
        warnings.warn(f"teacher: guide() failed with {type(error).__name__}: {error}", stacklevel=3)
    return None


def background(coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Run a coroutine on the process's one background event loop (a pooled HTTP client lives on one loop)."""
    return asyncio.run_coroutine_threadsafe(coroutine, _event_loop())


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    started = threading.Event()

    def run() -> None:
        loop.call_soon(started.set)
        loop.run_forever()

    threading.Thread(target=run, name="socpo-teachers", daemon=True).start()
    started.wait()
    return loop
