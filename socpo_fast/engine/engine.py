"""Rollouts with a paged KV cache that both attempts share. Read: Engine.step, then submit and
resume.

Departures from a serving engine: a prompt is prefilled once and forked group_size times by page
reference, with no prefix hashing; a finished attempt keeps its pages until it is resumed or
released, so the second attempt prefills only [last token] + bridge; the weights are the trainer's,
and a policy_version guards pages computed with older ones.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
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
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops._checks import check_rule
from socpo_fast.types import Attempt, EngineStats, RolloutKey, SamplingParams


class Engine:
    """Continuous batching over one student.

    Args:
        student:      the decoder whose parameters are read at every step, never copied.
        kv_cache_gib: GiB of pages; "auto": 1 on a CPU, on a card what weights and updates leave.
        page_size:    tokens a page, a power of two.
        max_running:  sequences in one step at most.
        token_budget: tokens in one step at most (longer prompts are prefilled in chunks).
        tokens_per_sync: decoded between two reads by the host when nobody waits; default 1 on the
                         CPU, 8 on a GPU.
        attention:    implementation of paged_attention, "auto" or a name; "flash" needs page_size
                      256 and flash-attn.
        cascade:      read the pages that rollouts of a group share once for all of them; the same
                      bits either way.
        min_memory_bytes: of what lend_memory lends, which holds the pages in any case.
        stream_priority: on a GPU, all its work goes to a stream of its own with this priority (a
                         lower number is more
            urgent: -1 the student, 0 a teacher beside it); None: to the caller's stream.
        name: of its track in a trace.

    Raises:
        ValueError: a number out of range, a card with too little left, or a pool without a page.
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
        check_settings(page_size, max_running, token_budget, tokens_per_sync)
        self.kv_cache = kv_cache_size(student, kv_cache_gib, page_size, max_running)
        num_pages = int(self.kv_cache.gib * 2**30) // Runner.page_bytes(student, page_size)
        if num_pages < 1:
            raise ValueError(
                f"Engine: kv_cache_gib must hold at least one page, got {kv_cache_gib}; raise it"
            )
        self.student = student
        self.policy_version = 0
        self._pool = PagePool(num_pages, page_size)
        self._scheduler = Scheduler(self._pool, max_running=max_running, token_budget=token_budget)
        self._runner = Runner(
            student,
            num_pages=num_pages,
            page_size=page_size,
            cascade=cascade,
            attention=attention,
            min_memory_bytes=min_memory_bytes,
            stream_priority=stream_priority,
        )
        self._arrivals = count()
        rounds = tokens_per_sync or (8 if self._runner.device.type == "cuda" else 1)
        self._steps = StepQueue(
            self._scheduler, self._runner, self._arrivals, tokens_per_sync=rounds, name=name
        )
        self._prefix: Attempt | None = None  # of which the pages are kept
        self._in_flight: Counter[RolloutKey] = Counter()  # how many rollouts each has
        self._is_lent = False

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            prefill_tokens=self._steps.prefill_tokens,
            decode_tokens=self._steps.decode_tokens,
            preemptions=self._scheduler.num_preemptions,
            pages_free=self._pool.num_free,
            pages_total=self._pool.num_pages,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def max_tokens(self) -> int:
        """The longest context, new tokens included, that the model and the page pool can hold."""
        return min(
            self.student.config.max_position_embeddings, self._pool.num_pages * self._pool.page_size
        )

    def submit(self, prompt_ids: Seq[int], params: SamplingParams, *, key: tuple[int, int]) -> None:
        """Queue params.n rollouts of one prompt; never blocks. `key` is (batch, question) and names
        the noise.

        A key is in flight until every rollout under it was released or cancelled; used again it
        draws the same tokens.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a key beyond 64 bits or
                in flight, a request that can never fit, or a block of lend_memory.
        """
        check_rule(
            "submit",
            "memory of the engine",
            "lent",
            not self._is_lent,
            "at hand",
            "leave lend_memory first",
        )
        name = check_key("submit", key, self._in_flight)
        token_ids = list(prompt_ids)
        check_fits("submit", token_ids, params, self.student.config, self._pool)
        sequence = Sequence(
            key=name,
            params=params,
            token_ids=token_ids,
            attempt_start=len(token_ids),
            priority=(1, next(self._arrivals)),
            num_rollouts=params.n,
            policy_version=self.policy_version,
        )
        self._in_flight[name] += params.n
        if kept := self._kept_prefix():
            self._scheduler.share_prefix(sequence, kept)
        self._scheduler.enqueue(sequence)

    def keep_prefix(self, token_ids: Seq[int]) -> None:
        """Prefill what many prompts begin with; those that are submitted later share its whole
        pages.

        They are kept until a sequence needs the room, the weights change or `reset`. The engine
        must be idle.
        """
        if (kept := self._kept_prefix()) and kept.token_ids[: kept.attempt_start] == list(
            token_ids
        ):
            return
        params = SamplingParams(n=1, temperature=0.0, max_new_tokens=1, eos_ids=(), ignore_eos=True)
        if self._prefix:
            self.release([self._prefix])
        ((self._prefix,),) = self.generate([token_ids], params, keep=True)

    def _kept_prefix(self) -> Sequence | None:
        sequence = self._scheduler.pinned.get(self._prefix) if self._prefix else None
        return sequence if sequence and sequence.pages else None

    def resume(
        self, attempt: Attempt, suffix_ids: Seq[int], params: SamplingParams, *, kept_tokens: int
    ) -> None:
        """Queue the next attempt of a finished one, behind a prefix of its row and suffix_ids.

        The row is what the attempt saw and what it sampled; its first kept_tokens tokens stay. One
        rollout goes on, whatever params.n says.

        The finished attempt's pages go over to the new one, which prefills suffix_ids, and the last
        sampled token too where the whole row stays. A page that siblings hold too is copied before
        it is written to; everything is computed again if the pages were taken or the weights
        changed.

        Raises:
            ValueError: the attempt was released or resumed before, kept_tokens is not in
                [1, length of the row], suffix_ids is empty, or the context can never fit.
        """
        old = check_resume(attempt, self._scheduler.pinned.get(attempt), suffix_ids, kept_tokens)
        token_ids = old.token_ids[:kept_tokens] + list(suffix_ids)
        check_fits("resume", token_ids, params, self.student.config, self._pool)
        try:
            old.shorten(self._pool, kept_tokens)
            self._runner.copy_pages(self._scheduler.own_last_page(old))
        except BaseException:  # memory, say: the attempt stays, without pages that were not copied
            old.drop_pages(self._pool)
            raise
        del self._scheduler.pinned[attempt]
        sequence = old.next_attempt(token_ids, params, next(self._arrivals), self.policy_version)
        self._scheduler.enqueue(sequence)

    def step(self) -> list[Attempt]:
        """One scheduler step: forward, sample, and return the attempts that finished, their pages
        still pinned.

        An exception in its middle leaves sequences half moved: `reset` before the next step.
        """
        self.launch()
        return self.collect()

    def launch(self) -> None:
        """The first half of a step: has the device compute what is next, and waits for nothing."""
        self._steps.launch()

    @property
    def is_ready(self) -> bool:
        """Whether collect would not wait for the device."""
        return self._steps.is_ready

    def collect(self) -> list[Attempt]:
        """The second half: waits for what was launched first, and returns the attempts that
        finished.
        """
        return self._steps.collect()

    def prepare(self, max_tokens: int) -> None:
        """On a GPU, capture decoding of all batch sizes up to max_tokens of context, lest rollouts
        wait for it.
        """
        if self._steps.loop:
            self._steps.loop.prepare(min(max_tokens, self.max_tokens))

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams,
        *,
        keys: Seq[tuple[int, int]] | None = None,
        keep: bool = False,
    ) -> list[list[Attempt]]:
        """Submit every prompt and step until all are done: groups[q][r]. keep leaves the pages
        pinned for resume.

        keys: one (batch, question) a prompt, under which the same tokens are drawn every time;
              None: fresh ones, so
        that no two calls of a process share their noise; ranks need a seed each. An exception
        resets the engine.

        Raises:
            ValueError: an engine with work, not one different key a prompt, or what submit refuses.
        """
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
        for prompt_ids in prompts:  # all or none: a refused prompt must not leave others queued
            check_fits("generate", list(prompt_ids), params, self.student.config, self._pool)
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
        """Give back the pages of finished attempts; one that was resumed or released before is
        passed over.
        """
        for attempt in attempts:
            if sequence := self._scheduler.pinned.pop(attempt, None):
                self._forget(sequence)

    def cancel(self, key: tuple[int, int]) -> None:
        """Forget what is queued or running under this key; finished attempts stay until they are
        released.
        """
        for sequence in self._scheduler.remove(RolloutKey(*key)):
            self._forget(sequence)
        self._steps.drop_dead()

    def reset(self) -> None:
        """Forget all that is queued, running or pinned, and take back every page; all keys may be
        used again.

        For when a step ended half way, by Ctrl-C or for lack of memory, and nobody can say which
        sequence holds which page. Weights, policy_version and the counts of `stats` stay, and the
        pages keep their place in memory, which captured CUDA graphs read. Pinned attempts remain as
        data.
        """
        self._steps.drop()
        self._scheduler.reset()
        self._in_flight.clear()

    @contextmanager
    def lend_memory(self) -> Iterator[Tensor]:
        """Lends the tensor that KV pages are views of, [N] uint8, for a `with` block in which
        nothing is submitted.

        Nothing that is written there reaches a result of the engine. It never moves. ValueError: a
        sequence is in it.
        """
        num_live = (
            len(self._scheduler.waiting)
            + len(self._scheduler.running)
            + len(self._scheduler.pinned)
        )
        check_rule(
            "lend_memory",
            "sequences in the engine",
            num_live,
            num_live == 0,
            "none",
            "release or reset them",
        )
        self._steps.drop()
        self._is_lent = True
        try:
            yield self._runner.memory
        finally:
            self._is_lent = False

    def bump_policy_version(self) -> None:
        """The weights changed: no page computed before is used again (running sequences are
        computed anew).

        An attempt under way keeps the version that sampled its first token.
        """
        self._steps.drop()
        self.policy_version += 1
        self._runner.bind_weights()
        self._scheduler.drop_all_pages(self.policy_version)

    def _forget(self, sequence: Sequence) -> None:
        """Give back the pages and the key of a sequence that is in no list any more."""
        sequence.drop_pages(self._pool)
        self._in_flight[sequence.key] -= sequence.num_rollouts
        if self._in_flight[sequence.key] == 0:
            del self._in_flight[sequence.key]
