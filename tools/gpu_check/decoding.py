"""Decodes a batch as in a rollout: the host reads every eight tokens, graphs are replayed."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model import Decoder
from socpo_fast.report.sizes import kv_bytes
from tools.gpu_check.check import Check
from tools.gpu_check.engines import prompts_of
from tools.gpu_check.timing import median_ms

PAGE_SIZE = 32
CONTEXT = 800
TINY_CONTEXT = 24
TOKENS_A_READ = 8
# One measurement takes so many host reads; the median of the repeats counts.
TIMED_READS = 4
REPEATS = 3
# Early sequences decode already while late ones are prefilled. No sequence may end before the last
# measurement, hence 8 reads more than are timed.
NEW_TOKENS = TOKENS_A_READ * (TIMED_READS * REPEATS + 8)


def params_of(num_new: int = NEW_TOKENS, **changes: Any) -> SamplingParams:
    """Returns parameters with which every sequence has exactly `num_new` tokens."""
    usual = {"temperature": 1.0, "max_new_tokens": num_new, "n": 1, "eos_ids": ()}
    return SamplingParams(**usual | {"ignore_eos": True} | changes)


def make_engine(student: Decoder, num_tokens: int, *, stream_priority: int | None = None) -> Engine:
    """Returns an engine with pages for so many tokens."""
    itemsize = student.lm_head.weight.element_size()
    gib = (num_tokens + PAGE_SIZE) * kv_bytes(student.config, itemsize) / 2**30
    return Engine(
        student,
        kv_cache_gib=gib,
        page_size=PAGE_SIZE,
        tokens_per_sync=TOKENS_A_READ,
        token_budget=8192,
        stream_priority=stream_priority,
    )


class Decoding:
    """A batch that has been prefilled and decodes: `groups` prompts, `group_size` rollouts each."""

    def __init__(
        self,
        student: Decoder,
        groups: int,
        group_size: int,
        context: int,
        *,
        stream_priority: int | None = None,
        **changes: Any,
    ):
        rows = groups * group_size
        # The prompt's pages once a group, and for each row its new tokens and two spare
        # pages.
        pages = groups * (-(-context // PAGE_SIZE)) + rows * (-(-NEW_TOKENS // PAGE_SIZE) + 2)
        self.engine = make_engine(student, pages * PAGE_SIZE, stream_priority=stream_priority)
        self.rows = rows
        self.context = context
        params = params_of(n=group_size, **changes)
        for idx, prompt in enumerate(prompts_of(student, groups, context)):
            self.engine.submit(prompt, params, key=(0, idx))
        while len(self._running()) < rows:
            self.engine.step()  # prefill
        for _ in range(2):
            self.engine.step()  # the first decode steps compile and capture

    def _running(self) -> list[Sequence]:
        """Returns the sequences whose prefill is done."""
        return [s for s in self.engine.scheduler.running if s.num_sampled > 0]

    def step_ms(self, device: torch.device) -> float:
        """Returns the ms of a step (a token of every sequence), the host's work included."""
        timed = [self._timed(device) for _ in range(REPEATS)]
        self.live_tokens = int(statistics.mean(live for _, live in timed))
        return statistics.median(ms for ms, _ in timed)

    def graph_ms(self, check: Check) -> float | None:
        """Times one replay of the largest captured round; None where nothing is captured."""
        loop = self.engine.steps.loop
        if loop is None or not loop.captures:
            return None
        # Without the host: the difference to step_ms is what Python and the reads cost.
        return median_ms(loop.graphs[max(loop.graphs)].replay, check.device)

    def _timed(self, device: torch.device) -> tuple[float, int]:
        """Returns (ms of a step, keys that the middle step reads, shared ones once a reader)."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        num_cached = sum(s.num_cached for s in self._running())
        old_tokens = self.engine.stats.decode_tokens
        started = time.perf_counter()
        for _ in range(TIMED_READS):
            self.engine.step()
        seconds = time.perf_counter() - started
        num_sampled = self.engine.stats.decode_tokens - old_tokens
        return 1e3 * seconds * self.rows / num_sampled, num_cached + num_sampled // 2
