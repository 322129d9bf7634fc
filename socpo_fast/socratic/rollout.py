"""The Socratic loop: answer, grade, guide, answer again. Read socratic_rollouts, then _Episodes.finish_attempt.

The engine and the teacher overlap. Teachers are coroutines on one background event loop; between two engine steps the
loop here collects what they said and resumes those rollouts on the pages of their first attempt, so a slow teacher
delays nobody but the rollout it belongs to. Tokens are never decoded and encoded again: text is for grader and teacher.
"""

from __future__ import annotations

import asyncio
import threading
import time
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from socpo_fast.engine import Engine
from socpo_fast.ops._checks import check_word
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.history import context_ids, template_bridge
from socpo_fast.socratic.leak import leaks_answer, mask_answer
from socpo_fast.socratic.teachers import Teacher
from socpo_fast.types import Attempt, EndReason, Guidance, GuidanceRequest, Question, Rollout, SamplingParams

ELISION = "\n[...]\n"
Context = Literal["tokens", "template"]
OnLeak = Literal["keep", "drop", "mask"]


def socratic_rollouts(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    teacher: Teacher,
    grader: Grader,
    params: SamplingParams,
    group_size: int,
    max_attempts: int,
    bridge: Bridge | None = None,
    batch_idx: int = 0,
    attempt_limit: int = 1024,
    guidance_limit: int = 2048,
    context: Context = "tokens",
    on_leak: OnLeak = "keep",
    view: Literal["head_tail", "head"] = "head_tail",
    reveal_answer: bool = False,
    show_reference: bool = False,
    timeout_s: float = 120.0,
) -> Iterator[Rollout]:
    """Roll out group_size episodes of every question; yields each Rollout as it finishes, its pages given back.

    Args:
        params:         sampling of every attempt; its n is replaced by group_size.
        max_attempts:   K >= 1; 1 never asks the teacher.
        bridge:         the tokenizer's, where the caller has one already; it carries its own guidance_limit.
        batch_idx:      with question_idx the name of the sampling noise: the same one gives the same tokens.
        attempt_limit:  tokens of a wrong attempt that the next one sees; the rest stays in the rollout and is trained.
        guidance_limit: tokens of the teacher's message that the student sees.
        context:        "tokens": the next attempt sees what was sampled; "template": what the chat template makes of it
                        once it is history (see history.py). What was sampled is trained either way.
        on_leak:        guidance that states the answer (see leak.py) is shown, ends the rollout as "leaked", or is
                        shown with "[...]" in place of the answer. Rollout.said keeps what the teacher said.
        view:           what the teacher sees of an attempt longer than attempt_limit.
        timeout_s:      for one guidance, retries included; after it the rollout ends as "guidance_failed".

    Raises:
        ValueError: numbers out of range, a question twice, a prompt that can never fit, a busy engine.
    """
    if group_size < 1 or max_attempts < 1 or attempt_limit < 1:
        raise ValueError(
            "socratic_rollouts: group_size, max_attempts and attempt_limit must be >= 1, "
            f"got {group_size}, {max_attempts}, {attempt_limit}"
        )
    check_word("socratic_rollouts", "context", context, get_args(Context))
    check_word("socratic_rollouts", "on_leak", on_leak, get_args(OnLeak))
    if len({question.question_idx for question in questions}) != len(questions):
        raise ValueError("socratic_rollouts: question_idx must be unique in a batch; the noise is keyed by it")
    if engine.has_work:
        raise ValueError("socratic_rollouts: the engine must be idle, got unfinished requests; step until it is done")
    episodes = _Episodes(
        engine=engine,
        bridge=bridge or Bridge(tokenizer, guidance_limit=guidance_limit),
        teacher=teacher,
        grader=grader,
        params=replace(params, n=1),
        max_attempts=max_attempts,
        batch_idx=batch_idx,
        attempt_limit=attempt_limit,
        context=context,
        on_leak=on_leak,
        view=view,
        reveal_answer=reveal_answer,
        show_reference=show_reference,
        timeout_s=timeout_s,
    )
    try:
        for question in questions:
            episodes.start(question, replace(params, n=group_size))
        while engine.has_work or episodes.waiting:
            for attempt in engine.step():
                episodes.finish_attempt(attempt)
            teacher_worked = bool(episodes.waiting) and teacher.step()
            episodes.collect_guidance(idle=not engine.has_work and not teacher_worked)
            yield from episodes.take_finished()
    finally:
        episodes.abandon()


@dataclass(kw_only=True)
class _Episodes:
    """The rollouts in flight of one batch."""

    engine: Engine
    bridge: Bridge
    teacher: Teacher
    grader: Grader
    params: SamplingParams
    max_attempts: int
    batch_idx: int
    attempt_limit: int
    context: Context
    on_leak: OnLeak
    view: Literal["head_tail", "head"]
    reveal_answer: bool
    show_reference: bool
    timeout_s: float

    def __post_init__(self) -> None:
        self.questions: dict[int, Question] = {}
        self.rollouts: dict[tuple[int, int], Rollout] = {}  # in flight, by (question_idx, rollout_idx)
        self.waiting: dict[Future[Guidance | None], tuple[Rollout, float]] = {}  # for the teacher; since when
        self.finished: list[Rollout] = []

    def start(self, question: Question, params: SamplingParams) -> None:
        prompt_ids = self.bridge.prompt_ids(question.messages)
        self.engine.submit(prompt_ids, params, key=(self.batch_idx, question.question_idx))
        self.questions[question.question_idx] = question
        for i in range(params.n):
            self.rollouts[question.question_idx, i] = Rollout(
                question_idx=question.question_idx,
                rollout_idx=i,
                prompt_ids=prompt_ids,
                data_source=question.data_source,
            )

    def finish_attempt(self, attempt: Attempt) -> None:
        """Grade; stop when right or out of attempts; otherwise ask the teacher while the pages stay pinned."""
        rollout = self.rollouts[attempt.key.question, attempt.rollout_idx]
        question = self.questions[rollout.question_idx]
        text = self.bridge.decode(attempt.token_ids)
        is_correct = self.grader(text, question)
        rollout.attempts.append(attempt)
        rollout.texts.append(text)
        rollout.is_correct.append(is_correct)
        rollout.rewards.append(float(is_correct))
        if is_correct or len(rollout.attempts) == self.max_attempts:
            self.end(rollout, "correct" if is_correct else "max_attempts")
            return
        request = GuidanceRequest(
            question=question.text,
            student_answer=self.visible_text(attempt.token_ids),
            ground_truth=question.ground_truth if self.reveal_answer else None,
            reference_solution=question.reference_solution if self.show_reference else None,
            key=attempt.key,
            rollout_idx=attempt.rollout_idx,
            attempt_idx=attempt.attempt_idx,
        )
        self.waiting[ask(self.teacher, request, self.timeout_s)] = (rollout, time.perf_counter())

    def collect_guidance(self, *, idle: bool) -> None:
        """Resume the rollouts whose teacher has answered; when idle, wait for one (at most 20 ms, then look again)."""
        if idle and self.waiting:
            wait(self.waiting, timeout=0.02, return_when=FIRST_COMPLETED)
        for future in [future for future in self.waiting if future.done()]:
            rollout, since = self.waiting.pop(future)
            rollout.teacher_wait_s += time.perf_counter() - since
            guidance = result_of(future)
            if guidance is None:
                self.end(rollout, "guidance_failed")
            else:
                self.guide(rollout, guidance.text.encode("utf-8", "replace").decode())  # half a surrogate pair is none

    def guide(self, rollout: Rollout, text: str) -> None:
        """Show the guidance that fits, or what on_leak leaves of it."""
        question, shown = self.questions[rollout.question_idx], self.bridge.fit(text.strip())
        rollout.said.append(shown)
        if self.on_leak == "drop" and leaks_answer(shown, question):
            self.end(rollout, "leaked")
            return
        # again and again: a shorter text may leak what one did not
        while self.on_leak == "mask" and leaks_answer(shown, question):
            shown = self.bridge.fit(mask_answer(shown, question))
        self.resume(rollout, shown)

    def resume(self, rollout: Rollout, guidance: str) -> None:
        """The next attempt, behind the last one (up to the limit) and the bridge around the guidance."""
        attempt = rollout.attempts[-1]
        cut, bridge = self.next_bridge(rollout, guidance)
        seen = len(context_ids(rollout)) + (attempt.num_tokens if cut is None else cut) + len(bridge)
        if seen + self.params.max_new_tokens > self.engine.max_tokens:
            self.end(rollout, "overflow")
            return
        rollout.cuts.append(cut)
        rollout.bridges.append(bridge)
        rollout.guidance.append(guidance)
        self.engine.resume(attempt, bridge, self.params, cut=cut)

    def next_bridge(self, rollout: Rollout, guidance: str) -> tuple[int | None, list[int]]:
        """How much of the last attempt the next one sees, and what stands between the two."""
        if self.context == "template":
            messages = self.questions[rollout.question_idx].messages
            found = template_bridge(self.bridge, messages, rollout, guidance, attempt_limit=self.attempt_limit)
            if found is not None:
                return found
            warnings.warn(
                f"chat template: cannot render the history of question {rollout.question_idx} rollout "
                f"{rollout.rollout_idx}; it stays as sampled",
                stacklevel=2,
            )
        attempt = rollout.attempts[-1]
        cut = self.attempt_limit if attempt.num_tokens > self.attempt_limit else None
        ended = cut is None and attempt.token_ids[-1] == self.bridge.end_of_turn_id
        return cut, self.bridge.bridge_ids(guidance, ended=ended)

    def end(self, rollout: Rollout, reason: EndReason) -> None:
        rollout.end_reason = reason
        self.engine.release(rollout.attempts[-1:])
        del self.rollouts[rollout.question_idx, rollout.rollout_idx]
        self.finished.append(rollout)

    def take_finished(self) -> list[Rollout]:
        finished, self.finished = self.finished, []
        return finished

    def abandon(self) -> None:
        """Leave nothing behind when the caller stops early: no call in flight, no sequence, no page."""
        for future in self.waiting:
            future.cancel()
        for rollout in self.rollouts.values():
            self.engine.cancel((self.batch_idx, rollout.question_idx))
            self.engine.release(rollout.attempts)

    def visible_text(self, token_ids: Sequence[int]) -> str:
        """What the teacher sees: all, or of a long attempt its head (and its tail, where the final answer stands)."""
        limit = self.attempt_limit
        if len(token_ids) <= limit:
            return self.bridge.decode(token_ids)
        if self.view == "head":
            return self.bridge.decode(token_ids[:limit])
        tail = limit // 2
        head_ids, tail_ids = token_ids[: limit - tail], token_ids[len(token_ids) - tail :]
        return self.bridge.decode(head_ids) + ELISION + self.bridge.decode(tail_ids)


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
