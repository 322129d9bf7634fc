"""Drives episodes with the paged engine. Read socratic_rollouts, _Driver.rounds, then arollouts.

The rules of an episode are in episode.py. Here the engine and the teacher overlap. Teachers are
coroutines on an event loop of another thread. Between two engine steps the loop in _Driver.rounds
collects their guidance and resumes those rollouts on the pages of their earlier attempts. So a slow
teacher delays only the rollout that waits for it.

    engine     launch/collect | launch/collect | launch/collect | ..
                  | attempt is wrong               ^ resume
                  v                                |
    teacher       guide(request) -----------> guidance

                         engine runs in              teacher runs in
    socratic_rollouts    the caller's thread         a background loop (teachers/calls.py)
    arollouts            a thread of the call        the caller's event loop
"""

import asyncio
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from socpo_fast.engine import Engine, fresh_batch
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.teachers import (
    Teacher,
    TeacherFunction,
    as_teacher,
    ask,
    result_of,
    wait_if_immediate,
)
from socpo_fast.socratic.vocabulary import check_vocabulary
from socpo_fast.trace import note_span
from socpo_fast.types import (
    Attempt,
    Guidance,
    Question,
    Rollout,
    SamplingParams,
)

POLL_S = 2e-4  # pause between two polls of a device that student and teacher share


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
    """Rolls out options.group_size episodes of every question; yields each Rollout as it finishes.

    A yielded rollout has given its pages back. If the loop ends early, for whatever reason, no
    sequence, page or call to the teacher is left behind, and the same call can be made again. To
    that end the engine is reset if it was stopped in the middle of a step, or by Ctrl-C.

    Args:
        teacher:   a Teacher, or a plain or async function of the request.
        grader:    text and question -> a bool, a number in [0, 1], or named parts of one. It may
                   be async, too, and then runs on an event loop of another thread.
        params:    sampling of every attempt; its n is replaced by options.group_size.
        options:   the rules of an episode.
        batch_idx: names the sampling noise, together with question_idx: the same index gives the
                   same tokens. None: an index that no other call has.
        bridge:    the bridge of the tokenizer, if the caller has one already. Its guidance_limit
                   must be that of the options.

    Raises:
        ValueError: a question occurs twice or is in flight under this batch_idx, a prompt can never
            fit, the engine is busy, or the bridge has another guidance_limit.
    """
    driver = _make_driver(
        "socratic_rollouts",
        engine,
        tokenizer,
        questions,
        teacher=teacher,
        grader=grader,
        params=params,
        options=options,
        batch_idx=batch_idx,
        bridge=bridge,
    )
    with driver:
        for finished in driver.rounds():
            yield from finished


async def arollouts(
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
) -> AsyncGenerator[Rollout, None]:
    """Does what socratic_rollouts does, as an async iterator: same arguments, same tokens.

    The engine and the grader run in one thread of the call, which goes on while the caller handles
    a rollout. A grader that hangs there is not stopped. An async teacher runs on the caller's event
    loop and may use its clients. A plain function has a thread of its own and never blocks the
    loop. The time limits of both are counted on that loop: what blocks it for long, such as an
    optimizer step in the caller's loop body, takes guidance from the rollouts that wait. The engine
    samples meanwhile, too, so weights must not change before the last rollout.

    A task that is cancelled while it awaits a rollout, and aclose(), wait for the engine's current
    step. Then nothing is left behind and the engine can be used at once. If a break, an error or a
    cancel ends the caller's loop in its body, closing is left to the garbage collector, as for
    every async generator, unless it is written like this:

        async with contextlib.aclosing(arollouts(..)) as rollouts:
            async for rollout in rollouts:
                ..

    Raises:
        ValueError: as socratic_rollouts; or another call of arollouts or an AsyncEngine drives the
            engine.
    """
    loop = asyncio.get_running_loop()
    driver = _make_driver(
        "arollouts",
        engine,
        tokenizer,
        questions,
        teacher=teacher,
        grader=grader,
        params=params,
        options=options,
        batch_idx=batch_idx,
        bridge=bridge,
        loop=loop,
    )
    finished: asyncio.Queue[Rollout | None] = asyncio.Queue()  # None: no more will come
    stop = threading.Event()

    def drive() -> None:
        try:
            # A new thread's current device is the first card; kernels go to the current device.
            with torch.cuda.device_of(engine.student.lm_head.weight), driver:
                for rollouts in driver.rounds():
                    if stop.is_set() or loop.is_closed():
                        break
                    for rollout in rollouts:
                        loop.call_soon_threadsafe(finished.put_nowait, rollout)
        finally:
            engine.driven_by = None

    # A thread of its own: in the loop's default pool it might wait for the teachers that it needs.
    pool = ThreadPoolExecutor(1, thread_name_prefix="socpo-rollouts")
    engine.driven_by = pool.submit(threading.get_ident).result()
    driving = loop.run_in_executor(pool, copy_context().run, drive)
    driving.add_done_callback(lambda _: finished.put_nowait(None))
    pool.shutdown(wait=False)
    try:
        while (rollout := await finished.get()) is not None:
            yield rollout
    finally:
        stop.set()
        await _outlast(driving)
    driving.result()


async def _outlast(future: asyncio.Future[None]) -> None:
    """Waits until a future is done, however often the waiting task is cancelled meanwhile."""
    try:
        await asyncio.wait([future])
    except asyncio.CancelledError:
        await _outlast(future)
        raise


def check_idle(where: str, engine: Engine) -> None:
    """Refuses an engine that has unfinished requests or is driven by another thread."""
    if engine.has_work or engine.driven_by is not None:
        raise ValueError(
            f"{where}: the engine must be idle, got unfinished requests, or an arollouts or "
            "AsyncEngine that drives it in another thread; let these end first"
        )


def _make_driver(
    where: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    teacher: Teacher | TeacherFunction,
    params: SamplingParams,
    options: RolloutOptions,
    batch_idx: int | None,
    bridge: Bridge | None,
    **settings: Any,
) -> "_Driver":
    """Checks the arguments of socratic_rollouts; settings are further fields of the driver."""
    if len({question.question_idx for question in questions}) != len(questions):
        raise ValueError(
            f"{where}: question_idx must be unique in a batch; the noise is keyed by it"
        )
    check_idle(where, engine)
    bridge = bridge or Bridge(tokenizer, guidance_limit=options.guidance_limit)
    check_vocabulary(bridge.tokenizer, engine.student.config.vocab_size)
    return _Driver(
        engine=engine,
        bridge=bridge,
        questions=questions,
        teacher=as_teacher(teacher),
        params=replace(params, n=1),
        options=options,
        batch_idx=fresh_batch() if batch_idx is None else batch_idx,
        **settings,
    )


@dataclass(kw_only=True)
class _Driver:
    """The episodes in flight of one batch, on one engine."""

    engine: Engine
    bridge: Bridge
    questions: Sequence[Question]
    teacher: Teacher
    grader: Grader
    params: SamplingParams
    options: RolloutOptions
    batch_idx: int
    loop: asyncio.AbstractEventLoop | None = None  # where teachers run; None: the background loop
    # Key: (question_idx, rollout_idx).
    in_flight: dict[tuple[int, int], Episode] = field(default_factory=dict)
    # Episodes that wait for the teacher, each with the time of its request.
    waiting: dict[Future[Guidance | None], tuple[Episode, float]] = field(default_factory=dict)
    arrived: list[Attempt] = field(default_factory=list)  # sampled, not yet handed to an episode
    finished: list[Rollout] = field(default_factory=list)
    is_stepping: bool = False  # inside an engine step, where an error leaves the engine broken

    def rounds(self) -> Iterator[list[Rollout]]:
        """Plays all episodes; yields the rollouts that ended, often none, after every step."""
        for question in self.questions:
            self.start(question)
        while self.engine.has_work or self.waiting:
            # A local teacher runs its engine here, a little at a time; other teachers do nothing.
            teacher_works = bool(self.waiting) and self.teacher.step(
                student_is_idle=not self.engine.has_work
            )
            # On a CPU student and teacher need the same cores, so the student's turn is skipped.
            if not (teacher_works and self.teacher.shares_cpu):
                self.step(may_wait=not teacher_works)
            self.collect_guidance(idle=not self.engine.has_work and not teacher_works)
            yield self.finished
            self.finished = []

    def start(self, question: Question) -> None:
        """Submits a question's prompt once, for all episodes of its group."""
        prompt_ids = self.bridge.prompt_ids(question.messages)
        episodes = [
            Episode(
                question,
                bridge=self.bridge,
                grader=self.grader,
                options=self.options,
                limits=Limits(self.params.max_new_tokens, self.engine.max_tokens),
                rollout_idx=idx,
                prompt_ids=prompt_ids,
            )
            for idx in range(self.options.group_size)
        ]
        self.engine.submit(
            prompt_ids,
            replace(self.params, n=len(episodes)),
            key=(self.batch_idx, question.question_idx),
        )
        for episode in episodes:
            self.in_flight[question.question_idx, episode.rollout.rollout_idx] = episode

    def step(self, *, may_wait: bool) -> None:
        """Advances the engine and hands finished attempts to their episodes.

        The pages of a wrong attempt stay pinned while the teacher works.

        Args:
            may_wait: whether to wait for the device. If not, a teacher works beside the student,
                and a step that is not ready is looked at again after POLL_S.
        """
        self.is_stepping = True
        self.engine.launch()
        if may_wait or self.engine.is_ready:
            self.arrived += self.engine.collect()
        else:
            time.sleep(POLL_S)
        self.is_stepping = False
        # An attempt leaves `arrived` only once its episode has taken it. If that raises, __exit__
        # still finds the attempt and releases its pages.
        while self.arrived:
            attempt = self.arrived[0]
            episode = self.in_flight[attempt.key.question, attempt.rollout_idx]
            request = episode.add_attempt(attempt)
            self.arrived.pop(0)
            if request is None:
                self.end(episode)
            else:
                guidance_future = ask(
                    self.teacher, request, self.options.guidance_timeout_s, self.loop
                )
                self.waiting[guidance_future] = (episode, time.perf_counter())
                wait_if_immediate(self.teacher, self.waiting)

    def collect_guidance(self, *, idle: bool) -> None:
        """Resumes the rollouts whose teacher has answered.

        idle: nothing else is to be done, so wait for an answer, but return after 20 ms at most.
        """
        if idle and self.waiting:
            wait(self.waiting, timeout=0.02, return_when=FIRST_COMPLETED)
        for future in [future for future in self.waiting if future.done()]:
            episode, start_s = self.waiting.pop(future)
            episode.rollout.teacher_wait_s += time.perf_counter() - start_s
            note_span(
                "guidance",
                "guidance",
                since=start_s,
                overlaps=True,
                question=episode.rollout.question_idx,
                rollout=episode.rollout.rollout_idx,
                attempts=len(episode.rollout.turns),
            )
            context = episode.add_guidance(result_of(future, self.teacher))
            if context is None:
                self.end(episode)
            else:
                self.engine.resume(
                    episode.rollout.attempts[-1],
                    context.suffix_ids,
                    self.params,
                    kept_tokens=context.kept_tokens,
                )

    def end(self, episode: Episode) -> None:
        """Releases the pages of an episode that has ended, and adds its rollout to `finished`."""
        rollout = episode.rollout
        tell(episode)
        self.engine.release(rollout.attempts[-1:])
        del self.in_flight[rollout.question_idx, rollout.rollout_idx]
        self.finished.append(rollout)

    def __enter__(self) -> None:
        """Acquires nothing; `with` is used for __exit__."""

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """Leaves nothing behind: no call in flight, no sequence, no page.

        After a close by the caller, or an error of grader, teacher or bridge, the engine is in a
        valid state. This driver's requests and pages are given back one by one, and attempts that
        others keep pinned stay.

        Ctrl-C and StopRequested may come between any two statements of the engine, and an error of
        a step in the middle of it. Then only a reset gives everything back.
        """
        for future in self.waiting:
            future.cancel()
        # Ctrl-C and StopRequested are no Exception; GeneratorExit is a close by the caller.
        interrupted = kind is not None and not issubclass(kind, Exception | GeneratorExit)
        if self.is_stepping or interrupted:
            self.engine.reset()
            return
        for episode in self.in_flight.values():
            self.engine.cancel((self.batch_idx, episode.rollout.question_idx))
            self.engine.release(episode.rollout.attempts)
        self.engine.release(self.arrived)


def tell(episode: Episode) -> None:
    """Shows an episode's notes to the user, as warnings."""
    for note in episode.notes:
        warnings.warn(note, stacklevel=3)
