"""Decides which sequence computes how many tokens in a step, and which is preempted.

Read Scheduler.plan, then _make_room, then fork. A sequence is in one of three collections:

                     plan                         append: the attempt ends
    enqueue -> waiting -----------> running ---------------------------------> pinned
               in the queue,        at most max_running,                       finished, pages kept
               perhaps with pages   computes in every step                     for the next attempt
                  ^                    |
                  +--------------------+ preempted: pages released, tokens kept

A step has one token budget. It goes to running sequences first, then to resumed attempts, then to
new prompts (long ones in chunks). When pages run out, pinned sequences lose theirs first, then
waiting ones, then the youngest running one. Their tokens stay, so their KV is recomputed and no
request fails.
"""

from array import array
from bisect import insort

from socpo_fast.engine.pages import PagePool
from socpo_fast.engine.sequence import Sequence
from socpo_fast.types import Attempt, RolloutKey


class Scheduler:
    """Holds all sequences and assigns pages of the pool to them; it touches no tensor."""

    def __init__(self, pool: PagePool, *, max_running: int, token_budget: int):
        self.pool = pool
        self.max_running = max_running
        self.token_budget = token_budget
        self.num_preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forgets every sequence and frees every page, even those of sequences in no collection."""
        self.waiting: list[Sequence] = []  # sorted by priority
        self.running: list[Sequence] = []  # sorted by priority: the youngest is last
        self.pinned: dict[Attempt, Sequence] = {}  # in the order in which they finished
        self.pool.reset()

    def enqueue(self, sequence: Sequence) -> None:
        """Adds a sequence to the queue, at its priority."""
        insort(self.waiting, sequence, key=lambda s: s.priority)

    def share_prefix(self, sequence: Sequence, prefix: Sequence) -> None:
        """Shares the full pages of a kept prefix with a new sequence that begins with it."""
        num_tokens = prefix.attempt_start // self.pool.page_size * self.pool.page_size
        has_prefix = sequence.token_ids[:num_tokens] == prefix.token_ids[:num_tokens]
        # One token must be left to forward: its hidden state is what the first draw needs.
        if has_prefix and num_tokens < len(sequence.token_ids):
            shared = prefix.pages[: self.pool.pages_for(num_tokens)]
            sequence.pages = array("i", map(self.pool.share, shared))
            sequence.num_cached = num_tokens

    def plan(self) -> list[tuple[Sequence, int]]:
        """Returns the next step, [(sequence, number of its pending tokens to forward)]; [] if idle.

        The pages for these tokens are allocated.
        """
        planned: list[tuple[Sequence, int]] = []
        budget = self.token_budget
        # Decoding sequences that are not planned yet. A chunk of a long prefill leaves one token of
        # the budget to each of them, so that it never stalls decoding.
        num_decoding = sum(sequence.num_pending == 1 for sequence in self.running)
        # From old to young. Only the last sequence is ever preempted, perhaps this one itself. So
        # the list may shrink in this loop, and no sequence that is already planned loses its pages.
        for sequence in self.running:
            if budget == 0:
                break
            num_decoding -= sequence.num_pending == 1
            num_tokens = (
                1 if sequence.num_pending == 1 else min(sequence.num_pending, budget - num_decoding)
            )
            if num_tokens > 0 and self._make_room(sequence, num_tokens):
                planned.append((sequence, num_tokens))
                budget -= num_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            num_tokens = min(sequence.num_pending, budget)
            if self.running and self._pages_missing(sequence, num_tokens) > self.pool.num_free:
                # A newcomer waits for free pages. Only when nothing runs may it take the pages of
                # pinned and waiting sequences, since then nothing else would free any.
                break
            self.waiting.pop(0)  # first, so that _make_room does not take its pages
            made_room = self._make_room(sequence, num_tokens)
            assert made_room, "check_fits has made sure that a single sequence fits"
            insort(self.running, sequence, key=lambda s: s.priority)
            planned.append((sequence, num_tokens))
            budget -= num_tokens
        return planned

    def allocate_lookahead(self, sequences: list[Sequence], most: int) -> int:
        """Allocates pages for up to `most` more tokens of each decoding sequence.

        Returns how many tokens that is: as many as every sequence may still sample and as the free
        pages can hold.
        """
        num_tokens = min(most, *(s.params.max_new_tokens - s.num_sampled for s in sequences))
        while sum(self._pages_missing(s, num_tokens) for s in sequences) > self.pool.num_free:
            # Ends where pages are allocated already: plan() allocated one token per sequence, and
            # launched rounds have theirs.
            num_tokens -= 1
        for sequence in sequences:
            self._allocate(sequence, num_tokens)
        return num_tokens

    def release_lookahead(self, attempts: list[Attempt]) -> None:
        """Releases the pages that allocate_lookahead reserved beyond the end of these attempts."""
        for sequence in [self.pinned[attempt] for attempt in attempts]:
            sequence.shorten(self.pool, sequence.num_cached)

    def fork(self, root: Sequence, children: list[Sequence]) -> list[tuple[int, int]]:
        """Gives each child the prompt's KV; returns the (from, to) page copies that this needs.

        root       [page 5][page 8][page 3, half full]
        child 0    [page 5][page 8][page 3]               takes over the root's pages
        child 1    [page 5][page 8][page 6]               shares full pages, copies 3 to 6
        child 2    [page 5][page 8][page 9]               shares full pages, copies 3 to 9
        """
        self.running.remove(root)
        copies = []
        for child in children[1:]:
            child.pages = array("i", map(self.pool.share, root.pages))
            child.num_cached = root.num_cached
            copies += self.copy_shared_last_page(child)
        children[0].pages = root.pages
        children[0].num_cached = root.num_cached
        for child in children:
            # Those beyond max_running wait in the queue with their pages.
            if len(self.running) < self.max_running:
                insort(self.running, child, key=lambda s: s.priority)
            else:
                self.enqueue(child)
        return copies

    def append(self, sequence: Sequence, drawn: list[float]) -> Attempt | None:
        """Appends a draw; if it ends the attempt, pins the sequence and returns the attempt."""
        sequence.append(*drawn)
        if attempt := sequence.attempt():
            sequence.is_live = False
            # A child that a fork left waiting has drawn its first token too, from the prompt's row.
            (self.running if sequence in self.running else self.waiting).remove(sequence)
            self.pinned[attempt] = sequence
        return attempt

    def drop_all_pages(self, policy_version: int) -> None:
        """Releases all pages, because the weights changed: all KV must be recomputed."""
        self.waiting = sorted([*self.waiting, *self.running], key=lambda s: s.priority)
        self.running = []
        for sequence in (*self.waiting, *self.pinned.values()):
            sequence.drop_pages(self.pool)
        # An attempt belongs to the version that sampled its first token, so those that have sampled
        # keep theirs.
        for sequence in self.waiting:
            if sequence.num_sampled == 0:
                sequence.policy_version = policy_version

    def remove(self, key: RolloutKey) -> list[Sequence]:
        """Removes the unfinished sequences of a key from their lists and returns them."""
        removed = [sequence for sequence in (*self.waiting, *self.running) if sequence.key == key]
        for sequence in removed:
            sequence.is_live = False
        self.waiting = [sequence for sequence in self.waiting if sequence.key != key]
        self.running = [sequence for sequence in self.running if sequence.key != key]
        return removed

    def copy_shared_last_page(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Makes a sequence the only owner of its partial last page; returns (from, to) page copies.

        This is the copy on write. If no page is free, the sequence gives its part of the shared
        page up, and those tokens are prefilled again.
        """
        num_partial = sequence.num_cached % self.pool.page_size
        if num_partial == 0 or self.pool.ref_count[sequence.pages[-1]] == 1:
            return []
        shared = sequence.pages.pop()
        self.pool.release(shared)  # its other owners keep it, so it can be copied from later
        if self.pool.num_free == 0:
            sequence.num_cached -= num_partial
            return []
        sequence.pages.append(self.pool.allocate())
        return [(shared, sequence.pages[-1])]

    def _pages_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Returns how many pages a sequence lacks for the KV of num_tokens more tokens."""
        return self.pool.pages_for(sequence.num_cached + num_tokens) - len(sequence.pages)

    def _allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocates the pages that num_tokens more tokens need; enough pages must be free."""
        for _ in range(self._pages_missing(sequence, num_tokens)):
            sequence.pages.append(self.pool.allocate())

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates pages for num_tokens more tokens, preempting others if there are too few.

        Returns False if the sequence itself was the one to be preempted.
        """
        while self._pages_missing(sequence, num_tokens) > self.pool.num_free:
            # Sequences that compute nothing lose their pages first: the oldest pinned one, then
            # the last one in the queue.
            idle = (*self.pinned.values(), *reversed(self.waiting))
            if victim := next((s for s in idle if s.pages), None):
                victim.drop_pages(self.pool)
            else:
                self.preempt(victim := self.running[-1])
            self.num_preemptions += 1
            if victim is sequence:
                return False
        self._allocate(sequence, num_tokens)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Preempts a sequence: puts it back into the queue, before new prompts, without pages."""
        self.running.remove(sequence)
        sequence.drop_pages(self.pool)
        sequence.priority = (0, sequence.priority[1])
        self.enqueue(sequence)
