"""What a batch of rollouts amounts to, as named metrics."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from socpo_fast.types import EngineStats, Question, Rollout

MAX_SOURCES = 32  # more of them are not told apart: a data set may name each row's source differently


def sources_of(questions: Iterable[Question]) -> list[str]:
    """The data sources to be told apart, in order of their names; none when there is one only, or too many."""
    sources = sorted({question.data_source for question in questions})
    return sources if 1 < len(sources) <= MAX_SOURCES else []


def source_metric(name: str, data_source: str) -> str:
    """name/data_source, the source made safe for TensorBoard, files and pages; different ones stay different."""
    safe = re.sub(r"[^\w./-]", "_", data_source, flags=re.ASCII)[:64] or "_"
    if safe != data_source or re.search(r"-[0-9a-f]{6}$", safe):  # what looks like a made name is made as well
        safe += "-" + hashlib.sha256(data_source.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name}/{safe}"


def success_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Shares of rollouts; the headline is the unassisted one.

    success/unassisted counts the first attempt only; success/assisted whether any attempt was right.
    """
    return {
        "success/unassisted": mean([float(rollout.turns[0].is_correct) for rollout in rollouts]),
        "success/assisted": mean([float(is_solved(rollout)) for rollout in rollouts]),
    }


def summarize(
    rollouts: Sequence[Rollout],
    decay_factors: Sequence[float],
    sources: Sequence[str] = (),
) -> dict[str, float]:
    """Metrics of one batch. Rates are per rollout; rescue_rate per guided one, leak_rate per guidance, shown or not.

    sources: the whole data set's, from sources_of; success is also given for each that the batch has.
    """
    guided = [rollout for rollout in rollouts if len(rollout.turns) > 1]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    guidances = [turn.guidance for turn in turns if turn.guidance is not None]
    attempts = [turn.attempt for turn in turns]
    reasons = [rollout.end_reason for rollout in rollouts]
    by_source = {source: [r for r in rollouts if r.data_source == source] for source in sources}
    return {
        **success_rates(rollouts),
        **{
            source_metric(name, source): rate
            for source, chosen in by_source.items()
            if chosen
            for name, rate in success_rates(chosen).items()
        },
        "reward/mean": mean([turn.reward for turn in turns if turn.reward is not None]),
        **{f"decay/f_{n}": factor for n, factor in enumerate(decay_factors, start=1)},
        "guidance/rate": mean([float(len(rollout.turns) > 1) for rollout in rollouts]),
        "guidance/rescue_rate": mean([float(is_solved(rollout)) for rollout in guided]),
        "guidance/leak_rate": mean([float(guidance.leaks) for guidance in guidances]),
        **failures(Counter(rollout.failure for rollout in rollouts)),
        "guidance/leaked": float(reasons.count("leaked")),
        "guidance/overflow": float(reasons.count("overflow")),
        "rollout/attempt_tokens": mean([float(attempt.num_tokens) for attempt in attempts]),
        "rollout/truncated": mean([float(attempt.finish_reason == "length") for attempt in attempts]),
    }


def rollout_perf(
    rollouts: Sequence[Rollout], before: EngineStats, after: EngineStats, seconds: float
) -> dict[str, float]:
    """What the rollouts of a batch took; before and after are the engine's counts."""
    waits = [rollout.teacher_wait_s for rollout in rollouts if len(rollout.turns) > 1]
    return {
        "perf/rollout_tok_s": sum(rollout.num_sampled for rollout in rollouts) / seconds,
        "perf/prefill_tokens": float(after.prefill_tokens - before.prefill_tokens),
        "perf/decode_tokens": float(after.decode_tokens - before.decode_tokens),
        "perf/preemptions": float(after.preemptions - before.preemptions),
        "time/rollout_s": seconds,
        "time/teacher_wait_s": mean(waits),
    }


def failures(by_kind: Mapping[str, int]) -> dict[str, float]:
    """guidance/failed, and by kind; "" stands for none."""
    counts = {f"guidance/failed_{kind}": float(n) for kind, n in sorted(by_kind.items()) if kind}
    return {"guidance/failed": math.fsum(counts.values()), **counts}


def is_solved(rollout: Rollout) -> bool:
    """Whether any of its attempts was right."""
    return any(turn.is_correct for turn in rollout.turns)


def mean(values: Sequence[float]) -> float:
    """nan for none: a rate over nothing is not 0."""
    return sum(values) / len(values) if values else float("nan")
