"""What the engine computes on: Sequence, one rollout under way, and Step, one step of many as
tensors.

fresh_batch names a batch whose rollouts share their sampling noise with nobody else's.
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

_fresh_batches = count(2**40)  # far from any batch that a trainer numbers


def fresh_batch() -> int:
    """Returns a batch number for a key that no other call in this process gets.

    Two attempts under one key would be drawn with the same noise, so an engine takes a key only
    once at a time. Used again later it draws the same tokens, which is what evaluations want.
    It is a count, not a random number: a program that is run twice gets the same ones.
    """
    return next(_fresh_batches)


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One rollout: its tokens so far, the pages that hold their KV, and what was sampled.

    `token_ids[:num_cached]` have KV in `pages`; `token_ids[attempt_start:]` are the running
    attempt's own.

    num_rollouts > 1 marks a group's prompt, which is prefilled once and then forked. `priority`
    orders the queue: (0, ..) resumed, forked or preempted, (1, ..) new; the second entry is the
    order of arrival. is_live: neither finished nor cancelled, so what is drawn for it counts.
    """

    key: RolloutKey
    params: SamplingParams
    token_ids: list[int]
    attempt_start: int
    priority: tuple[int, int]
    rollout_idx: int = 0
    num_rollouts: int = 1
    attempt_idx: int = 0
    policy_version: int = 0
    pages: "array[int]" = field(
        default_factory=lambda: array("i")
    )  # int32: copied into the block table as it is
    num_cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    is_live: bool = True

    def __post_init__(self) -> None:
        """noise_key: the key of this attempt's noise, still without the position."""
        self.noise_key = row_key(self.params.seed, *self.key, self.rollout_idx, self.attempt_idx)

    @property
    def num_pending(self) -> int:
        """Tokens that must be forwarded before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_cached

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - self.attempt_start

    def append(self, token_id: float, logprob: float, kept_mass: float) -> None:
        """What was drawn; token_id comes as a float, from one tensor with the others."""
        self.token_ids.append(int(token_id))
        self.logprobs.append(logprob)
        self.kept_mass.append(kept_mass)

    def attempt(self) -> Attempt | None:
        """What was sampled, once an eos id or the length limit ends it; None before."""
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
        """The rollouts of a prefilled prompt, without pages yet."""
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
        """The same rollout goes on behind token_ids; the KV that this attempt still has goes over
        to it.
        """
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
        """Forget the KV of every token from num_tokens on and give back the pages that held nothing
        else.
        """
        self.num_cached = min(self.num_cached, num_tokens)
        while len(self.pages) > pool.pages_for(self.num_cached):
            pool.release(self.pages.pop())

    def drop_pages(self, pool: PagePool) -> None:
        """Give back every page; the tokens are kept, so the KV can be computed again."""
        self.shorten(pool, 0)


@dataclass(frozen=True)
class Step:
    """Where one step's tokens are and what they see; all tensors on the device.

    The runner packs it, and the decode loop keeps it up to date.
    """

    token_ids_T: Tensor  # [T] int64
    positions_T: Tensor  # [T] int64
    slots_T: Tensor  # [T] int64, page * page_size + place in it
    block_table_BM: Tensor  # int32
    seq_lens_B: Tensor  # int32, this step's tokens included
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    groups_BG: Tensor | None = (
        None  # int32, of ops/prefix_groups.py: who reads shared pages for whom
    )
