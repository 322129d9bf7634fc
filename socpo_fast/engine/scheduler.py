"""Which sequence computes how many tokens in the next step, and who gives way when pages run out.

One token budget a step, spent in this order: sequences that decode, then resumed attempts, then new
prompts (long ones in chunks). A sequence is `waiting` (in the queue, perhaps with pages), `running`
(has one of max_running places) or `pinned` (finished, its pages kept for a second attempt). When
pages run out, pinned ones lose theirs first, then waiting ones, then the youngest running; their
tokens stay, so they are computed again and nothing fails.
"""

from array import array
from bisect import insort

from socpo_fast.engine.pages import PagePool
from socpo_fast.engine.sequence import Sequence
from socpo_fast.types import Attempt, RolloutKey


class Scheduler:
    def __init__(self, pool: PagePool, *, max_running: int, token_budget: int):
        self.pool = pool
        self.max_running = max_running
        self.token_budget = token_budget
        self.num_preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forgets every sequence and frees every page, also of a sequence that is in no list."""
        self.waiting: list[Sequence] = []  # by priority
        self.running: list[Sequence] = []  # by priority: the youngest is last
        self.pinned: dict[Attempt, Sequence] = {}  # by time of finishing
        self.pool.reset()

    def enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.priority)

    def share_prefix(self, sequence: Sequence, prefix: Sequence) -> None:
        """Give a new sequence the whole pages of what it begins with, at least a token of it left
        to forward.
        """
        num_tokens = prefix.attempt_start // self.pool.page_size * self.pool.page_size
        begins_so = sequence.token_ids[:num_tokens] == prefix.token_ids[:num_tokens]
        if begins_so and num_tokens < len(sequence.token_ids):
            shared = prefix.pages[: self.pool.pages_for(num_tokens)]
            sequence.pages = array("i", map(self.pool.share, shared))
            sequence.num_cached = num_tokens

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, number of its pending tokens to forward), pages allocated; []
        when idle.
        """
        step: list[tuple[Sequence, int]] = []
        budget = self.token_budget
        num_decoding = sum(sequence.num_pending == 1 for sequence in self.running)
        for sequence in self.running:  # old to young: who gives way is the last, perhaps this one
            if budget == 0:
                break
            num_decoding -= sequence.num_pending == 1
            num_tokens = (
                1 if sequence.num_pending == 1 else min(sequence.num_pending, budget - num_decoding)
            )
            if num_tokens > 0 and self._make_room(sequence, num_tokens):
                step.append((sequence, num_tokens))
                budget -= num_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            num_tokens = min(sequence.num_pending, budget)
            if self.running and self._pages_missing(sequence, num_tokens) > self.pool.num_free:
                # a newcomer waits for pages; only when nobody runs it takes those of pinned and
                # waiting ones
                break
            self.waiting.pop(0)
            made_room = self._make_room(sequence, num_tokens)
            assert made_room, "a single sequence was checked to fit at the door"
            insort(self.running, sequence, key=lambda s: s.priority)
            step.append((sequence, num_tokens))
            budget -= num_tokens
        return step

    def look_ahead(self, sequences: list[Sequence], most: int) -> int:
        """How many tokens, at most `most`, these decoding sequences may all take in a row;
        allocates their pages.
        """
        num_tokens = min(most, *(s.params.max_new_tokens - s.num_sampled for s in sequences))
        while sum(self._pages_missing(s, num_tokens) for s in sequences) > self.pool.num_free:
            num_tokens -= 1  # ends at 1 or before: that one's pages are there
        for sequence in sequences:
            self._allocate(sequence, num_tokens)
        return num_tokens

    def release_lookahead(self, attempts: list[Attempt]) -> None:
        """Give back the pages that finished attempts were to go on in."""
        for sequence in [self.pinned[attempt] for attempt in attempts]:
            sequence.shorten(self.pool, sequence.num_cached)

    def fork(self, root: Sequence, children: list[Sequence]) -> list[tuple[int, int]]:
        """Give each child the prompt's KV: full pages shared, the partial page its own. Returns
        (from, to) page copies.

        Child 0 takes over the root's own pages.
        """
        self.running.remove(root)
        copies = []
        for child in children[1:]:
            child.pages = array("i", map(self.pool.share, root.pages))
            child.num_cached = root.num_cached
            copies += self.own_last_page(child)
        children[0].pages = root.pages
        children[0].num_cached = root.num_cached
        for child in children:
            if len(self.running) < self.max_running:
                insort(self.running, child, key=lambda s: s.priority)
            else:
                self.enqueue(child)
        return copies

    def append(self, sequence: Sequence, drawn: list[float]) -> Attempt | None:
        """Append what was drawn; where that ends the attempt, pin the sequence and return it."""
        sequence.append(*drawn)
        if attempt := sequence.attempt():
            sequence.is_live = False
            (self.running if sequence in self.running else self.waiting).remove(sequence)
            self.pinned[attempt] = sequence
        return attempt

    def drop_all_pages(self, policy_version: int) -> None:
        """The weights changed: whatever was computed with the old ones is computed again."""
        self.waiting = sorted([*self.waiting, *self.running], key=lambda s: s.priority)
        self.running = []
        for sequence in (*self.waiting, *self.pinned.values()):
            sequence.drop_pages(self.pool)
        for sequence in self.waiting:  # that is all of them but the pinned ones
            if sequence.num_sampled == 0:
                sequence.policy_version = policy_version

    def remove(self, key: RolloutKey) -> list[Sequence]:
        """Take the unfinished sequences of a key out of their lists; returns them."""
        removed = [sequence for sequence in (*self.waiting, *self.running) if sequence.key == key]
        for sequence in removed:
            sequence.is_live = False
        self.waiting = [sequence for sequence in self.waiting if sequence.key != key]
        self.running = [sequence for sequence in self.running if sequence.key != key]
        return removed

    def own_last_page(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Give a sequence a partial page that it can write to. Returns (from, to) page copies.

        A page that others hold too is copied; where no page is free, that part is computed again.
        """
        num_partial = sequence.num_cached % self.pool.page_size
        if num_partial == 0 or self.pool.ref_count[sequence.pages[-1]] == 1:
            return []
        shared = sequence.pages.pop()
        self.pool.release(shared)
        if self.pool.num_free == 0:
            sequence.num_cached -= num_partial
            return []
        sequence.pages.append(self.pool.allocate())
        return [(shared, sequence.pages[-1])]

    def _pages_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return self.pool.pages_for(sequence.num_cached + num_tokens) - len(sequence.pages)

    def _allocate(self, sequence: Sequence, num_tokens: int) -> None:
        for _ in range(self._pages_missing(sequence, num_tokens)):
            sequence.pages.append(self.pool.allocate())

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates pages for num_tokens more; False when the sequence itself was preempted."""
        while self._pages_missing(sequence, num_tokens) > self.pool.num_free:
            idle = (*self.pinned.values(), *reversed(self.waiting))
            if victim := next((s for s in idle if s.pages), None):
                victim.drop_pages(self.pool)
            else:
                self._give_way(victim := self.running[-1])
            self.num_preemptions += 1
            if victim is sequence:
                return False
        self._allocate(sequence, num_tokens)
        return True

    def _give_way(self, sequence: Sequence) -> None:
        """From running back into the queue, ahead of new prompts, without pages."""
        self.running.remove(sequence)
        sequence.drop_pages(self.pool)
        sequence.priority = (0, sequence.priority[1])
        self.enqueue(sequence)
