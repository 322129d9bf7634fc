"""Rollouts with a paged KV cache that both attempts share. Read: Engine.step, then submit and resume.

Departures from a serving engine: a prompt is prefilled once and forked group_size times by page reference, with no
prefix hashing; a finished attempt keeps its pages until it is resumed or released, so the second attempt prefills only
[last token] + bridge; the weights are the trainer's, and a policy_version guards pages computed with older ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import count
from typing import Literal

from socpo_fast.engine.decode import DecodeLoop
from socpo_fast.engine.memory import kv_cache_size
from socpo_fast.engine.pages import PagePool
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sampler import sample_tokens
from socpo_fast.engine.scheduler import Scheduler
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model.decoder import Decoder
from socpo_fast.types import Attempt, EngineStats, Handle, RolloutKey, SamplingParams


class Engine:
    """Continuous batching over one student.

    Args:
        student:      the decoder whose parameters are read at every step, never copied.
        kv_cache_gib: GiB of pages; "auto": 1 on a CPU, on a card what weights and updates leave.
        page_size:    tokens a page, a power of two.
        max_running:  sequences in one step at most.
        token_budget: tokens in one step at most (longer prompts are prefilled in chunks).
        tokens_per_sync: decoded between two reads by the host when nobody waits; default 1 on the CPU, 8 on a GPU. The
                      tokens are the same; those sampled behind an eos id are wasted.
        attention:    implementation of paged_attention, "auto" or a name; "flash" needs page_size 256 and flash-attn.
        cascade:      read the pages that rollouts of a group share once for all of them; the same bits either way.

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
    ):
        if page_size < 1 or page_size & (page_size - 1):
            raise ValueError(f"Engine: page_size must be a power of two, got {page_size}")
        if min(limits := (max_running, token_budget, tokens_per_sync or 1)) < 1:
            raise ValueError(f"Engine: max_running, token_budget and tokens_per_sync must be >= 1, got {limits}")
        self.kv_cache = kv_cache_size(student, kv_cache_gib, page_size, max_running)
        num_pages = int(self.kv_cache.gib * 2**30) // Runner.page_bytes(student, page_size)
        if num_pages < 1:
            raise ValueError(f"Engine: kv_cache_gib must hold at least one page, got {kv_cache_gib}; raise it")
        self.student = student
        self.policy_version = 0
        self._pool = PagePool(num_pages, page_size)
        self._scheduler = Scheduler(self._pool, max_running=max_running, token_budget=token_budget)
        options = {"num_pages": num_pages, "page_size": page_size}
        self._runner = Runner(student, **options, cascade=cascade, attention=attention)
        self.tokens_per_sync = tokens_per_sync or (8 if self._runner.device.type == "cuda" else 1)
        rounds = self.tokens_per_sync
        self._loop = DecodeLoop(self._runner, max_running=max_running, max_rounds=rounds) if rounds > 1 else None
        self._pinned: dict[Attempt, Sequence] = {}
        self._arrivals = count()
        self._prefill_tokens = self._decode_tokens = 0

    @property
    def stats(self) -> EngineStats:
        preemptions, pool = self._scheduler.num_preemptions, self._pool
        return EngineStats(self._prefill_tokens, self._decode_tokens, preemptions, pool.num_free, pool.num_pages)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def max_tokens(self) -> int:
        """The longest context, prompt and new tokens together, that the model and the page pool can hold."""
        return min(self.student.config.max_position_embeddings, self._pool.num_pages * self._pool.page_size)

    def submit(self, prompt_ids: Seq[int], params: SamplingParams, *, key: tuple[int, int]) -> Handle:
        """Queue params.n rollouts of one prompt; never blocks. `key` is (batch, question) and names the noise.

        Raises:
            ValueError: an empty prompt, a token id outside the vocabulary, a key beyond 64 bits, or a request that can
                never fit.
        """
        if not all(-(2**63) <= part < 2**63 for part in key):
            raise ValueError(f"submit: key must be two 64-bit integers, got {key}")
        token_ids = list(prompt_ids)
        self._check_fits("submit", token_ids, params)
        sequence = Sequence(
            key=RolloutKey(*key),
            params=params,
            token_ids=token_ids,
            attempt_start=len(token_ids),
            priority=(1, next(self._arrivals)),
            num_rollouts=params.n,
            policy_version=self.policy_version,
        )
        self._scheduler.enqueue(sequence)
        return Handle(sequence.key, 0, params.n)

    def resume(self, attempt: Attempt, suffix_ids: Seq[int], params: SamplingParams, *, kept_tokens: int) -> Handle:
        """Queue the next attempt of a finished one, behind a prefix of its row and suffix_ids.

        The row is what the attempt saw and what it sampled; its first kept_tokens tokens stay. One
        rollout goes on, whatever params.n says.

        The finished attempt's pages go over to the new one, which prefills suffix_ids, and the last
        sampled token too where the whole row stays. A page that siblings hold too is copied before
        it is written to; everything is computed again if the pages were taken or the weights changed.

        Raises:
            ValueError: the attempt was released or resumed before, kept_tokens is not in
                [1, length of the row], suffix_ids is empty, or the context can never fit.
        """
        old = self._pinned.get(attempt)
        if old is None:
            raise ValueError(
                f"resume: attempt must be finished, neither released nor resumed before, got {attempt.key} rollout "
                f"{attempt.rollout_idx} attempt {attempt.attempt_idx}; submit the whole context instead"
            )
        if not suffix_ids:
            raise ValueError(
                "resume: suffix_ids must be non-empty, got none; the next attempt needs a context of its own"
            )
        if not 1 <= kept_tokens <= len(old.token_ids):
            raise ValueError(
                f"resume: kept_tokens must be in [1, {len(old.token_ids)}], got {kept_tokens}; "
                f"the row is {old.attempt_start} tokens of context and {attempt.num_tokens} sampled ones"
            )
        token_ids = old.token_ids[:kept_tokens] + list(suffix_ids)
        self._check_fits("resume", token_ids, params)
        del self._pinned[attempt]
        self._scheduler.pinned.remove(old)
        self._runner.copy_pages(self._scheduler.shorten(old, kept_tokens))
        sequence = Sequence(
            key=old.key,
            params=params,
            token_ids=token_ids,
            attempt_start=len(token_ids),
            priority=(0, next(self._arrivals)),
            rollout_idx=old.rollout_idx,
            attempt_idx=old.attempt_idx + 1,
            policy_version=self.policy_version,
            pages=old.pages,
            num_cached=old.num_cached,
        )
        self._scheduler.enqueue(sequence)
        return Handle(sequence.key, sequence.attempt_idx, 1)

    def step(self) -> list[Attempt]:
        """One scheduler step: forward, sample, and return the attempts that finished, their pages still pinned."""
        plan = self._scheduler.plan()
        if not plan:
            assert not self.has_work, "work is queued but nothing can be scheduled"
            return []
        sequences = [sequence for sequence, _ in plan]
        if (
            self._loop
            and not self._scheduler.waiting
            and all(s.num_sampled > 0 and s.num_pending == 1 for s in sequences)
        ):
            return self._decode(self._loop, sequences)
        hidden_BD = self._runner.forward(plan)
        rows: list[tuple[int, Sequence]] = []  # who samples a token, and from which row
        for row, (sequence, num_tokens) in enumerate(plan):
            if sequence.num_sampled > 0 and num_tokens == 1:
                self._decode_tokens += 1
            else:
                self._prefill_tokens += num_tokens
            sequence.num_cached += num_tokens
            if sequence.num_pending == 0:
                rows += [(row, child) for child in self._fork(sequence)]
        finished = []
        for (_, sequence), drawn in zip(
            rows, sample_tokens(self.student, hidden_BD, rows) if rows else [], strict=True
        ):
            sequence.append(*drawn)
            if attempt := self._finish(sequence):
                finished.append(attempt)
        return finished

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams,
        *,
        keys: Seq[tuple[int, int]] | None = None,
        keep: bool = False,
    ) -> list[list[Attempt]]:
        """Submit every prompt and step until all are done: groups[q][r]. keep leaves the pages pinned for resume.

        keys: one (batch, question) a prompt; default (0, q). The engine must be idle.
        """
        if self.has_work:
            raise ValueError("generate: the engine must be idle, got unfinished requests; step until they are done")
        keys = [(0, q) for q in range(len(prompts))] if keys is None else keys
        if len(keys) != len(prompts) or len(set(keys)) != len(keys):
            raise ValueError(f"generate: keys must be {len(prompts)} different pairs, got {list(keys)}")
        place = {RolloutKey(*key): q for q, key in enumerate(keys)}
        for prompt_ids in prompts:  # all or none: a refused prompt must not leave others queued
            self._check_fits("generate", list(prompt_ids), params)
        groups: list[list[Attempt]] = [[] for _ in prompts]
        for prompt_ids, key in zip(prompts, keys, strict=True):
            self.submit(prompt_ids, params, key=key)
        while self.has_work:
            for attempt in self.step():
                groups[place[attempt.key]].append(attempt)
        for group in groups:
            group.sort(key=lambda attempt: attempt.rollout_idx)
            if not keep:
                self.release(group)
        return groups

    def release(self, attempts: Iterable[Attempt]) -> None:
        """Give back the pages of finished attempts; one that was resumed or released before is passed over."""
        for attempt in attempts:
            sequence = self._pinned.pop(attempt, None)
            if sequence is not None:
                self._scheduler.pinned.remove(sequence)
                sequence.drop_pages(self._pool)

    def cancel(self, key: tuple[int, int]) -> None:
        """Forget what is queued or running under this key; finished attempts stay until they are released."""
        for sequence in self._scheduler.remove(RolloutKey(*key)):
            sequence.drop_pages(self._pool)

    def bump_policy_version(self) -> None:
        """The weights changed: no page computed before is used again (running sequences are computed anew).

        An attempt under way keeps the version that sampled its first token.
        """
        self.policy_version += 1
        self._runner.bind_weights()
        self._scheduler.drop_all_pages()
        for sequence in self._scheduler.waiting:  # that is everyone now
            if sequence.num_sampled == 0:
                sequence.policy_version = self.policy_version

    def _decode(self, loop: DecodeLoop, sequences: list[Sequence]) -> list[Attempt]:
        """Several tokens of each sequence at once; those behind a sequence's end are dropped."""
        finished: dict[Sequence, Attempt] = {}
        num_rounds = self._scheduler.look_ahead(sequences, self.tokens_per_sync)
        for drawn in loop.run(sequences, num_rounds):
            for sequence, values in zip(sequences, drawn, strict=True):
                if sequence not in finished:
                    sequence.num_cached += 1
                    self._decode_tokens += 1
                    sequence.append(*values)
                    if attempt := self._finish(sequence):
                        finished[sequence] = attempt
        for sequence in finished:
            sequence.shorten(self._pool, sequence.num_cached)
        return list(finished.values())

    def _fork(self, root: Sequence) -> list[Sequence]:
        if root.num_rollouts == 1:
            return [root]
        children = root.children(self._arrivals)
        self._runner.copy_pages(self._scheduler.fork(root, children))
        return children

    def _finish(self, sequence: Sequence) -> Attempt | None:
        """Pin a sequence that has just ended and describe its attempt; None while it goes on."""
        attempt = sequence.attempt()
        if attempt is not None:
            self._scheduler.pin(sequence)
            self._pinned[attempt] = sequence
        return attempt

    def _check_fits(self, where: str, token_ids: list[int], params: SamplingParams) -> None:
        config, total = self.student.config, len(token_ids) + params.max_new_tokens
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
            rule = f"non-empty and in [0, {config.vocab_size})"
            raise ValueError(f"{where}: token ids must be {rule}, got {token_ids[:8]}")
        if total > config.max_position_embeddings:
            raise ValueError(
                f"{where}: prompt + max_new_tokens must be <= the model's {config.max_position_embeddings} positions, "
                f"got {len(token_ids)} + {params.max_new_tokens}; shorten the prompt or lower max_new_tokens"
            )
        if (needed := self._pool.pages_for(total)) > self._pool.num_pages:
            raise ValueError(
                f"{where}: need {needed} pages of {self._pool.page_size} tokens, the pool has {self._pool.num_pages}; "
                "raise engine.kv_cache_gib or lower max_new_tokens"
            )
