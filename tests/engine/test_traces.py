"""Random traces: whatever is done to an engine, its pages are in order and every attempt is its own
untouched run.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers.tiny import make_student
from tests.helpers.traces import Trace


def run_traces(seeds: range) -> Counter:
    """What happened in them, so that a test can see that nothing was missed."""
    student = make_student()
    seen = Counter()
    for seed in seeds:
        trace = Trace(seed, student)
        try:
            trace.run(num_moves=40)
            trace.check_tokens()
        except BaseException as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
        seen["preemptions"] += trace.engine.stats.preemptions
        seen["weights"] += trace.engine.policy_version
        seen["attempts"] += len(trace.finished)
        seen["third attempts"] += sum(attempt.attempt_idx >= 2 for attempt in trace.finished)
        seen["under two weights"] += sum(
            len(dict(starts)) > 1 for starts in trace.versions.values()
        )
        seen["into a shared page"] += trace.num_shared
        seen["interrupts"] += trace.num_interrupts
        seen["refused keys"] += trace.num_refused_keys
    return seen


def test_traces() -> None:
    """Sixty of them, and that they met what they are for."""
    seen = run_traces(range(60))
    assert len(seen) == 8 and min(seen.values()) > 10, seen


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_thousand_traces(block: int) -> None:
    run_traces(range(1000 + 100 * block, 1100 + 100 * block))
