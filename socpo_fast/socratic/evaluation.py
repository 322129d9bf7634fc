"""How often the student is right, alone and with help, and how sure that is. Read Scores, interval, pass_at_k.

Departure from the usual practice: error bars are by question. Samples of one question are not independent draws of
"a question the student may meet", so a hundred questions with sixteen samples each are a hundred data points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from socpo_fast.metrics import source_metric
from socpo_fast.socratic.summary import is_solved, mean, sources_of
from socpo_fast.types import Question, Rollout

PASS_AT = (4, 16, 64, 256)  # pass@k is smooth in log k; fixed k, so that runs with different eval.samples compare
Z95 = 1.959964  # two-sided normal quantile


class Scores:
    """An evaluation's counts by question, added rollout by rollout in any order; it holds no rollout.

    Args:
        questions: all that are evaluated, each `samples` times.
        assisted:  the teacher may help; then success/assisted is known as well.
    """

    def __init__(self, questions: Sequence[Question], *, samples: int, assisted: bool):
        self.samples, self.assisted, self.sources = samples, assisted, sources_of(questions)
        self.source_of = {question.question_idx: question.data_source for question in questions}
        self.alone = dict.fromkeys(self.source_of, 0)
        self.helped = dict.fromkeys(self.source_of, 0)
        self.num_tokens = self.num_truncated = 0

    def add(self, rollout: Rollout) -> None:
        first = rollout.turns[0]
        self.alone[rollout.question_idx] += first.is_correct
        self.helped[rollout.question_idx] += is_solved(rollout)
        self.num_tokens += first.attempt.num_tokens
        self.num_truncated += first.attempt.finish_reason == "length"

    def metrics(self) -> dict[str, float]:
        """avg@k, which is success/unassisted, pass@k and success/assisted, each with its interval; avg@k by source."""
        n, total = self.samples, self.samples * len(self.alone)
        found: dict[str, float] = {}
        kinds = {"success/unassisted": self.alone} | ({"success/assisted": self.helped} if self.assisted else {})
        for name, correct in kinds.items():
            found |= with_interval(name, [c / n for c in correct.values()])
            for source in self.sources:
                shares = [c / n for idx, c in correct.items() if self.source_of[idx] == source]
                found |= {source_metric(key, source): value for key, value in with_interval(name, shares).items()}
        for k in PASS_AT:
            if k <= n:
                found |= with_interval(f"success/pass_at_{k}", [pass_at_k(n, c, k) for c in self.alone.values()])
        return found | {
            "rollout/attempt_tokens": self.num_tokens / total,
            "rollout/truncated": self.num_truncated / total,
        }


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = interval(values)
    return {name: mean(values), f"{name}_low": low, f"{name}_high": high}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of a question's value, from one value in [0, 1] of each question.

        n' = n + z^2    m = (sum x + z^2 / 2) / n'    v = (sum x^2 + z^2 / 2) / n' - m^2    m -+ z sqrt(v / n')

    That is the normal interval after z^2 / 2 questions always right and as many always wrong have been added. For one
    sample a question (x is 0 or 1) it is Agresti and Coull's, close to Wilson's. The usual mean -+ z s / sqrt(n) has
    no width where all questions score the same (0 or 1 above all) and covers far less than 95 % near there or with few
    questions; an effective sample size in Wilson's formula breaks down in the same place, where s is not known. Here
    the spread between questions counts as it is measured, and what is added fades with n.
    tests/socratic/test_evaluation.py measures the coverage.

    Source: Agresti and Coull 1998, The American Statistician 52(2); by question: Miller 2024, arXiv:2411.00640.
    """
    n = len(values) + Z95**2
    center = (math.fsum(values) + Z95**2 / 2) / n
    variance = (math.fsum(x * x for x in values) + Z95**2 / 2) / n - center**2
    half = Z95 * math.sqrt(variance / n)
    return max(center - half, 0.0), min(center + half, 1.0)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is correct, from num_samples >= k of them.

        1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
