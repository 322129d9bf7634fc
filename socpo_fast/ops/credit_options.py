"""Holds CreditOptions: how the rewards of a batch become advantages, with the formulas.

ops/decay_advantage.py computes them; registries.py lists the schedules and estimators.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.registries import ESTIMATORS, SCHEDULES

CreditTo = Literal["attempt", "trajectory"]
BaselineGroup = Literal["question", "question_attempt"]


@dataclass(frozen=True, kw_only=True)
class CreditOptions:
    """The options of credit: how the rewards of a batch become advantages.

    First a schedule decays the reward R_i of attempt i, which has index n in its rollout:

        decayed_i = f_n R_i
        batch_mean   f_0 = 1,  f_n = mean of f_a R_i over all attempts i with index a < n
        constant     f_n = factor ** n
        none         f_n = 1

    Then an estimator makes advantages of the decayed rewards r, within groups:

        reinforce_plus_plus_baseline   whiten(r - group mean)
        reinforce_plus_plus            whiten(r)
        grpo                           (r - group mean) / (unbiased group std + eps)
        dr_grpo                        r - group mean
        rloo                           r - mean of the other attempts of the group

        whiten(x) = (x - mean) / sqrt(var + 1e-8), mean and unbiased variance over the loss tokens

    A group of one attempt has baseline 0 and std 1 in every estimator.

    Args:
        schedule:       "batch_mean" (the paper's), "constant" or "none" (the ablation).
        factor:         in [0, 1], for "constant" only.
        credit:         "attempt": an attempt earns its own decayed reward, so a wrong first attempt
                        keeps 0 even if a later one succeeds. "trajectory": all attempts of a
                        rollout earn the reward of its last one.
        estimator:      one of the five above.
        baseline_group: "question", or "question_attempt" to group by attempt index as well (warns).
        eps:            finite and > 0, added to the std in grpo.

    Raises:
        ValueError: a value breaks its rule.

    Source: Liu et al. 2026, arXiv:2606.09887, and figure 2 of its repository (decay);
    Hu et al. 2025, arXiv:2501.03262 (REINFORCE++); Shao et al. 2024, arXiv:2402.03300 (GRPO);
    Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO); Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """

    schedule: str = "batch_mean"
    factor: float | None = None
    credit: CreditTo = "attempt"
    estimator: str = "reinforce_plus_plus_baseline"
    baseline_group: BaselineGroup = "question"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        where = "CreditOptions"
        factor = self.factor
        check_word(where, "schedule", self.schedule, tuple(SCHEDULES))
        check_word(where, "credit", self.credit, get_args(CreditTo))
        check_word(where, "estimator", self.estimator, tuple(ESTIMATORS))
        check_word(where, "baseline_group", self.baseline_group, get_args(BaselineGroup))
        check_rule(where, "eps", self.eps, 0 < self.eps < float("inf"), "finite and > 0")
        if SCHEDULES[self.schedule].takes_factor:
            check_rule(
                where,
                "factor",
                factor,
                factor is not None and 0 <= factor <= 1,
                f"in [0, 1] with schedule {self.schedule}",
            )
        else:
            check_rule(
                where, "factor", factor, factor is None, f"None with schedule {self.schedule}"
            )
        if self.baseline_group == "question_attempt":
            warnings.warn(
                "compute_advantages: baseline_group question_attempt compares guided attempts "
                "with guided attempts only, which cancels reward decay; use question",
                stacklevel=3,  # the caller of the __init__ that dataclass generates
            )

    def factors(self, num_factors: int) -> list[float] | None:
        """Returns f_0, f_1, ..; or None if they are means of the batch's rewards."""
        factor_of = SCHEDULES[self.schedule].factor_of
        if factor_of is None:
            return None
        return [
            factor_of(n, 1.0 if self.factor is None else self.factor) for n in range(num_factors)
        ]
