"""Episodes driven by the paged engine. Read socratic_rollouts, then _Driver.

The rules of an episode stand in episode.py. Here the engine and the teacher overlap: teachers are
coroutines on one background event loop; between two engine steps the loop here collects what they
said and resumes those rollouts on the pages of their first attempt, so a slow teacher delays nobody
but the rollout it belongs to.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from socpo_fast.engine import Engine, fresh_batch
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import Episode, Limits, RolloutOptions
from socpo_fast.socratic.graders import Grader
from socpo_fast.socratic.teachers import Teacher, TeacherFunction, as_teacher, ask, result_of
from socpo_fast.trace import note_span
from socpo_fast.types import (
    Attempt,
    Guidance,
    Question,
    Rollout,
    SamplingParams,
)

POLL_S = 2e-4  # between two looks at a device that student and teacher work on
PATIENCE_S = 0.1  # how long an immediate teacher is waited for on the spot


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

    Its pages are given back by then. Whatever ends the loop early leaves no sequence, page or call
    to the teacher behind, so the same call can be made again. An engine that was stopped in the
    middle of a step, or anywhere by Ctrl-C, is reset for that.

    Args:
        teacher:   a Teacher, or a plain or async function of the request.
        grader:    text and question -> a bool, a number in [0, 1], or named parts of one.
        params:    sampling of every attempt; its n is replaced by options.group_size.
        options:   the rules of an episode.
        batch_idx: with question_idx the name of the sampling noise: the same one gives the same
                   tokens. None: one that no other call has.
        bridge:    the tokenizer's, where the caller has one already; its guidance_limit must be
                   that of the options.

    Raises:
        ValueError: a question twice or in flight under this batch_idx, a prompt that can never fit,
            a busy engine, a bridge of another guidance_limit.
    """
    if len({question.question_idx for question in questions}) != len(questions):
        raise ValueError(
            "socratic_rollouts: question_idx must be unique in a batch; the noise is keyed by it"
        )
    if engine.has_work:
        raise ValueError(
            "socratic_rollouts: the engine must be idle, got unfinished requests; step until it "
            "is done"
        )
    driver = _Driver(
        engine=engine,
        bridge=bridge or Bridge(tokenizer, guidance_limit=options.guidance_limit),
        teacher=as_teacher(teacher),
        grader=grader,
        params=replace(params, n=1),
        options=options,
        batch_idx=fresh_batch() if batch_idx is None else batch_idx,
    )
    with driver:
        for question in questions:
            driver.start(question)
        while engine.has_work or driver.waiting:
            teacher_works = bool(driver.waiting) and driver.teacher.step(
                student_is_idle=not engine.has_work
            )
            if not (teacher_works and driver.teacher.occupies_host):
                driver.step(may_wait=not teacher_works)
            driver.collect_guidance(idle=not engine.has_work and not teacher_works)
            yield from driver.finished
            driver.finished.clear()


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
    is_stepping: bool = False  # the engine, which is not in order then

    def start(self, question: Question) -> None:
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
        """The student's next tokens are under way; attempts that finished go to their episodes.

        Their pages stay pinned while the teacher works. may_wait: for the device; otherwise a
        teacher works beside the student, and whoever is not ready is looked at again a little
        later.

        An immediate teacher has answered before anything else goes on, one call at a time, which is
        repeatable. One that takes long has others asked meanwhile: however many of its calls hang,
        together they cost one time limit.
        """
        self.is_stepping = True
        self.engine.launch()
        if may_wait or self.engine.is_ready:
            self.arrived += self.engine.collect()
        else:
            time.sleep(POLL_S)
        self.is_stepping = False
        while self.arrived:
            attempt = self.arrived[0]
            episode = self.in_flight[attempt.key.question, attempt.rollout_idx]
            request = episode.attempted(attempt)
            self.arrived.pop(0)
            if request is None:
                self.end(episode)
            else:
                others_done = all(future.done() for future in self.waiting)
                asked = ask(self.teacher, request, self.options.guidance_timeout_s)
                self.waiting[asked] = (episode, time.perf_counter())
                if self.teacher.immediate and others_done:
                    wait([asked], timeout=PATIENCE_S)

    def collect_guidance(self, *, idle: bool) -> None:
        """Resume the rollouts whose teacher has answered; when idle, wait for one (at most 20 ms,
        then look again).
        """
        if idle and self.waiting:
            wait(self.waiting, timeout=0.02, return_when=FIRST_COMPLETED)
        for future in [future for future in self.waiting if future.done()]:
            episode, since = self.waiting.pop(future)
            episode.rollout.teacher_wait_s += time.perf_counter() - since
            note_span(
                "guidance", "guidance", since=since, overlaps=True, **name_of(episode.rollout)
            )
            context = episode.guided(result_of(future, self.teacher))
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
        rollout = episode.rollout
        tell(episode)
        self.engine.release(rollout.attempts[-1:])
        del self.in_flight[rollout.question_idx, rollout.rollout_idx]
        self.finished.append(rollout)

    def __enter__(self) -> None:
        """Nothing is taken; __exit__ gives back."""

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """Leave nothing behind: no call in flight, no sequence, no page.

        Closed by the caller, or after an error of grader, teacher or bridge, the engine is in
        order: what is ours is given back, and attempts that others keep pinned stay. Ctrl-C,
               StopRequested
        and the like may have come between any two statements of the engine, an error of a step in
        the middle of it: then only a reset gives everything back.
        """
        for future in self.waiting:
            future.cancel()
        interrupted = kind is not None and not issubclass(kind, Exception | GeneratorExit)
        if self.is_stepping or interrupted:
            self.engine.reset()
            return
        for episode in self.in_flight.values():
            self.engine.cancel((self.batch_idx, episode.rollout.question_idx))
            self.engine.release(episode.rollout.attempts)
        self.engine.release(self.arrived)


def name_of(rollout: Rollout) -> dict[str, int]:
    return {
        "question": rollout.question_idx,
        "rollout": rollout.rollout_idx,
        "attempts": len(rollout.turns),
    }


def tell(episode: Episode) -> None:
    """What the episode has to say to a person."""
    for note in episode.notes:
        warnings.warn(note, stacklevel=3)
