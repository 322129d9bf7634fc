"""Computes one advantage per attempt: a shorter way to call credit_attempts of decay_advantage.py.

Takes the fields of CreditOptions as keyword arguments and returns the advantages only.
"""

from torch import Tensor

from socpo_fast.ops.credit_options import BaselineGroup, CreditOptions, CreditTo
from socpo_fast.ops.decay_advantage import credit_attempts


def compute_advantages(
    rewards_A: Tensor,
    num_tokens_A: Tensor,
    question_idx_A: Tensor,
    attempt_idx_A: Tensor,
    rollout_idx_A: Tensor | None = None,
    *,
    schedule: str | None = None,
    factor: float | None = None,
    credit: CreditTo = "attempt",
    estimator: str = "reinforce_plus_plus_baseline",
    baseline_group: BaselineGroup = "question",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Returns one advantage per attempt, from the rewards of a whole batch.

    Args:
        rewards_A: raw rewards if `schedule` is given, which then runs in the same launch; rewards
                   that are decayed already if it is None.
        All other arguments: as in `credit_attempts` and `CreditOptions`.

    Returns:
        [A] fp32, on the device of rewards_A: Credit.advantages_A of `credit_attempts`.

    Raises:
        ValueError: as `credit_attempts` and `CreditOptions`.
    """
    options = CreditOptions(
        schedule="none" if schedule is None else schedule,
        factor=factor,
        credit=credit,
        estimator=estimator,
        baseline_group=baseline_group,
        eps=eps,
    )
    table = rewards_A, num_tokens_A, question_idx_A, attempt_idx_A, rollout_idx_A
    return credit_attempts(*table, options=options, impl=impl).advantages_A
