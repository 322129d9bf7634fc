"""What a setting may choose from: one entry in one table makes a choice, its check and its line of
--help.

An entry says what it is in plain data, so that this module imports nothing and the command line can
list every choice before torch is loaded. The ops and the Triton kernel read the same entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Baseline = Literal["none", "mean", "others"]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How an advantage estimator turns the rewards of a batch into advantages.

    Args:
        baseline: what is subtracted: "none", the "mean" of the group, or the mean of the "others"
                  in it. A group of one attempt has baseline 0.
        divides_by_std: by the group's unbiased standard deviation + eps. A group of one attempt has
                  std 1.
        whitens:  the result is brought to mean 0 and variance 1 over the loss tokens of the batch.

    The implementations know the std of a group around its own mean, and either scale, not both.
    """

    baseline: Baseline
    divides_by_std: bool = False
    whitens: bool = False

    def __post_init__(self) -> None:
        assert not self.divides_by_std or (self.baseline == "mean" and not self.whitens), self


ESTIMATORS: dict[str, Estimator] = {
    "reinforce_plus_plus_baseline": Estimator(baseline="mean", whitens=True),
    "reinforce_plus_plus": Estimator(baseline="none", whitens=True),
    "grpo": Estimator(baseline="mean", divides_by_std=True),
    "dr_grpo": Estimator(baseline="mean"),
    "rloo": Estimator(baseline="others"),
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the reward of a later attempt is multiplied by.

    Args:
        meaning:      for --help.
        factor_of:    attempt index, factor -> f_n; None: f_n comes from the rewards of the batch,
                      by the recurrence of ops/decay_advantage.py.
        takes_factor: whether it has a number of its own, `factor`.
    """

    meaning: str
    factor_of: Callable[[int, float], float] | None
    takes_factor: bool = False


SCHEDULES: dict[str, Schedule] = {
    "batch_mean": Schedule(
        meaning="times the mean decayed reward of earlier attempts", factor_of=None
    ),
    "constant": Schedule(
        meaning="times factor ** attempt", factor_of=lambda n, f: f**n, takes_factor=True
    ),
    "none": Schedule(meaning="as it is (the ablation)", factor_of=lambda n, f: 1.0),
}

# How the learning rate falls from the end of the warm-up (point 0) to the end of the run (1): the
# part of the way down, from train.lr to train.min_lr_ratio of it, that is behind. None: it does
# not, and the length of the run is not read.
LR_SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "constant": None,
    "linear": lambda point: point,
    "cosine": lambda point: (1 - math.cos(math.pi * point)) / 2,
}

# name -> "module:function" of (text, question), or a class whose instances are called so
GRADERS: dict[str, str] = {
    "sciknoweval": "socpo_fast.socratic.graders:grade_sciknoweval",
    "mcq": "socpo_fast.socratic.graders:grade_mcq",
    "exact": "socpo_fast.socratic.graders:grade_exact",
    "math": "socpo_fast.socratic.graders:MathGrader",
}
