"""What decay_rewards and compute_advantages refuse, and in which words."""

import os

import pytest
import torch

from socpo_fast.ops import CreditOptions, compute_advantages, decay_rewards


@pytest.fixture(params=["ref", "cpp", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton" and os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("tensors are on the CPU here")
    return request.param


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"credit": "trajectory"}, "rollout_idx_A must be given with credit trajectory, got None"),
        (
            {"credit": "trajectory", "rollout_idx_A": torch.tensor([0])},
            r"rollout_idx_A must be int64 \[A=2\]",
        ),
        (
            {"rewards_A": torch.tensor([0.0, torch.nan])},
            "rewards_A must be finite in fp32, got nan at 1",
        ),
        (
            {"num_tokens_A": torch.tensor([3, -1])},
            "num_tokens_A must be finite and >= 0, got -1 at 1",
        ),
        (
            {"question_idx_A": torch.tensor([0])},
            r"question_idx_A must be int64 \[A=2\], got int64 \[1\]",
        ),
        (
            {"attempt_idx_A": torch.tensor([0.0, 1.0])},
            r"attempt_idx_A must be int64 \[A=2\], got float32 \[2\]",
        ),
    ],
)
def test_bad_advantage_inputs(change: dict[str, object], message: str, impl: str) -> None:
    indices = torch.tensor([0, 1])
    good = {
        "rewards_A": torch.ones(2),
        "num_tokens_A": indices,
        "question_idx_A": indices,
        "attempt_idx_A": indices,
    }
    with pytest.raises(ValueError, match=f"^compute_advantages: {message}"):
        compute_advantages(**(good | change), impl=impl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "gae"},
            r"estimator must be one of reinforce_plus_plus_baseline, .*, got 'gae'",
        ),
        (
            {"baseline_group": "batch"},
            "baseline_group must be one of question, question_attempt, got 'batch'",
        ),
        ({"credit": "rollout"}, "credit must be one of attempt, trajectory, got 'rollout'"),
        ({"eps": 0.0}, "eps must be finite and > 0, got 0.0"),
        (
            {"schedule": "linear"},
            "schedule must be one of batch_mean, constant, none, got 'linear'",
        ),
        ({"schedule": "constant"}, r"factor must be in \[0, 1\] with schedule constant, got None"),
        (
            {"schedule": "constant", "factor": 1.5},
            r"factor must be in \[0, 1\] with schedule constant, got 1.5",
        ),
        ({"factor": 0.5}, "factor must be None with schedule batch_mean, got 0.5"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CreditOptions: {message}"):
        CreditOptions(**options)


def test_huge_attempt_index_is_refused(impl: str) -> None:
    """An index that is no attempt number would allocate a table of its size."""
    with pytest.raises(
        ValueError, match="^decay_rewards: attempt_idx_A must be below 256, got 1099511627776"
    ):
        decay_rewards(torch.ones(2), torch.tensor([0, 2**40]), impl=impl)


def test_no_first_attempts_is_refused(impl: str) -> None:
    """Without first attempts there is no mean that could decay the later ones."""
    with pytest.raises(
        ValueError, match="^decay_rewards: attempt_idx_A must be 0 for at least one attempt, got 1"
    ):
        decay_rewards(torch.ones(2), torch.tensor([1, 2]), impl=impl)
