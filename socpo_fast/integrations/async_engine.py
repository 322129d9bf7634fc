"""Serves an engine to many tasks: each awaits its own request, all run in one continuous batch.

For agent loops like verl's, which know their rollouts by a request_id only. Read generate, _start,
then _step. All work on the engine is a job of one thread. A step is such a job, too, and queues the
next one behind the calls that have arrived meanwhile:

    tasks, on any event loop    generate    generate   end                 run
                                    v           v       v                   v
    engine's thread              _start step _start  _end   step step step  call step ..
"""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import TypeVar

import torch

from socpo_fast.engine import Engine, fresh_batch
from socpo_fast.ops._checks import check_rule
from socpo_fast.socratic.rollout import check_idle
from socpo_fast.types import Attempt, RolloutKey, SamplingParams

Result = TypeVar("Result")


@dataclass(eq=False, kw_only=True)
class _Request:
    """One call of generate. When its attempt has finished, it waits for a follow-up prompt."""

    request_id: str
    row: list[int]  # the prompt; with the sampled tokens behind it once they are known
    params: SamplingParams
    key: RolloutKey = field(init=False)  # set when it starts
    attempt: Attempt | None = None  # None: in flight
    idle_since: float = 0.0  # time.monotonic of the end of its attempt
    answer: Future[Attempt] = field(default_factory=Future)


class AsyncEngine(AbstractAsyncContextManager["AsyncEngine"]):
    """Awaitable generation by request_id over one Engine.

        async with AsyncEngine(engine) as server:
            attempt = await server.generate("a", prompt_ids, params)
            second = await server.generate("a", [*prompt_ids, *attempt.token_ids, *more], params)

    The second prompt is prefilled from where it leaves the row of the first attempt, whose pages
    were kept. Methods may be called from any task, event loop and thread. The engine itself must
    not be used while it is served, except by functions given to `run`.

    A request has a sampling key of its own (`attempt.key`), numbered in the order of arrival. So
    its tokens do not depend on the requests that run with it: `Engine.generate` under that key
    samples the same ones.

    Args:
        engine:     an idle engine.
        max_idle_s: seconds; a request without a follow-up for so long is ended by the next
                    generate.

    Raises:
        ValueError: the engine is busy, or driven by another thread.
    """

    def __init__(self, engine: Engine, *, max_idle_s: float = 600.0):
        check_idle("AsyncEngine", engine)
        self._engine = engine
        self._max_idle_s = max_idle_s
        self._batch = fresh_batch()
        self._numbers = count()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="socpo-engine")
        engine.driven_by = self._thread.submit(threading.get_ident).result()
        self._closing: Future[None] | None = None
        # The following belong to the engine's thread.
        self._requests: dict[str, _Request] = {}
        # Called once: by aclose, or when neither callers nor jobs of the thread hold this object.
        self._give_back = weakref.finalize(self, _give_back, engine, self._requests)
        self._give_back.atexit = False
        self._in_flight: dict[RolloutKey, _Request] = {}
        self._is_stepping = False  # whether a step is queued

    async def generate(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> Attempt:
        """Samples behind a prompt; a later prompt of the same request goes on from its pages.

        If the await is cancelled, the request is ended and gives its pages back.

        Raises:
            ValueError: the request is in flight, params.n is not 1, or the engine refuses the
                prompt. A finished request can still be followed up then.
            RuntimeError: a step of the engine failed, which ends all requests; or this request or
                the AsyncEngine was ended.
        """
        check_rule("AsyncEngine", "params.n", params.n, params.n == 1, "1", "call generate n times")
        request = _Request(request_id=request_id, row=list(prompt_ids), params=params)
        # From here on the future cannot be cancelled, so the engine's thread can always set it.
        request.answer.set_running_or_notify_cancel()
        self._queue(self._start, request)
        try:
            return await asyncio.wrap_future(request.answer)
        except asyncio.CancelledError:
            with suppress(RuntimeError):  # closed meanwhile, which has ended it
                self._queue(self._end, request)
            raise

    def end(self, request_id: str) -> None:
        """Ends a request and gives its pages back, soon; an unknown one is no error.

        If it is in flight, its generate raises RuntimeError.
        """
        with suppress(RuntimeError):  # closed, so it has ended
            self._queue(lambda: self._end(self._requests.get(request_id)))

    async def run(self, function: Callable[[], Result]) -> Result:
        """Calls a function on the engine's thread between two steps; requests go on after it.

        It may read the engine and change the weights, for example by an optimizer's step or
        `engine.update_weights(..)`. It must not submit to the engine, step or reset it.
        """
        return await asyncio.wrap_future(self._queue(function))

    async def aclose(self) -> None:
        """Ends all requests and the thread; the engine is then idle and can be used as before."""
        if self._closing is None:
            self._closing = self._thread.submit(self._close)
        await asyncio.shield(asyncio.wrap_future(self._closing))

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()

    def _queue(self, job: Callable[..., Result], *args: object) -> Future[Result]:
        """Queues a job for the engine's thread. All methods below are such jobs or parts of them.

        Raises:
            RuntimeError: the AsyncEngine is closed.
        """
        self._check_open()
        return self._thread.submit(job, *args)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise RuntimeError("AsyncEngine: must be open, got a closed one; make a new one")

    def _start(self, request: _Request) -> None:
        """Queues a request in the engine, behind its kept pages if it has some."""
        try:
            self._check_open()
            self._end_idle()
            old = self._requests.get(request.request_id)
            check_rule(
                "AsyncEngine",
                "request_id",
                request.request_id,
                old is None or old.attempt is not None,
                "one that is not in flight",
                "await it first, or take another one",
            )
            self._enqueue(request, old.row if old else [], old.attempt if old else None)
        except Exception as error:  # noqa: BLE001 - the request's own; nothing has started
            request.answer.set_exception(error)
        else:
            self._requests[request.request_id] = request
            self._in_flight[request.key] = request
            self._go_on()

    def _enqueue(self, request: _Request, old_row: list[int], attempt: Attempt | None) -> None:
        """Resumes the row of the last attempt as far as the prompt agrees with it, or submits."""
        pairs = zip(old_row, request.row, strict=False)
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # One token must be left to prefill: its hidden state is what the first draw needs.
        num_kept = min(num_common, len(request.row) - 1)
        if attempt and num_kept > 0:
            request.key = attempt.key
            suffix_ids = request.row[num_kept:]
            self._engine.resume(attempt, suffix_ids, request.params, kept_tokens=num_kept)
            return
        request.key = RolloutKey(self._batch, next(self._numbers))
        self._engine.submit(request.row, request.params, key=request.key)
        if attempt:
            self._engine.release([attempt])

    def _go_on(self) -> None:
        """Queues a step if there is work and none is queued yet."""
        if self._in_flight and not self._is_stepping:
            self._is_stepping = True
            self._thread.submit(self._step)

    def _step(self) -> None:
        """Advances the engine by one step, answers finished requests and queues the next step."""
        self._is_stepping = False
        if not self._in_flight:  # all were ended after this step was queued
            return
        try:
            # A new thread's current device is the first card; kernels go to the current device.
            with torch.cuda.device_of(self._engine.student.lm_head.weight):
                attempts = self._engine.step()
            for attempt in attempts:
                request = self._in_flight.pop(attempt.key)
                request.attempt = attempt
                request.row += attempt.token_ids
                request.idle_since = time.monotonic()
                request.answer.set_result(attempt)
        except BaseException as error:  # noqa: BLE001 - every waiting task gets it
            try:
                self._engine.reset()
            finally:
                for request in list(self._requests.values()):
                    self._end(request, cause=error)
        self._go_on()

    def _end(self, request: _Request | None, cause: BaseException | None = None) -> None:
        """Ends a request, finished or in flight, unless it has ended or was followed up."""
        if request is None or self._requests.get(request.request_id) is not request:
            return
        del self._requests[request.request_id]
        if request.attempt:
            self._engine.release([request.attempt])
        else:
            del self._in_flight[request.key]
            self._engine.cancel(request.key)
            reason = f"a failed step, {type(cause).__name__}: {cause}" if cause else "end or aclose"
            failure = RuntimeError(
                f"AsyncEngine: request {request.request_id!r} must finish before it is ended, got "
                f"{reason}; ask again"
            )
            failure.__cause__ = cause
            request.answer.set_exception(failure)

    def _end_idle(self) -> None:
        """Ends finished requests that have waited for a follow-up for too long."""
        limit = time.monotonic() - self._max_idle_s
        for request in list(self._requests.values()):
            if request.attempt and request.idle_since < limit:
                self._end(request)

    def _close(self) -> None:
        """Ends all requests and gives the engine back. It is the last job of a caller."""
        try:
            for request in list(self._requests.values()):
                self._end(request)
        finally:
            self._give_back()
            self._thread.shutdown(wait=False)


def _give_back(engine: Engine, requests: dict[str, _Request]) -> None:
    """Lets others use an engine again, without pages or keys of requests that nobody ended."""
    engine.release(request.attempt for request in requests.values() if request.attempt)
    engine.driven_by = None
