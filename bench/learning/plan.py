"""The plan of the study: what is run, decided before the runs that are compared.

Read STUDENTS and ARMS, then rate_runs and compared_runs. Asked: does a tutor teach the student to
answer *alone*, faster than no teacher and than a second try without one; what is decay for; how
sparse must right answers be for any of it to matter.

    rates       each arm with three learning rates and one seed, which is used nowhere else
    main        each arm with its best rate and five seeds, on the shipped student
    densities   four arms, with their rates, on students that are right more often

An arm's best rate is that with the highest `unassisted`, mean of the last two evaluations of its
run in `rates`. What is measured: unassisted accuracy, first attempt alone, at temperature 1, on 200
held-out formulas, two samples each, before training and after every fourth batch; in every batch
the share of rollouts right at once and right in the end; sampled tokens of training, those of
evaluations left out; processor seconds of rollouts and updates on one thread.

Arms are compared by differences between runs with one seed, which see the same questions in the
same order, with 95 % intervals of Student's t over the seeds: at equal batches (COMPARED_AT,
PRIMARY before all), at the sampled tokens and at the seconds that the tutor's runs had taken by
those batches on average, and at the end, mean of the last two evaluations.

This is the second plan. The first had the same arms, seeds, rates and measures, and shipped a
student that is right alone in .4 %. Its `rates` were run, and 10 more runs (first_plan.jsonl):
there, and at .14 %, the best rate without a teacher was so much better than the one we had known
that a single lucky answer was enough to set K = 1 going, and there was little to see. So the
shipped student became one that is right in .03 %, and .6 % one of the other densities; no run of
the first plan but `rates` is compared. Learning rates stay those of the first student, on which
every arm learns: where an arm never moves, rates cannot be told apart.

Two stages were added when all of this had been run, for the two questions that it left open; the
planned comparisons stay those of the five seeds above:

    again       the main arms once more, on the shipped student, with five seeds never used before
    slower      the main arms but the tutor, at the tutor's learning rate and the first five seeds:
                at their own, the highest, those that had learnt did not keep it
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
    """A student by how often it is right, alone, on what it holds wrong.

    shares: None for the shipped student, and for one that is no more to be had; others are the
            shipped one, calibrated anew to these by `num_updates` updates of warm-up.
    """

    title: str
    shares: Shares | None = None
    num_updates: int = 300
    seed: int = 2


@dataclass(frozen=True)
class Arm:
    """One way to train, as it differs from configs/molar_mass.toml."""

    title: str
    num_batches: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of the plan; `name` is unique in it."""

    stage: Stage
    student: str
    arm: str
    seed: int
    lr: float
    num_batches: int

    @property
    def name(self) -> str:
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

# Arms without a teacher sample less a batch and take less time: they go on for longer, so that they
# can be compared at equal tokens and at equal seconds.
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
    """Lists the runs that decide learning rates."""
    return [Run("rates", "first", arm, RATE_SEED, lr, RATE_BATCHES) for arm in ARMS for lr in RATES]


def compared_runs(rates: Mapping[str, float]) -> Iterator[Run]:
    """Lists the runs that are compared, the main arms first, with each arm's learning rate."""
    others = [arm for arm in ARMS if arm not in MAIN_ARMS]
    at_the_tutors = dict.fromkeys(ARMS, rates["tutor"])
    yield from _runs("main", "shipped", MAIN_ARMS, SEEDS, rates)
    yield from _runs("main", "shipped", others, SEEDS, rates)
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
    for seed in seeds:
        for arm in arms:
            yield Run(stage, student, arm, seed, rates[arm], ARMS[arm].num_batches)
