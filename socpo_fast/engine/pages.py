"""The page pool: who holds which page of KV, by reference count. Knows nothing of tensors or
tokens.
"""


class PagePool:
    """`num_pages` pages of `page_size` tokens. A page is free, or held by one or more sequences."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages = num_pages
        self.page_size = page_size
        self.reset()

    def reset(self) -> None:
        """Every page is free, whoever held it."""
        self._free = list(
            range(self.num_pages - 1, -1, -1)
        )  # a stack: the page freed last is still in cache
        self.ref_count = [0] * self.num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self) -> int:
        assert self._free, "the scheduler makes room before it allocates"
        page = self._free.pop()
        self.ref_count[page] = 1
        return page

    def share(self, page: int) -> int:
        assert self.ref_count[page] > 0, f"page {page} is free"
        self.ref_count[page] += 1
        return page

    def release(self, page: int) -> None:
        assert self.ref_count[page] > 0, f"page {page} is free"
        self.ref_count[page] -= 1
        if self.ref_count[page] == 0:
            self._free.append(page)
