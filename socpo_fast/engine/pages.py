"""Manages the page pool: reference counts of KV pages. It knows no tensors and no tokens.

The life of a page. The number is its ref_count; an owner is a sequence that has it in `pages`.

               allocate               share, by Scheduler.fork or share_prefix
    free (0) -----------> owned (1) ------------------------------------------> shared (n)
       ^                  the owner  <----------------------------------------  its owners
       |                  writes KV      release, until one owner is left       only read it
       |                     |                                                     |
       |                     +-------------------------+---------------------------+
       |                                               | the attempt ends: Scheduler.append
       |                                               v
       |                                     pinned, same ref_count: the finished attempt
       |                                     keeps its pages while the teacher writes
       |                                               | Engine.resume
       |                                               v
       |        the next attempt owns the pages. It writes from the end of its KV on:
       |          last page full             -> into newly allocated pages
       |          last page partial, owned   -> into that page
       |          last page partial, shared  -> copy on write: into an allocated copy of it; the
       |                                        shared page is released
       |
       +---- release, when ref_count falls to 0: by Engine.release or cancel, by new weights, or
             because pages run out; pinned sequences lose theirs first. Their tokens stay, so the
             KV can be recomputed.

A fork copies on write as well: its children share the prompt's full pages, and each child but the
first gets a copy of the partial last page. So a shared page is never written to.
"""


class PagePool:
    """`num_pages` pages of `page_size` tokens. A page is free or owned by one or more sequences."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self.reset()

    def reset(self) -> None:
        """Frees every page, with or without owners."""
        # A stack: the page freed last is allocated first, while it may still be in a cache.
        self._free = list(range(self.num_pages - 1, -1, -1))
        self.ref_count = [0] * self.num_pages

    @property
    def num_free(self) -> int:
        """Returns the number of free pages."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Returns the number of pages that num_tokens tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.page_size)

    def allocate(self) -> int:
        """Returns a free page, now with one owner."""
        assert self._free, "the scheduler makes room before it allocates"
        page = self._free.pop()
        self.ref_count[page] = 1
        return page

    def share(self, page: int) -> int:
        """Adds an owner to a page and returns the page."""
        assert self.ref_count[page] > 0, f"page {page} is free"
        self.ref_count[page] += 1
        return page

    def release(self, page: int) -> None:
        """Removes an owner from a page; the page is free when that was the last one."""
        assert self.ref_count[page] > 0, f"page {page} is free"
        self.ref_count[page] -= 1
        if self.ref_count[page] == 0:
            self._free.append(page)
