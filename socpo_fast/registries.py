"""Lists the choices of the settings: advantage estimators, reward and lr schedules, graders.

One entry in a table makes a new choice, its check, and its line in --help. Entries are plain data,
so that this module imports nothing of ours, and the command line can list every choice before torch
is loaded. The ops and the Triton kernel read the same entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Baseline = Literal["none", "mean", "others"]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """The way in which an advantage estimator turns the rewards of a batch into advantages.

    Args:
        baseline:       what is subtracted from the reward: "none" = nothing, "mean" = the group's
                        mean, "others" = the mean of the other attempts of the group. A group of one
                        attempt has baseline 0.
        divides_by_std: whether the difference is divided by the group's unbiased standard deviation
                        + eps. A group of one attempt has std 1.
        whitens:        whether advantages are shifted and scaled to mean 0 and variance 1 over the
                        loss tokens of the batch.
    """

    baseline: Baseline
    divides_by_std: bool = False
    whitens: bool = False

    def __post_init__(self) -> None:
        # The implementations compute a group's std around its own mean only, and apply one of the
        # two scales, not both.
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
    """The factor f_n by which the reward of attempt n is multiplied.

    Args:
        meaning:      for --help.
        factor_of:    (attempt index, factor) -> f_n. None: f_n depends on the rewards of the batch,
                      by the recurrence in ops/decay_advantage.py.
        takes_factor: whether the schedule has a setting `factor`.
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

# How the learning rate falls. A function takes the progress from the end of the warm-up (0) to the
# end of the run (1). It returns the fraction of the fall from train.lr to train.lr * min_lr_ratio
# that is done by then. None: the rate does not fall, and the length of the run does not matter.
LR_SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "constant": None,
    "linear": lambda point: point,
    "cosine": lambda point: (1 - math.cos(math.pi * point)) / 2,
}

# name -> "module:name" of a function of (text, question), or of a class with such instances. They
# are text, so that a grader's imports are paid for only by runs that use it.
GRADERS: dict[str, str] = {
    "sciknoweval": "socpo_fast.socratic.graders:grade_sciknoweval",
    "mcq": "socpo_fast.socratic.graders:grade_mcq",
    "exact": "socpo_fast.socratic.graders:grade_exact",
    "math": "socpo_fast.socratic.graders:MathGrader",
}
