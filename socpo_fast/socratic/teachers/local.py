"""A teacher that is a Hugging Face folder, run by a second engine in this process.

guide() runs on the event loop's thread and only queues; step() runs on the engine's thread, takes
what is queued, advances the engine and hands finished texts back to the loop.

A step of a model reads all of its weights, however few requests it advances. So the teacher waits
for company: on a GPU until ENOUGH_REQUESTS are there or the student has nothing to do; from then on
requests join it at once. Its steps are under way on a stream of its own while the student decodes:
they are launched, and looked at again when the student's next tokens are launched. On a CPU both
need the same cores, so they take turns, each until it has nothing to do: that makes the fewest and
fullest steps.
"""

import asyncio
import re
from itertools import takewhile
from math import inf
from queue import SimpleQueue
from typing import NamedTuple

from socpo_fast.engine import Engine
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.teachers.base import THOUGHTS, Teacher, TeacherPrompt, clean_guidance
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest, RolloutKey, SamplingParams

ENOUGH_REQUESTS = 16


class _Pending(NamedTuple):
    request: GuidanceRequest
    started: asyncio.Event  # its clock, when the engine takes it
    answer: asyncio.Future[str | GuidanceFailed]


class LocalTeacher(Teacher):
    """Guidance by an engine of its own.

    Args:
        engine: holds the teacher's weights; nobody else submits to it. A request that it cannot
                hold gets no guidance.
        bridge: of the teacher's own tokenizer. Where its template has no system messages, that text
                opens the user's.
        prompt: the words it is asked in.
        params: sampling; n is 1.
    """

    def __init__(
        self, engine: Engine, *, bridge: Bridge, prompt: TeacherPrompt, params: SamplingParams
    ):
        self._engine = engine
        self._bridge = bridge
        self._prompt = prompt
        self._params = params
        self._in_thoughts = any(
            re.search(rf"{opening.pattern}\s*$", bridge.after) for opening, _ in THOUGHTS
        )
        self._prompt_limit = engine.max_tokens - params.max_new_tokens
        if self._prompt_limit < 1:
            raise ValueError(
                f"teacher.max_new_tokens must be < the teacher's context of {engine.max_tokens} "
                "tokens, "
                f"got {params.max_new_tokens}; lower it or raise teacher.kv_cache_gib"
            )
        self.occupies_host = engine.student.lm_head.weight.is_cpu
        self._enough = inf if self.occupies_host else ENOUGH_REQUESTS
        self._prefix_ids = self._common_prefix()[: self._prompt_limit]
        self._arrived: SimpleQueue[_Pending] = SimpleQueue()
        self._running: dict[RolloutKey, _Pending] = {}

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        pending = _Pending(request, asyncio.Event(), asyncio.get_running_loop().create_future())
        self._arrived.put(pending)
        try:
            await pending.started.wait()
            async with asyncio.timeout(timeout_s):
                outcome = await pending.answer
        finally:
            pending.answer.cancel()  # so that step() learns of it, wherever we stopped waiting
        if isinstance(outcome, GuidanceFailed):
            raise outcome
        return Guidance(text=outcome)

    def step(self, *, student_is_idle: bool = True) -> bool:
        try:
            for key in [key for key, pending in self._running.items() if pending.answer.done()]:
                self._engine.cancel(key)  # whoever asked has given up
                del self._running[key]
            if self._running or student_is_idle or self._arrived.qsize() >= self._enough:
                self._submit_arrived()
            if not self._running:
                return False
            self._engine.launch()
            if student_is_idle or self._engine.is_ready:
                for attempt in self._engine.collect():
                    self._engine.release([attempt])
                    _resolve(self._running.pop(attempt.key), self._message(attempt.token_ids))
            return True
        except BaseException:  # the engine may have stopped in the middle of something
            self._drop_requests()
            raise

    async def aclose(self) -> None:
        """Drop what is queued or under way; nobody may be in step() meanwhile."""
        self._drop_requests()

    def _drop_requests(self) -> None:
        """Nobody who asked gets guidance, and the engine is as new."""
        dropped = list(self._running.values())
        self._running.clear()
        while not self._arrived.empty():
            dropped.append(self._arrived.get_nowait())
        for pending in dropped:
            _resolve(pending, GuidanceFailed("exception", "the teacher was closed"))
        self._engine.reset()

    def _submit_arrived(self) -> None:
        if self._prefix_ids and not self._running and not self._arrived.empty():
            self._engine.keep_prefix(self._prefix_ids)
        for _ in range(self._arrived.qsize()):
            pending = self._arrived.get_nowait()
            key = _noise_key(pending.request)
            if pending.answer.done():  # given up before it was started
                continue
            if (
                key in self._running
            ):  # an earlier asker gave up and asks again: wait for the one under way to end
                self._arrived.put(pending)
                continue
            try:
                prompt_ids = self._prompt_ids(pending.request)
            except Exception as error:  # noqa: BLE001 - a template may refuse a text
                _resolve(pending, GuidanceFailed("exception", f"chat template: {error}"))
                continue
            if len(prompt_ids) > self._prompt_limit:
                reason = (
                    f"{len(prompt_ids)} tokens, the teacher's context has room for "
                    f"{self._prompt_limit}"
                )
                _resolve(pending, GuidanceFailed("too_long", reason))
                continue
            self._running[key] = pending
            self._engine.submit(prompt_ids, self._params, key=key)
            pending.answer.get_loop().call_soon_threadsafe(pending.started.set)

    def _message(self, token_ids: list[int]) -> str | GuidanceFailed:
        """Special tokens are dropped last: the marks of thoughts are among them in some models."""
        try:
            message = clean_guidance(
                self._bridge.exact_text(token_ids), in_thoughts=self._in_thoughts
            )
            return clean_guidance(self._bridge.decode(self._bridge.trusted_ids(message)))
        except GuidanceFailed as failure:
            return failure

    def _common_prefix(self) -> list[int]:
        """What all prompts begin with: the system prompt and what opens the user's message."""
        texts = ("0", "x")
        requests = [
            GuidanceRequest(
                question=text,
                student_answer=text,
                ground_truth=text,
                reference_solution=text,
                key=RolloutKey(0, 0),
                rollout_idx=0,
                attempt_idx=0,
            )
            for text in texts
        ]
        pairs = zip(*map(self._prompt_ids, requests), strict=False)
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def _prompt_ids(self, request: GuidanceRequest) -> list[int]:
        messages = self._prompt.messages(request)
        if not self._bridge.takes_system:
            messages = [{"role": "user", "content": "\n\n".join(m["content"] for m in messages)}]
        return self._bridge.untrusted_prompt_ids(messages)


def _noise_key(request: GuidanceRequest) -> RolloutKey:
    """A key of its own for each request, since engine keys name prompts only: (batch, question,
    rollout, attempt).
    """
    assert request.rollout_idx < 2**16, request.rollout_idx
    assert request.attempt_idx < 2**8, request.attempt_idx
    return RolloutKey(
        request.key.batch,
        request.key.question << 24 | request.rollout_idx << 8 | request.attempt_idx,
    )


def _resolve(pending: _Pending, outcome: str | GuidanceFailed) -> None:
    """Set the future on its own loop's thread, unless whoever waited has given up."""

    def set_answer() -> None:
        pending.started.set()
        if not pending.answer.done():
            pending.answer.set_result(outcome)

    pending.answer.get_loop().call_soon_threadsafe(set_answer)
