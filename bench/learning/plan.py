"""Defines the study's plan: which runs are made, decided before the runs that are compared.

Read STUDENTS and ARMS, then rate_runs and compared_runs. The study asks three questions. Does a
tutor teach the student to answer unassisted, faster than training without a teacher, and faster
than a second attempt without one? What is decay good for? How rare must right answers be for any of
this to matter? An arm is one way to train.

    rates       each arm with three learning rates and one seed, which is used nowhere else
    main        each arm with its best rate and five seeds, on the shipped student
    densities   four arms, with their rates, on students that are right more often

An arm's best rate is the one with the highest `unassisted` in `rates`, mean of a run's last two
evaluations.

What is measured:
- unassisted accuracy of the first attempt at temperature 1, on 200 held-out formulas with two
  samples each, before training and after every fourth batch;
- in every batch the share of rollouts that are right at once, and that are right in the end;
- the tokens sampled in training, without those of evaluations;
- processor seconds of rollouts and updates on one thread.

Arms are compared by the differences between runs with the same seed, which see the same questions
in the same order. Intervals are 95 %, by Student's t over the seeds. Comparisons are made at equal
batches (COMPARED_AT, above all PRIMARY), at equal sampled tokens and at equal seconds (those that
the tutor's runs had taken on average by these batches), and at the end (mean of the last two
evaluations).

This is the second plan. The first one had the same arms, seeds, rates and measures, but its shipped
student was right unassisted in .4 % of its answers. Its `rates` were run, and 10 more runs
(first_plan.jsonl). With .4 %, and also with .14 %, there was little to see: the best rate without a
teacher was much better than the rate known before, so that a single lucky answer was enough to set
K = 1 going. Therefore the shipped student became one that is right in .03 %, and one of the other
densities became .6 %. No run of the first plan is compared, but its `rates` are used: learning
rates were chosen on the first student, on which every arm learns. Where an arm never moves, rates
cannot be told apart.

Two stages were added after all of this had been run, for two questions that it left open. The
planned comparisons are still those of the five seeds above.

    again       the main arms once more, on the shipped student, with five seeds never used before
    slower      the main arms but the tutor, at the tutor's learning rate and with the first five
                seeds. At their own rates, the highest, runs that had learned lost it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tools.builtin_student.dialogues import Shares

Stage = Literal["rates", "main", "densities", "again", "slower"]

EVAL_EVERY_BATCHES = 4
RATES = (1e-4, 2e-4, 4e-4)
RATE_SEED = 100
RATE_BATCHES = 24
SEEDS = (0, 1, 2, 3, 4)
SEEDS_AGAIN = (5, 6, 7, 8, 9)
COMPARED_AT = (12, 20, 28)  # batches
PRIMARY = 20


@dataclass(frozen=True)
class StudentVariant:
    """A student, by how often it is right unassisted about the masses that it usually has wrong.

    shares: None for the shipped student, and for the first plan's, which no longer exists. All
            others are the shipped one, calibrated to these shares by `num_updates` updates.
    """

    title: str
    shares: Shares | None = None
    num_updates: int = 300
    seed: int = 2


@dataclass(frozen=True)
class Arm:
    """One way to train; `settings` are its differences from configs/molar_mass.toml."""

    title: str
    num_batches: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of the plan; its `name` is unique."""

    stage: Stage
    student: str
    arm: str
    seed: int
    lr: float
    num_batches: int

    @property
    def name(self) -> str:
        """Returns the run's name, by which its record is found."""
        return f"{self.stage}_{self.student}_{self.arm}_{self.lr:g}_seed{self.seed}"


STUDENTS = {
    "first": StudentVariant("right in .4 % (of the first plan)"),
    "shipped": StudentVariant("right in .03 % (shipped)"),
    "few": StudentVariant("right in .6 %", Shares(right=0.006, heed=0.45)),
    "many": StudentVariant("right in 11 %", Shares(right=0.08, heed=0.45)),
}

NO_TEACHER = {"rollout.max_attempts": 1}
TRAJECTORY = {"reward.credit": "trajectory"}
UNDECAYED = {"reward.schedule": "none"}

# Arms without a teacher sample fewer tokens a batch and take less time. They run for more batches,
# so that they can be compared at equal tokens and at equal seconds.
ARMS = {
    "tutor": Arm("tutor", 40),
    "alone": Arm("no teacher (K = 1)", 80, NO_TEACHER),
    "sentence": Arm("fixed sentence", 40, {"teacher.kind": "retry"}),
    "grpo": Arm("no teacher, GRPO", 80, NO_TEACHER | {"advantage.estimator": "grpo"}),
    "undecayed": Arm("tutor, no decay", 40, UNDECAYED),
    "constant": Arm("tutor, decay .5", 28, {"reward.schedule": "constant", "reward.factor": 0.5}),
    "trajectory": Arm("tutor, credit by trajectory", 40, TRAJECTORY),
    "trajectory_undecayed": Arm(
        "tutor, credit by trajectory, no decay", 40, TRAJECTORY | UNDECAYED
    ),
    "answer": Arm(
        "tutor that gives the answer away",
        28,
        {"teacher.rule": "bench.learning.teachers:give_answer", "teacher.reveal_answer": True},
    ),
    "three": Arm("tutor, K = 3", 28, {"rollout.max_attempts": 3}),
}
MAIN_ARMS = ("tutor", "alone", "sentence", "grpo")


def rate_runs() -> list[Run]:
    """Returns the runs that decide learning rates."""
    return [Run("rates", "first", arm, RATE_SEED, lr, RATE_BATCHES) for arm in ARMS for lr in RATES]


def compared_runs(rates: Mapping[str, float]) -> Iterator[Run]:
    """Yields the runs that are compared, the main arms first, with each arm's learning rate."""
    other_arms = [arm for arm in ARMS if arm not in MAIN_ARMS]
    at_the_tutors = dict.fromkeys(ARMS, rates["tutor"])
    yield from _runs("main", "shipped", MAIN_ARMS, SEEDS, rates)
    yield from _runs("main", "shipped", other_arms, SEEDS, rates)
    yield from _runs("densities", "few", MAIN_ARMS, SEEDS, rates)
    yield from _runs("densities", "many", MAIN_ARMS, SEEDS, rates)
    yield from _runs("again", "shipped", MAIN_ARMS, SEEDS_AGAIN, rates)
    yield from _runs("slower", "shipped", MAIN_ARMS[1:], SEEDS, at_the_tutors)


def _runs(
    stage: Stage,
    student: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    rates: Mapping[str, float],
) -> Iterator[Run]:
    # Seeds outside, so that a study that is stopped early has complete pairs of arms.
    for seed in seeds:
        for arm in arms:
            yield Run(stage, student, arm, seed, rates[arm], ARMS[arm].num_batches)
