"""One rollout as the engine sees it: its tokens so far, the pages that hold their KV, and what was sampled."""

from __future__ import annotations

from dataclasses import dataclass, field

from socpo_fast.engine.pages import PagePool
from socpo_fast.types import RolloutKey, SamplingParams


@dataclass(eq=False, kw_only=True)
class Sequence:
    """`token_ids[:num_cached]` have KV in `pages`; `token_ids[attempt_start:]` are the running attempt's own.

    num_rollouts > 1 marks a group's prompt, which is prefilled once and then forked. `priority` orders the queue:
    (0, ..) resumed, forked or preempted, (1, ..) new; the second entry is the order of arrival.
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
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        """Tokens that must be forwarded before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_cached

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - self.attempt_start

    def append(self, token_id: int, logprob: float, kept_mass: float) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.kept_mass.append(kept_mass)

    def shorten(self, pool: PagePool, num_tokens: int) -> None:
        """Forget the KV of every token from num_tokens on and give back the pages that held nothing else."""
        self.num_cached = min(self.num_cached, num_tokens)
        while len(self.pages) > pool.pages_for(self.num_cached):
            pool.release(self.pages.pop())

    def drop_pages(self, pool: PagePool) -> None:
        """Give back every page; the tokens are kept, so the KV can be computed again."""
        self.shorten(pool, 0)
