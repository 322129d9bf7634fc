"""Counts the bytes of tensors on the fake card, now and at most.

A tensor on the fake card has a storage without memory, which lives exactly as long as real memory
would. So storages are counted: views share one, a parameter counts once, and a freed storage is
subtracted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator

from torch import Tensor, UntypedStorage

from tools.gpu_check.launches import label

BLOCK_BYTES = 512  # PyTorch's allocator rounds sizes up to multiples of this
# What tensors can use of an 80 GB card: its driver reports 79.1 GiB, of which CUDA's context and
# the libraries take about one.
CARD_GIB = 78.0
_NO_POOL = 0  # the allocator's usual memory, outside of all graphs
Event = tuple[int, int, str]  # (storage, its bytes or 0 when it is freed, its first tensor)


class Memory:
    """Counts what torch.cuda.memory_allocated and max_memory_allocated would return.

    A pool of CUDA graphs counts at its largest size as long as one of its graphs lives: memory that
    is freed during a capture stays in the pool. Not counted are CUDA's context, the workspaces of
    libraries, temporary memory inside of an op, and the gaps that an allocator leaves.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0  # of tensors, since reset_peak
        self.most_bytes = 0  # of tensors and pools, since start
        self._live: Counter[int] = Counter()  # pool -> bytes of tensors
        self._held: Counter[int] = Counter()  # pool of graphs -> bytes kept for it
        self._graphs: Counter[int] = Counter()  # pool -> graphs that live
        self._pool = _NO_POOL
        # storage -> (weak reference that reports its end, pool, bytes)
        self._storages: dict[int, tuple[weakref.ref[UntypedStorage], int, int]] = {}
        self._num_pools = 0
        self.log: list[Event] | None = None  # allocations and frees, if somebody sets a list

    @property
    def live_bytes(self) -> int:
        """Bytes of all live tensors."""
        return sum(self._live.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of all live tensors, and what the pools of graphs hold beyond theirs."""
        return self._live[_NO_POOL] + sum(self._held.values())

    @property
    def is_full(self) -> bool:
        """Whether a card would have run out of memory at some moment."""
        return self.most_bytes > CARD_GIB * 2**30

    def add(self, x: Tensor) -> bool:
        """Counts a tensor whose storage is new; returns whether it was."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages or storage.nbytes() == 0:
            return False
        pool = self._pool
        num_bytes = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key)), pool, num_bytes
        self._live[pool] += num_bytes
        if self.log is not None:
            self.log.append((key, num_bytes, label(x)))
        if pool != _NO_POOL:
            self._held[pool] = max(self._held[pool], self._live[pool])
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self.most_bytes = max(self.most_bytes, self.held_bytes)
        return True

    def _remove(self, key: int) -> None:
        _, pool, num_bytes = self._storages.pop(key)
        self._live[pool] -= num_bytes
        if self.log is not None:
            self.log.append((key, 0, ""))
        self._forget(pool)

    def reset_peak(self) -> None:
        """Does what torch.cuda.reset_peak_memory_stats does."""
        self.peak_bytes = self.live_bytes

    def start(self) -> None:
        """Starts a new measurement: both maxima begin at what is held now."""
        self.reset_peak()
        self.most_bytes = self.held_bytes

    @contextlib.contextmanager
    def capture(self, graph: object, pool: int | None) -> Iterator[int]:
        """Counts new tensors in the graph's pool: the one that is passed, or a new one."""
        if pool is None:
            self._num_pools += 1
            pool = self._num_pools
        self._graphs[pool] += 1
        # Nothing is reported at the interpreter's exit, when modules are already gone.
        weakref.finalize(graph, self._drop_graph, pool).atexit = False
        outer, self._pool = self._pool, pool
        try:
            yield pool
        finally:
            self._pool = outer

    def _drop_graph(self, pool: int) -> None:
        self._graphs[pool] -= 1
        self._forget(pool)

    def _forget(self, pool: int) -> None:
        """Shrinks a pool without graphs to the tensors that still live in it."""
        if pool != _NO_POOL and self._graphs[pool] == 0:
            self._held[pool] = self._live[pool]
