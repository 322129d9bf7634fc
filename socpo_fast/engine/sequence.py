"""Holds the engine's two data types: Sequence, one running rollout, and Step, one forward's inputs.

Read Sequence first. A Step packs the pending tokens of many sequences into tensors. fresh_batch
returns a batch number whose rollouts share their sampling noise with no others.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from socpo_fast.engine.pages import PagePool
from socpo_fast.ops import row_key
from socpo_fast.types import Attempt, RolloutKey, SamplingParams

# Starts far above the batch numbers of any trainer, so that the two never meet.
_fresh_batches = count(2**40)


def fresh_batch() -> int:
    """Returns a batch number for keys that no other call in this process gets.

    Two attempts under one key are drawn with the same noise. So an engine accepts a key only while
    no rollout under it is in flight. A key that is used again later draws the same tokens, which is
    what evaluations want. The number is a counter, not random: two runs of a program get the same.
    """
    return next(_fresh_batches)


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One rollout: its tokens so far, the pages that hold their KV, and the sampled numbers.

        token_ids   | context of this attempt         | sampled so far      |
                    0                                 attempt_start         len(token_ids)
        KV          | in `pages`                             | pending      |
                    0                                        num_cached

    While decoding, one token is pending: the one that was sampled last.
    """

    key: RolloutKey
    params: SamplingParams
    token_ids: list[int]
    attempt_start: int
    # Orders the queue: (0, ..) resumed, forked or preempted, (1, ..) new; then order of arrival.
    priority: tuple[int, int]
    rollout_idx: int = 0
    # Above 1 for a group's prompt, which is prefilled once and then forked so many times.
    num_rollouts: int = 1
    attempt_idx: int = 0
    policy_version: int = 0
    # An int32 array, not a list: it is copied into a row of the block table without conversion.
    pages: "array[int]" = field(default_factory=lambda: array("i"))
    num_cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    # Neither finished nor cancelled. Tokens that launched steps draw for a dead one are dropped.
    is_live: bool = True

    def __post_init__(self) -> None:
        """Sets noise_key, the key of this attempt's noise before the position is mixed in."""
        self.noise_key = row_key(self.params.seed, *self.key, self.rollout_idx, self.attempt_idx)

    @property
    def num_pending(self) -> int:
        """Returns how many tokens to forward before the next one is sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_cached

    @property
    def num_sampled(self) -> int:
        """Returns how many tokens this attempt has sampled so far."""
        return len(self.token_ids) - self.attempt_start

    def append(self, token_id: float, logprob: float, kept_mass: float) -> None:
        """Appends a draw; token_id is a float because it comes in one tensor with the rest."""
        self.token_ids.append(int(token_id))
        self.logprobs.append(logprob)
        self.kept_mass.append(kept_mass)

    def attempt(self) -> Attempt | None:
        """Returns the attempt if an eos id or the length limit has ended it, else None."""
        stopped = not self.params.ignore_eos and self.token_ids[-1] in self.params.eos_ids
        if not stopped and self.num_sampled < self.params.max_new_tokens:
            return None
        return Attempt(
            token_ids=self.token_ids[self.attempt_start :],
            logprobs=torch.tensor(self.logprobs, dtype=torch.float32),
            kept_mass=torch.tensor(self.kept_mass, dtype=torch.float32),
            finish_reason="stop" if stopped else "length",
            key=self.key,
            rollout_idx=self.rollout_idx,
            attempt_idx=self.attempt_idx,
            policy_version=self.policy_version,
        )

    def children(self, arrivals: Iterator[int]) -> "list[Sequence]":
        """Returns the rollouts of a prefilled prompt, without pages yet."""
        return [
            Sequence(
                key=self.key,
                params=self.params,
                token_ids=list(self.token_ids),
                attempt_start=self.attempt_start,
                priority=(0, next(arrivals)),
                rollout_idx=self.rollout_idx + i,
                policy_version=self.policy_version,
            )
            for i in range(self.num_rollouts)
        ]

    def next_attempt(
        self, token_ids: list[int], params: SamplingParams, arrival: int, policy_version: int
    ) -> "Sequence":
        """Returns the rollout's next attempt, on the same pages, with token_ids as its context."""
        return Sequence(
            key=self.key,
            params=params,
            token_ids=token_ids,
            attempt_start=len(token_ids),
            priority=(0, arrival),
            rollout_idx=self.rollout_idx,
            attempt_idx=self.attempt_idx + 1,
            policy_version=policy_version,
            pages=self.pages,
            num_cached=self.num_cached,
        )

    def shorten(self, pool: PagePool, num_tokens: int) -> None:
        """Keeps the KV of the first num_tokens tokens and releases the pages behind it."""
        self.num_cached = min(self.num_cached, num_tokens)
        while len(self.pages) > pool.pages_for(self.num_cached):
            pool.release(self.pages.pop())

    def drop_pages(self, pool: PagePool) -> None:
        """Releases every page. The tokens stay, so the KV can be recomputed."""
        self.shorten(pool, 0)


@dataclass(frozen=True)
class Step:
    """The inputs of one forward over pages: the step's tokens, where their KV goes, what they see.

    All tensors are on the device. The runner packs a step from sequences; the decode loop builds
    one from its own state. B sequences, T tokens of this step, M pages at most in a sequence:

        token_ids_T      | sequence 0    | 1 | 2 | sequence 3      |    packed, no padding
        cu_seqlens_q     0               4   5   6                 11
        block_table_BM   a row of page numbers for each sequence, in the order of its tokens
    """

    token_ids_T: Tensor  # [T] int64
    positions_T: Tensor  # [T] int64
    slots_T: Tensor  # [T] int64, page * page_size + offset in the page: where the KV is written
    block_table_BM: Tensor  # [B, M] int32
    seq_lens_B: Tensor  # [B] int32, this step's tokens included
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    # int32, made by ops/prefix_groups.py: which rows have their shared pages read together.
    groups_BG: Tensor | None = None
