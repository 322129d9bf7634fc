"""Samples rollouts with a paged KV cache that all attempts of a rollout share.

Read Engine.step, then submit and resume. Departures from a serving engine:

- A prompt is prefilled once and forked group_size times by page reference. No prefix is hashed.
- A finished attempt keeps its pages until it is resumed or released. So the second attempt prefills
  only [last token] + bridge. pages.py draws the life of a page.
- The weights are the trainer's own parameters. When they change, policy_version goes up and all
  pages computed with older weights are released.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import count
from typing import Literal

from torch import Tensor

from socpo_fast.engine.checks import check_fits, check_key, check_resume, check_settings
from socpo_fast.engine.memory import kv_cache_size
from socpo_fast.engine.pages import PagePool
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.scheduler import Scheduler
from socpo_fast.engine.sequence import Sequence, fresh_batch
from socpo_fast.engine.steps import StepQueue
from socpo_fast.engine.weight_watch import WeightWatch
from socpo_fast.model.decoder import Decoder
from socpo_fast.model.hf_views import copy_weights
from socpo_fast.ops._checks import check_rule
from socpo_fast.types import Attempt, EngineStats, RolloutKey, SamplingParams


class Engine:
    """Continuous batching over one student, with attempts that resume on kept pages.

    Args:
        student:      the decoder whose parameters are read at every step, never copied.
        kv_cache_gib: GiB of pages; "auto": 1 on a CPU, on a GPU what weights and updates leave.
        page_size:    tokens a page, a power of two.
        max_running:  sequences in one step at most.
        token_budget: tokens in one step at most (longer prompts are prefilled in chunks).
        tokens_per_sync: tokens decoded between two reads by the host while the queue is empty;
                      default 1 on the CPU, 8 on a GPU.
        cascade:      whether pages that rollouts of a group share are read once for all of them;
                      results are bitwise equal either way.
        attention:    implementation of paged_attention, "auto" or a name; "flash" needs page_size
                      256 and flash-attn.
        min_memory_bytes: least size of the tensor that lend_memory lends. The pages are in it too,
                      so it is never smaller than they are.
        stream_priority: on a GPU, all work goes to a separate stream with this priority (a lower
                      number is more urgent: -1 the student, 0 a teacher beside it); None: to the
                      caller's stream.
        name:         of the engine's track in a trace.

    Raises:
        ValueError: a number out of range, heads that paged attention cannot read, a card with too
            little left, or a pool without a page.
    """

    def __init__(
        self,
        student: Decoder,
        *,
        kv_cache_gib: float | Literal["auto"] = "auto",
        page_size: int = 32,
        max_running: int = 256,
        token_budget: int = 2048,
        tokens_per_sync: int | None = None,
        cascade: bool = True,
        attention: str = "auto",
        min_memory_bytes: int = 0,
        stream_priority: int | None = None,
        name: str = "student",
    ):
        head_dim = student.config.head_dim
        check_settings(head_dim, page_size, max_running, token_budget, tokens_per_sync)
        self.kv_cache = kv_cache_size(student, kv_cache_gib, page_size, max_running)
        num_pages = int(self.kv_cache.gib * 2**30) // Runner.page_bytes(student, page_size)
        if num_pages < 1:
            raise ValueError(
                f"Engine: kv_cache_gib must hold at least one page, got {kv_cache_gib}; raise it"
            )
        self.student = student
        self.policy_version = 0
        # The pages' memory first: it refuses at once what does not fit, the pool makes long lists.
        self.runner = Runner(
            student,
            num_pages=num_pages,
            page_size=page_size,
            cascade=cascade,
            attention=attention,
            min_memory_bytes=min_memory_bytes,
            stream_priority=stream_priority,
        )
        self.pool = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(self.pool, max_running=max_running, token_budget=token_budget)
        self._watch = WeightWatch(student)
        # Orders sequences of equal priority. StepQueue numbers forked children from it as well.
        self._arrivals = count()
        # On a CPU nothing runs asynchronously, so reading every token costs nothing.
        rounds = tokens_per_sync or (8 if self.runner.device.type == "cuda" else 1)
        self.steps = StepQueue(
            self.scheduler, self.runner, self._arrivals, tokens_per_sync=rounds, name=name
        )
        # The attempt whose pinned pages hold what keep_prefix prefilled.
        self._prefix: Attempt | None = None
        # Rollouts under each key that are neither released nor cancelled.
        self._in_flight: Counter[RolloutKey] = Counter()
        self._is_lent = False  # inside of a lend_memory block
        # Id of the only thread that may use the engine, if arollouts or an AsyncEngine drives it.
        self.driven_by: int | None = None

    @property
    def stats(self) -> EngineStats:
        """Returns counts of tokens and preemptions since the start, and the free pages now."""
        return EngineStats(
            prefill_tokens=self.steps.prefill_tokens,
            decode_tokens=self.steps.decode_tokens,
            preemptions=self.scheduler.num_preemptions,
            pages_free=self.pool.num_free,
            pages_total=self.pool.num_pages,
        )

    @property
    def has_work(self) -> bool:
        """Whether a rollout is queued or running; finished attempts do not count."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @property
    def max_tokens(self) -> int:
        """Returns the longest context, new tokens included, that model and page pool can hold."""
        return min(
            self.student.config.max_position_embeddings, self.pool.num_pages * self.pool.page_size
        )

    def submit(self, prompt_ids: Seq[int], params: SamplingParams, *, key: tuple[int, int]) -> None:
        """Queues params.n rollouts of one prompt; never blocks.

        `key` is (batch, question) and determines the sampling noise. It is in flight until every
        rollout under it is released or cancelled. Used again later, it draws the same tokens.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a key beyond 64 bits or
                in flight, a request that can never fit, or a call inside of lend_memory or beside a
                thread that drives the engine.
        """
        self._check_thread("submit")
        check_rule(
            "submit",
            "memory of the engine",
            "lent",
            not self._is_lent,
            "at hand",
            "leave lend_memory first",
        )
        rollout_key = check_key("submit", key, self._in_flight)
        token_ids = list(prompt_ids)
        check_fits("submit", token_ids, params, self.student.config, self.pool)
        sequence = Sequence(
            key=rollout_key,
            params=params,
            token_ids=token_ids,
            attempt_start=len(token_ids),
            priority=(1, next(self._arrivals)),
            num_rollouts=params.n,
            policy_version=self.policy_version,
        )
        self._in_flight[rollout_key] += params.n
        if prefix := self._kept_prefix():
            # Shared now, because the prefix's pages may be taken by the time of the prefill.
            self.scheduler.share_prefix(sequence, prefix)
        self.scheduler.enqueue(sequence)

    def keep_prefix(self, token_ids: Seq[int]) -> None:
        """Prefills the common start of many prompts, whose full pages later prompts will share.

        The pages are kept until another sequence needs them, the weights change, or `reset`. The
        engine must be idle.
        """
        if (prefix := self._kept_prefix()) and prefix.token_ids[: prefix.attempt_start] == list(
            token_ids
        ):
            return
        # There is no request that only prefills. So one token is sampled, and nobody reads it.
        params = SamplingParams(n=1, temperature=0.0, max_new_tokens=1, eos_ids=(), ignore_eos=True)
        if self._prefix:
            self.release([self._prefix])
        ((self._prefix,),) = self.generate([token_ids], params, keep=True)

    def _kept_prefix(self) -> Sequence | None:
        """Returns the sequence of keep_prefix, or None if its pages have been taken."""
        sequence = self.scheduler.pinned.get(self._prefix) if self._prefix else None
        return sequence if sequence and sequence.pages else None

    def resume(
        self, attempt: Attempt, suffix_ids: Seq[int], params: SamplingParams, *, kept_tokens: int
    ) -> None:
        """Queues the next attempt of a rollout, on the pages of its finished one; never blocks.

            finished attempt    | context | sampled tokens          |        its row
            next attempt        | kept_tokens of the row  | suffix_ids |     prefills the suffix

        The row is the attempt's context and its sampled tokens. The next attempt's context is the
        first kept_tokens tokens of the row, then suffix_ids. One rollout goes on, whatever params.n
        is. If the whole row is kept, its last sampled token is prefilled too: it has no KV yet.

        A last page that siblings share is copied before it is written to. If the pages were taken
        or the weights have changed, the KV of the whole context is recomputed.

        Raises:
            ValueError: the attempt was released or resumed before, kept_tokens is not in
                [1, length of the row], suffix_ids is empty, the context can never fit, or another
                thread drives the engine.
        """
        self._check_thread("resume")
        old = check_resume(attempt, self.scheduler.pinned.get(attempt), suffix_ids, kept_tokens)
        token_ids = old.token_ids[:kept_tokens] + list(suffix_ids)
        check_fits("resume", token_ids, params, self.student.config, self.pool)
        try:
            old.shorten(self.pool, kept_tokens)
            self.runner.copy_pages(self.scheduler.copy_shared_last_page(old))
        except BaseException:
            # For example out of memory. The attempt stays resumable, but its new last page may not
            # hold the copied KV, so it gives up all its pages.
            old.drop_pages(self.pool)
            raise
        del self.scheduler.pinned[attempt]
        sequence = old.next_attempt(token_ids, params, next(self._arrivals), self.policy_version)
        self.scheduler.enqueue(sequence)

    def step(self) -> list[Attempt]:
        """Runs one scheduler step; returns the attempts that finished in it, their pages pinned.

        An exception in the middle leaves sequences half updated: call `reset` before the next step.
        """
        self.launch()
        return self.collect()

    def launch(self) -> None:
        """Runs the first half of a step: launches the next work on the device, without waiting.

        Weights that were written in place since the last step are noticed: policy_version goes up.

        Raises:
            RuntimeError: a parameter's storage was replaced. Nothing is sampled from the old one.
            ValueError: another thread drives the engine.
        """
        self._check_thread("launch")
        if self._watch.is_written():
            self.bump_policy_version()
        self.steps.launch()

    @property
    def is_ready(self) -> bool:
        """Whether collect would not wait for the device."""
        return self.steps.is_ready

    def collect(self) -> list[Attempt]:
        """Runs the second half: waits for the oldest launched work, returns finished attempts."""
        return self.steps.collect()

    def prepare(self, max_tokens: int) -> None:
        """Captures decoding for all batch sizes on a GPU, so that rollouts never wait for it.

        max_tokens: the longest context that the rollouts will have.
        """
        if self.steps.loop:
            self.steps.loop.prepare(min(max_tokens, self.max_tokens))

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams,
        *,
        keys: Seq[tuple[int, int]] | None = None,
        keep: bool = False,
    ) -> list[list[Attempt]]:
        """Submits every prompt and steps until all are done; returns groups[question][rollout].

        Args:
            keys: one (batch, question) for each prompt, under which the same tokens are drawn every
                  time. None: fresh ones, so that no two calls of a process share their noise.
                  Processes that run in parallel need a seed each.
            keep: leaves the pages pinned, for resume.

        An exception resets the engine.

        Raises:
            ValueError: the engine has work, keys are not one different pair for each prompt, or
                submit would refuse a prompt.
        """
        self._check_thread("generate")
        if self.has_work:
            raise ValueError(
                "generate: the engine must be idle, got unfinished requests; step until they are "
                "done"
            )
        if keys is None:
            batch = fresh_batch()
            keys = [(batch, q) for q in range(len(prompts))]
        if len(keys) != len(prompts) or len({tuple(key) for key in keys}) != len(keys):
            raise ValueError(
                f"generate: keys must be {len(prompts)} different pairs, got {list(keys)}"
            )
        # All or none: a refused prompt must not leave others queued.
        for prompt_ids in prompts:
            check_fits("generate", list(prompt_ids), params, self.student.config, self.pool)
        groups: dict[RolloutKey, list[Attempt]] = {
            check_key("generate", key, self._in_flight): [] for key in keys
        }
        try:
            for prompt_ids, key in zip(prompts, groups, strict=True):
                self.submit(prompt_ids, params, key=key)
            while self.has_work:
                for attempt in self.step():
                    groups[attempt.key].append(attempt)
            for group in groups.values():
                group.sort(key=lambda attempt: attempt.rollout_idx)
                if not keep:
                    self.release(group)
            return list(groups.values())
        except BaseException:
            self.reset()
            raise

    def release(self, attempts: Iterable[Attempt]) -> None:
        """Releases the pages of finished attempts; skips those resumed or released before."""
        for attempt in attempts:
            if sequence := self.scheduler.pinned.pop(attempt, None):
                self._forget(sequence)

    def cancel(self, key: tuple[int, int]) -> None:
        """Drops what is queued or running under a key; finished attempts stay until released."""
        for sequence in self.scheduler.remove(RolloutKey(*key)):
            self._forget(sequence)
        # A step of cancelled sequences only has no reader any more.
        self.steps.drop_dead()

    def reset(self) -> None:
        """Drops all queued, running and pinned sequences and frees every page and every key.

        This is for a step that was interrupted, by Ctrl-C or for lack of memory, after which it is
        not known which sequence owns which page. Weights, policy_version and the counts of `stats`
        stay. The pages keep their memory addresses, which captured CUDA graphs read. Attempts that
        were returned stay valid as data.
        """
        self.steps.drop()
        self.scheduler.reset()
        self._in_flight.clear()

    @contextmanager
    def lend_memory(self) -> Iterator[Tensor]:
        """Yields the tensor that holds the KV pages, [N] uint8, for other uses in a `with` block.

        Nothing may be submitted in the block. What is written to the tensor never reaches a result
        of the engine. Its address never changes.

        Raises:
            ValueError: a sequence is queued, running or pinned.
        """
        num_sequences = (
            len(self.scheduler.waiting) + len(self.scheduler.running) + len(self.scheduler.pinned)
        )
        check_rule(
            "lend_memory",
            "sequences in the engine",
            num_sequences,
            num_sequences == 0,
            "none",
            "release or reset them",
        )
        # Waits for launched steps, which would still write KV into the borrower's data.
        self.steps.drop()
        self._is_lent = True
        try:
            yield self.runner.memory
        finally:
            self._is_lent = False

    def update_weights(
        self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    ) -> None:
        """Copies weights into the student in place, and bumps policy_version.

        Args:
            named_tensors: tensors under their Hugging Face names, all or some, for example
                `model.named_parameters()`; DTensors are gathered. None: the weights are in place
                already, as after a step on a model adopted with share=True; nothing is copied, but
                checked that its parameters still are the student's.

        Raises:
            ValueError: an unknown name or another shape. Tensors before it have been copied.
            RuntimeError: an adopted model's parameters have left the student's storage.
        """
        try:
            if named_tensors is not None:
                copy_weights(self.student, named_tensors)
        finally:
            self.bump_policy_version()

    def bump_policy_version(self) -> None:
        """Tells the engine that the weights changed: all KV so far is dropped and recomputed.

        A running attempt keeps the version that sampled its first token.

        Raises:
            RuntimeError: as in update_weights, or the weights have another dtype or device now.
        """
        # Draws in flight come from the old weights, so they are dropped.
        self.steps.drop()
        self._watch.renew()
        self.policy_version += 1
        self.runner.bind_weights()
        self.scheduler.drop_all_pages(self.policy_version)

    def _check_thread(self, where: str) -> None:
        """Refuses a call beside the thread that drives the engine: steps of two would mix."""
        check_rule(
            where,
            "calling thread",
            threading.current_thread().name,
            self.driven_by in (None, threading.get_ident()),
            "that of the arollouts or AsyncEngine that drives the engine",
            "let it end first",
        )

    def _forget(self, sequence: Sequence) -> None:
        """Releases the pages and the key of a sequence that the scheduler no longer holds."""
        sequence.drop_pages(self.pool)
        # A prompt that has not been forked yet stands for all its rollouts.
        self._in_flight[sequence.key] -= sequence.num_rollouts
        if self._in_flight[sequence.key] == 0:
            del self._in_flight[sequence.key]
