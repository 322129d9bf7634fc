"""Launches steps on the device without waiting, and reads them in the order of launching.

    launch    plan -> forward and draw, or several decode rounds -> start to copy the draws back
    collect   wait for the oldest launched step -> append what it drew -> finished attempts

While all sequences decode and none waits in the queue, the next rounds are launched before the last
ones are read. So the device never waits for the host:

    host    launch 1, launch 2, collect 1, launch 3, collect 2, ..
    device  [----- 1 -----][----- 2 -----][----- 3 -----] ..

Rounds that are launched ahead do not know which sequences end in the rounds before. What they draw
for those is dropped. Everything that an engine launches goes to one stream, in order. So a page may
be released while a launched step still writes to it: its next owner writes later.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from socpo_fast.device import Readback
from socpo_fast.engine.decode import DecodeLoop
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sampler import launch_draw
from socpo_fast.engine.scheduler import Scheduler
from socpo_fast.engine.sequence import Sequence
from socpo_fast.trace import note_span
from socpo_fast.types import Attempt


@dataclass(frozen=True)
class LaunchedStep:
    """A step on the device: who draws in it, and the draws on their way to the host."""

    sequences: list[Sequence]
    num_rounds: int
    drawn: Readback  # [num_rounds, 3, len(sequences)]: token id, logprob, kept mass
    is_decode: bool
    launched_s: float  # when its launch began, time.perf_counter

    @property
    def is_live(self) -> bool:
        """Whether a sequence still needs what the step draws."""
        return any(sequence.is_live for sequence in self.sequences)


class StepQueue:
    """The launched steps, at most two. Two are always decode rounds of the same sequences."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        arrivals: Iterator[int],
        *,
        tokens_per_sync: int,
        name: str,
    ):
        self.name = name
        self._collected_s = 0.0
        self._scheduler = scheduler
        self._runner = runner
        self._arrivals = arrivals
        self.tokens_per_sync = tokens_per_sync
        self.loop: DecodeLoop | None = None
        if tokens_per_sync > 1:
            self.loop = DecodeLoop(
                runner, max_running=scheduler.max_running, max_rounds=tokens_per_sync
            )
        self._launched: deque[LaunchedStep] = deque()
        # The draws of the step that was dropped last. The device may still be computing it.
        self._last_dropped: Readback | None = None
        self.prefill_tokens = self.decode_tokens = 0

    @property
    def is_ready(self) -> bool:
        """Whether collect would return without waiting for the device."""
        return not self._launched or self._launched[0].drawn.is_ready

    def launch(self) -> None:
        """Launches the next step, and decode rounds behind it if possible; never waits."""
        started_s = time.perf_counter()
        with self._runner.on_stream():
            if not self._launched and (plan := self._scheduler.plan()):
                sequences = [sequence for sequence, _ in plan]
                is_decode = all(s.num_sampled > 0 and s.num_pending == 1 for s in sequences)
                if self.loop and is_decode:
                    self._launch_rounds(self.loop, sequences, started_s)
                else:
                    self._launch_forward(plan, started_s)
            if self.loop and self._can_launch_ahead(self.loop):
                self._launch_rounds(self.loop, self._launched[0].sequences, started_s)

    def collect(self) -> list[Attempt]:
        """Reads the oldest launched step, if any; returns the attempts that end in it."""
        if not self._launched:
            return []
        step = self._launched.popleft()
        attempts = []
        rounds_N3B = step.drawn.wait().tolist()
        self._note(step)
        for drawn_3B in rounds_N3B:
            for sequence, *values in zip(step.sequences, *drawn_3B, strict=True):
                if sequence.is_live:
                    # A forward counts its tokens at its launch. Decode rounds do it here, because
                    # only now is it known in which round a sequence has ended.
                    if step.is_decode:
                        sequence.num_cached += 1
                        self.decode_tokens += 1
                    if attempt := self._scheduler.append(sequence, values):
                        attempts.append(attempt)
        self._scheduler.release_lookahead(attempts)
        self.drop_dead()
        return attempts

    def _note(self, step: LaunchedStep) -> None:
        """Records a step's span for the trace, from its launch or the end of the one before."""
        span_name = f"{step.num_rounds} decode rounds" if step.is_decode else "forward"
        started_s = max(step.launched_s, self._collected_s)
        note_span(self.name, span_name, since=started_s, sequences=len(step.sequences))
        self._collected_s = time.perf_counter()

    def drop_dead(self) -> None:
        """Drops launched steps without a live sequence; what is launched next runs after them."""
        while self._launched and not self._launched[-1].is_live:
            self._last_dropped = self._launched.pop().drawn

    def drop(self) -> None:
        """Drops every launched step and waits until the device has finished them.

        Sequences that go on draw the same tokens again, since their noise keys are the same.
        """
        while self._launched:
            self._last_dropped = self._launched.popleft().drawn
        # All steps run on one stream, in order: when the last one is done, all are.
        if self._last_dropped is not None:
            self._last_dropped.wait()

    def _can_launch_ahead(self, loop: DecodeLoop) -> bool:
        """Whether decode rounds may be launched before the launched ones are read."""
        if len(self._launched) != 1 or not self._launched[0].is_decode or self._scheduler.waiting:
            return False
        # The next rounds must have as many rows as these. If enough sequences have ended, reading
        # first and planning anew gives smaller, cheaper rounds.
        is_live = [sequence.is_live for sequence in self._launched[0].sequences]
        return loop.num_rows(sum(is_live)) == loop.num_rows(len(is_live))

    def _launch_rounds(self, loop: DecodeLoop, sequences: list[Sequence], started_s: float) -> None:
        """Launches as many decode rounds as pages and lengths allow, behind those in flight."""
        num_ahead = sum(step.num_rounds for step in self._launched)
        # Pages are only needed by the living. The rounds still have the rows of all sequences.
        live = [sequence for sequence in sequences if sequence.is_live]
        num_rounds = (
            self._scheduler.allocate_lookahead(live, num_ahead + self.tokens_per_sync) - num_ahead
        )
        if num_rounds > 0:
            drawn = loop.launch(sequences, num_rounds, is_ahead=num_ahead > 0)
            self._launched.append(LaunchedStep(sequences, num_rounds, drawn, True, started_s))

    def _launch_forward(self, plan: list[tuple[Sequence, int]], started_s: float) -> None:
        """Forwards planned tokens, forks prefilled prompts, draws where no token is pending."""
        hidden_BD = self._runner.forward(plan)
        rows: list[tuple[int, Sequence]] = []  # (row of hidden_BD to draw from, sequence)
        for row, (sequence, num_tokens) in enumerate(plan):
            if sequence.num_sampled > 0 and num_tokens == 1:
                self.decode_tokens += 1
            else:
                self.prefill_tokens += num_tokens
            sequence.num_cached += num_tokens
            if sequence.num_pending == 0:
                rows += [(row, child) for child in self._fork(sequence)]
        # A step may only forward chunks of prompts; then there is nothing to draw or to read.
        if rows:
            drawn = Readback(launch_draw(self._runner.student, hidden_BD, rows)[None])
            self._launched.append(LaunchedStep([s for _, s in rows], 1, drawn, False, started_s))

    def _fork(self, root: Sequence) -> list[Sequence]:
        """Returns the group's rollouts, all on the prompt's pages; an ordinary sequence itself."""
        if root.num_rollouts == 1:
            return [root]
        children = root.children(self._arrivals)
        self._runner.copy_pages(self._scheduler.fork(root, children))
        return children
