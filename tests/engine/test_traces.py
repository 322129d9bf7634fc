"""Checks random traces: any order of calls leaves the pages consistent and every attempt right.

An attempt is right if it equals that of an engine in which nothing else happens. The moves and the
model of the pages are in tests.helpers.traces.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers.tiny import make_student
from tests.helpers.traces import Trace


def run_traces(seeds: range) -> Counter:
    """Runs traces; returns how often each kind of event happened, so that none is missed."""
    student = make_student()
    counts = Counter()
    for seed in seeds:
        trace = Trace(seed, student)
        try:
            trace.run(num_moves=40)
            trace.check_tokens()
        except BaseException as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
        counts["preemptions"] += trace.engine.stats.preemptions
        counts["weights"] += trace.engine.policy_version
        counts["attempts"] += len(trace.finished)
        counts["third attempts"] += sum(attempt.attempt_idx >= 2 for attempt in trace.finished)
        counts["under two weights"] += sum(
            len(dict(starts)) > 1 for starts in trace.versions.values()
        )
        counts["into a shared page"] += trace.num_shared
        counts["interrupts"] += trace.num_interrupts
        counts["refused keys"] += trace.num_refused_keys
    return counts


def test_traces() -> None:
    """Sixty traces pass, and every kind of event happened in them."""
    counts = run_traces(range(60))
    assert len(counts) == 8 and min(counts.values()) > 10, counts


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_thousand_traces(block: int) -> None:
    run_traces(range(1000 + 100 * block, 1100 + 100 * block))
