"""Runs a teacher that is a Hugging Face folder, with a second engine in this process.

    event loop's thread                        caller's thread, between the student's steps
    guide_in_time(): queues a request  ---->   step(): submits what is queued, advances the engine
    awaits the answer                  <----           and hands finished texts back

A step of a model reads all of its weights, however few requests it advances. So the teacher batches
requests. On a GPU it starts when MIN_QUEUED_REQUESTS are queued or the student has nothing to do;
from then on requests join at once. Its steps run on their own stream while the student decodes: a
step is launched, and collected when the student's next tokens have been launched.

On a CPU teacher and student need the same cores. They take turns, each until it has nothing to do,
which makes the fewest and fullest steps.
"""

import asyncio
from itertools import takewhile
from math import inf
from queue import SimpleQueue
from typing import NamedTuple

from socpo_fast.engine import Engine
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.teachers.base import Teacher, TeacherPrompt, clean_guidance
from socpo_fast.socratic.thoughts import TEACHER_MARKS, opened_thoughts
from socpo_fast.socratic.vocabulary import check_vocabulary
from socpo_fast.types import Guidance, GuidanceFailed, GuidanceRequest, RolloutKey, SamplingParams

MIN_QUEUED_REQUESTS = 16  # on a GPU, requests that start the teacher while the student is busy


class _Pending(NamedTuple):
    """A request on its way through the engine."""

    request: GuidanceRequest
    started: asyncio.Event  # set when the engine takes the request, which starts its time limit
    answer: asyncio.Future[str | GuidanceFailed]


class LocalTeacher(Teacher):
    """A teacher with its own engine.

    Args:
        engine: holds the teacher's weights; nothing else may submit to it. A request that does not
                fit into it gets no guidance.
        bridge: the bridge of the teacher's tokenizer. If its template has no system messages, the
                system prompt becomes the beginning of the user message.
        prompt: makes the messages of a request.
        params: sampling; n is 1.
    """

    def __init__(
        self, engine: Engine, *, bridge: Bridge, prompt: TeacherPrompt, params: SamplingParams
    ):
        self.engine = engine
        self.bridge = bridge
        self._prompt = prompt
        self._params = params
        # Some templates open the thoughts in the generation prompt, so a text has no opening mark.
        self._in_thoughts = bool(opened_thoughts(bridge.after, TEACHER_MARKS))
        self._prompt_limit = engine.max_tokens - params.max_new_tokens
        if self._prompt_limit < 1:
            raise ValueError(
                f"teacher.max_new_tokens must be < the teacher's context of {engine.max_tokens} "
                "tokens, "
                f"got {params.max_new_tokens}; lower it or raise teacher.kv_cache_gib"
            )
        check_vocabulary(bridge.tokenizer, engine.student.config.vocab_size)
        self.shares_cpu = engine.student.lm_head.weight.is_cpu
        # On a CPU requests wait until the student has nothing to do.
        self.min_queued = inf if self.shares_cpu else MIN_QUEUED_REQUESTS
        self.prefix_ids = self._common_prefix()[: self._prompt_limit]
        self.queued: SimpleQueue[_Pending] = SimpleQueue()
        self.running: dict[RolloutKey, _Pending] = {}

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        pending = _Pending(request, asyncio.Event(), asyncio.get_running_loop().create_future())
        self.queued.put(pending)
        try:
            await pending.started.wait()
            async with asyncio.timeout(timeout_s):
                outcome = await pending.answer
        finally:
            # If the wait ended early, step() sees a cancelled answer and drops the request.
            pending.answer.cancel()
        if isinstance(outcome, GuidanceFailed):
            raise outcome
        return Guidance(text=outcome)

    def step(self, *, student_is_idle: bool = True) -> bool:
        """Submits requests and advances the engine; False if there is nothing to do now."""
        try:
            for key in [key for key, pending in self.running.items() if pending.answer.done()]:
                self.engine.cancel(key)  # the caller no longer waits
                del self.running[key]
            if self.running or student_is_idle or self.queued.qsize() >= self.min_queued:
                self._submit_queued()
            if not self.running:
                return False
            self.engine.launch()
            if student_is_idle or self.engine.is_ready:
                for attempt in self.engine.collect():
                    self.engine.release([attempt])
                    _resolve(self.running.pop(attempt.key), self.message(attempt.token_ids))
            return True
        # Ctrl-C, too, may have stopped the engine in the middle of a step.
        except BaseException:
            self._drop_requests()
            raise

    async def aclose(self) -> None:
        """Drops all requests. No other thread may be in step() meanwhile."""
        self._drop_requests()

    def _drop_requests(self) -> None:
        """Ends all requests without guidance, and resets the engine."""
        dropped = list(self.running.values())
        self.running.clear()
        while not self.queued.empty():
            dropped.append(self.queued.get_nowait())
        for pending in dropped:
            _resolve(pending, GuidanceFailed("exception", "the teacher was closed"))
        self.engine.reset()

    def _submit_queued(self) -> None:
        """Submits the queued requests to the engine; those that cannot run get their failure."""
        # All prompts share a prefix. It is prefilled once, and its pages are kept.
        if self.prefix_ids and not self.running and not self.queued.empty():
            self.engine.keep_prefix(self.prefix_ids)
        for _ in range(self.queued.qsize()):
            pending = self.queued.get_nowait()
            key = _noise_key(pending.request)
            if pending.answer.done():  # the caller no longer waits
                continue
            # The same request may come again after its first caller gave up. Then it waits here
            # until the first one has left the engine.
            if key in self.running:
                self.queued.put(pending)
                continue
            try:
                prompt_ids = self.prompt_ids(pending.request)
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
            self.running[key] = pending
            self.engine.submit(prompt_ids, self._params, key=key)
            pending.answer.get_loop().call_soon_threadsafe(pending.started.set)

    def message(self, token_ids: list[int]) -> str | GuidanceFailed:
        """Returns the message in what the teacher sampled, or the reason that there is none.

        Special tokens are dropped last, since in some models the marks of thoughts are special.
        """
        try:
            message = clean_guidance(
                self.bridge.exact_text(token_ids), in_thoughts=self._in_thoughts
            )
            return clean_guidance(self.bridge.decode(self.bridge.trusted_ids(message)))
        except GuidanceFailed as failure:
            return failure

    def _common_prefix(self) -> list[int]:
        """Returns the ids that all prompts begin with: the system prompt, the user header, ..

        It compares the prompts of two requests that have no text in common.
        """
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
            for text in ("0", "x")
        ]
        pairs = zip(*map(self.prompt_ids, requests), strict=False)
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def prompt_ids(self, request: GuidanceRequest) -> list[int]:
        """Returns the prompt of a request. Its texts are untrusted: one is the student's."""
        messages = self._prompt.messages(request)
        if not self.bridge.takes_system:
            messages = [{"role": "user", "content": "\n\n".join(m["content"] for m in messages)}]
        return self.bridge.untrusted_prompt_ids(messages)


def _noise_key(request: GuidanceRequest) -> RolloutKey:
    """Returns an engine key that no other request has, so that each draws its own noise.

    An engine key has two numbers, (batch, question). The second one becomes

        bits    63 .. 24    23 .. 8    7 .. 0
                question    rollout    attempt
    """
    assert request.rollout_idx < 2**16, request.rollout_idx
    assert request.attempt_idx < 2**8, request.attempt_idx
    return RolloutKey(
        request.key.batch,
        request.key.question << 24 | request.rollout_idx << 8 | request.attempt_idx,
    )


def _resolve(pending: _Pending, outcome: str | GuidanceFailed) -> None:
    """Sets the answer on the thread of its event loop, unless the caller no longer waits."""

    def set_answer() -> None:
        pending.started.set()
        if not pending.answer.done():
            pending.answer.set_result(outcome)

    pending.answer.get_loop().call_soon_threadsafe(set_answer)
