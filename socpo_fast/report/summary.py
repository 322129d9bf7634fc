"""Computes the metrics of rollouts: summarize for a batch, Scores for an evaluation.

Departure from the usual practice: error bars are computed over questions, not over samples (see
interval). Samples of one question are not independent draws of "a question the student may meet",
so a hundred questions with sixteen samples each are a hundred data points, not sixteen hundred.
"""

import hashlib
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from socpo_fast.types import EngineStats, Question, Rollout

# The k of pass@k. They are fixed, so that runs with different eval.samples can be compared. Few are
# enough, since pass@k is smooth in log k.
PASS_AT = (4, 16, 64, 256)
Z95 = 1.959964  # two-sided normal quantile
# With more data sources than this, metrics by source are left out: some data sets give each row a
# source of its own.
MAX_SOURCES = 32


def sources_of(questions: Iterable[Question]) -> list[str]:
    """Returns the data sources to report separately, sorted; [] for a single one or too many."""
    sources = sorted({question.data_source for question in questions})
    return sources if 1 < len(sources) <= MAX_SOURCES else []


def source_metric(name: str, data_source: str) -> str:
    """Returns "name/data_source" with a source that is safe in TensorBoard, files and pages."""
    safe = re.sub(r"[^\w./-]", "_", data_source, flags=re.ASCII)[:64] or "_"
    # A hash keeps different sources different after the replacement. A source that ends like such a
    # hash gets one, too, or it could collide with the replaced name of another source.
    if safe != data_source or re.search(r"-[0-9a-f]{6}$", safe):
        safe += "-" + hashlib.sha256(data_source.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{name}/{safe}"


def success_rates(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns the shares of rollouts that succeeded, unassisted and assisted.

    success/unassisted, the headline, counts the first attempt only. success/assisted counts a
    rollout if any of its attempts was right.
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
    """Returns the metrics of one batch.

    Rates are per rollout, with two exceptions: rescue_rate is per guided rollout, and leak_rate is
    per message of guidance, shown or not.

    Args:
        sources: those of the whole data set, from sources_of. Success is also reported for each of
                 them that occurs in the batch.
    """
    guided = [rollout for rollout in rollouts if len(rollout.turns) > 1]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    guidances = [turn.guidance for turn in turns if turn.guidance is not None]
    attempts = [turn.attempt for turn in turns]
    lengths = [float(attempt.num_tokens) for attempt in attempts]
    rewards = [turn.reward for turn in turns if turn.reward is not None]
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
        "reward/mean": mean(rewards),
        "reward/std": statistics.pstdev(rewards) if rewards else math.nan,
        "reward/groups_without_signal": groups_without_signal(rollouts),
        **{f"decay/f_{n}": factor for n, factor in enumerate(decay_factors, start=1)},
        "guidance/rate": mean([float(len(rollout.turns) > 1) for rollout in rollouts]),
        "guidance/rescue_rate": mean([float(is_solved(rollout)) for rollout in guided]),
        "guidance/leak_rate": mean([float(guidance.leaks) for guidance in guidances]),
        **failures(Counter(rollout.failure for rollout in rollouts)),
        "guidance/leaked": float(reasons.count("leaked")),
        "guidance/overflow": float(reasons.count("overflow")),
        "rollout/attempt_tokens": mean(lengths),
        "rollout/attempt_tokens_min": min(lengths, default=math.nan),
        "rollout/attempt_tokens_max": max(lengths, default=math.nan),
        "rollout/truncated": mean(
            [float(attempt.finish_reason == "length") for attempt in attempts]
        ),
    }


def groups_without_signal(rollouts: Sequence[Rollout]) -> float:
    """Returns the share of groups whose attempts all have the same reward, after decay.

    Against the mean of its group such an attempt has no advantage. nan if no reward is set.
    """
    rewards = defaultdict[int, set[float]](set)
    for rollout in rollouts:
        rewards[rollout.question_idx] |= {
            turn.reward for turn in rollout.turns if turn.reward is not None
        }
    return mean([float(len(group) == 1) for group in rewards.values() if group])


def rollout_perf(
    rollouts: Sequence[Rollout], before: EngineStats, after: EngineStats, seconds: float
) -> dict[str, float]:
    """Returns speed and cost of a batch's rollouts.

    Args:
        before, after: the engine's counts when the rollouts began and when they had ended.
    """
    waits = [rollout.teacher_wait_s for rollout in rollouts if len(rollout.turns) > 1]
    return {
        "perf/rollout_tok_s": sum(rollout.num_sampled for rollout in rollouts) / seconds,
        "perf/prefill_tokens": float(after.prefill_tokens - before.prefill_tokens),
        "perf/decode_tokens": float(after.decode_tokens - before.decode_tokens),
        "perf/preemptions": float(after.preemptions - before.preemptions),
        "time/rollout_s": seconds,
        "time/teacher_wait_s": mean(waits),
    }


class Scores:
    """The counts of an evaluation, by question.

    Rollouts are added one by one, in any order, and are not kept: an evaluation of many samples
    takes no memory.

    Args:
        questions: all that are evaluated, each `samples` times.
        assisted:  the teacher may help, so success/assisted is measured as well.
    """

    def __init__(self, questions: Sequence[Question], *, samples: int, assisted: bool):
        self.samples = samples
        self.assisted = assisted
        self.sources = sources_of(questions)
        self.source_of = {question.question_idx: question.data_source for question in questions}
        self.num_correct_unassisted = dict.fromkeys(self.source_of, 0)
        self.num_correct_assisted = dict.fromkeys(self.source_of, 0)
        self.failures: Counter[str] = Counter()  # rollouts by kind of failed guidance; "": none
        self.num_guidances = self.num_tokens = self.num_truncated = 0

    def add(self, rollout: Rollout) -> None:
        """Counts a finished rollout."""
        first = rollout.turns[0]
        self.num_correct_unassisted[rollout.question_idx] += first.is_correct
        self.num_correct_assisted[rollout.question_idx] += is_solved(rollout)
        self.failures[rollout.failure] += 1
        self.num_guidances += sum(turn.guidance is not None for turn in rollout.turns)
        self.num_tokens += first.attempt.num_tokens
        self.num_truncated += first.attempt.finish_reason == "length"

    def metrics(self) -> dict[str, float]:
        """Returns success/unassisted (avg@k), success/assisted and pass@k, with their intervals.

        The first two are also given by source. success/assisted is left out if all guidance failed:
        it would be the unassisted share under another name.
        """
        failed = failures(self.failures)
        is_known = self.assisted and bool(self.num_guidances or not failed["guidance/failed"])
        n = self.samples
        total = self.samples * len(self.num_correct_unassisted)
        metrics: dict[str, float] = {}
        kinds = {"success/unassisted": self.num_correct_unassisted} | (
            {"success/assisted": self.num_correct_assisted} if is_known else {}
        )
        for name, correct in kinds.items():
            metrics |= with_interval(name, [c / n for c in correct.values()])
            for source in self.sources:
                shares = [c / n for idx, c in correct.items() if self.source_of[idx] == source]
                metrics |= {
                    source_metric(key, source): value
                    for key, value in with_interval(name, shares).items()
                }
        for k in PASS_AT:
            if k <= n:
                metrics |= with_interval(
                    f"success/pass_at_{k}",
                    [pass_at_k(n, c, k) for c in self.num_correct_unassisted.values()],
                )
        return (
            metrics
            | (failed if self.assisted else {})
            | {
                "rollout/attempt_tokens": self.num_tokens / total,
                "rollout/truncated": self.num_truncated / total,
            }
        )


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Returns the mean of the questions' values under `name`, with its 95 % interval."""
    low, high = interval(values)
    return {name: mean(values), f"{name}_low": low, f"{name}_high": high}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean over questions, from one value in [0, 1] of each.

        n' = n + z^2
        m  = (sum x + z^2 / 2) / n'
        v  = (sum x^2 + z^2 / 2) / n' - m^2
        interval = m -+ z sqrt(v / n')

    This is the normal interval after adding z^2 / 2 questions that are always right and as many
    that are always wrong. With one sample a question (x is 0 or 1) it is Agresti and Coull's
    interval, which is close to Wilson's.

    The usual mean -+ z s / sqrt(n) has no width if all questions score the same, most often 0 or 1.
    Near there, or with few questions, it covers far less than 95 %. Wilson's formula with an
    effective sample size breaks down in the same cases, since it needs s. Here the spread between
    questions is used as measured, and the added questions matter less as n grows.
    tests/test_evaluation.py measures the coverage.

    Source: Agresti and Coull 1998, The American Statistician 52(2); by question: Miller 2024,
    arXiv:2411.00640.
    """
    n = len(values) + Z95**2
    center = (math.fsum(values) + Z95**2 / 2) / n
    variance = (math.fsum(x * x for x in values) + Z95**2 / 2) / n - center**2
    half_width = Z95 * math.sqrt(variance / n)
    return max(center - half_width, 0.0), min(center + half_width, 1.0)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimates without bias the chance that one of k samples is right, from num_samples >= k.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def failures(by_kind: Mapping[str, int]) -> dict[str, float]:
    """Returns guidance/failed in total and by kind; the kind "" stands for no failure."""
    counts = {f"guidance/failed_{kind}": float(n) for kind, n in sorted(by_kind.items()) if kind}
    return {"guidance/failed": math.fsum(counts.values()), **counts}


def is_solved(rollout: Rollout) -> bool:
    """Whether any attempt of the rollout was right."""
    return any(turn.is_correct for turn in rollout.turns)


def mean(values: Sequence[float]) -> float:
    """Returns the mean; nan for no values, since a rate over nothing is not 0."""
    return sum(values) / len(values) if values else float("nan")
