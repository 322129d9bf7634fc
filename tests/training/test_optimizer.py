"""Checks the optimizer against AdamW's formula, and that bad gradients change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from socpo_fast.ops.adamw import join_master
from socpo_fast.registries import LR_SCHEDULES
from socpo_fast.training.optimizer import Optimizer
from tests.helpers.made_rollouts import make_student


def set_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = size * torch.randn(param.shape, generator=generator)


def test_steps_match_the_adamw_formula() -> None:
    """Six steps are AdamW's in fp64, with warm-up, clipping and weight decay of matrices only."""
    student = make_student(tie_word_embeddings=False)
    lr = 1e-2
    beta1 = 0.8
    beta2 = 0.95
    decay = 0.1
    warmup = 4
    max_norm = 1.0
    optimizer = Optimizer(
        student,
        lr=lr,
        betas=(beta1, beta2),
        weight_decay=decay,
        warmup_updates=warmup,
        max_grad_norm=max_norm,
    )
    expected = {name: param.detach().double() for name, param in student.named_parameters()}
    m = {name: torch.zeros_like(param) for name, param in expected.items()}
    v = {name: torch.zeros_like(param) for name, param in expected.items()}
    for n in range(1, 7):
        set_gradients(student, seed=n, size=1.0 if n % 2 else 1e-4)  # clipped, not clipped
        grads = {name: param.grad.double() for name, param in student.named_parameters()}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        rate = lr * min(1.0, n / warmup)
        for name, param in expected.items():
            grad = grads[name] * min(1.0, max_norm / norm)
            m[name] = beta1 * m[name] + (1 - beta1) * grad
            v[name] = beta2 * v[name] + (1 - beta2) * grad.square()
            update = (m[name] / (1 - beta1**n)) / ((v[name] / (1 - beta2**n)).sqrt() + 1e-8)
            if param.ndim >= 2:
                param *= 1 - rate * decay
            param -= rate * update
        result = optimizer.step()
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert (result.lr, result.skipped, optimizer.num_updates) == (
            pytest.approx(rate),
            False,
            n,
        )
    for name, param in student.named_parameters():
        torch.testing.assert_close(param.detach().double(), expected[name], atol=1e-5, rtol=1e-4)
        assert param.grad is None


# update -> learning rate, for lr 8, 4 updates of warm-up, 11 updates in all and min_lr_ratio 1/4.
# So the rate falls from 8 by 6 to 2. It takes 8 updates, since update 12 is the first one at 2.
RATES = {
    "constant": {1: 2.0, 4: 8.0, 8: 8.0, 11: 8.0, 12: 8.0, 99: 8.0},
    "linear": {1: 2.0, 4: 8.0, 8: 5.0, 11: 2.75, 12: 2.0, 99: 2.0},
    "cosine": {1: 2.0, 4: 8.0, 8: 5.0, 11: 5 - 3 * math.cos(math.pi / 8), 12: 2.0, 99: 2.0},
}


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_learning_rates_by_hand(schedule: str) -> None:
    """Rates of the first update, the end of the warm-up, the middle, the last, and beyond it."""
    options = {"lr": 8.0, "warmup_updates": 4, "total_updates": 11, "min_lr_ratio": 0.25}
    optimizer = Optimizer(make_student(), lr_schedule=schedule, **options)  # type: ignore[arg-type]
    for n, rate in RATES[schedule].items():
        assert optimizer.lr_of(n) == pytest.approx(rate, rel=1e-14), n
    bare = Optimizer(
        make_student(), lr_schedule=schedule, **options | {"warmup_updates": 0, "total_updates": 1}
    )  # type: ignore[arg-type]
    assert bare.lr_of(1) == 8.0  # without a warm-up the first update has the full rate


def test_constant_rate_is_bitwise_that_of_no_schedule() -> None:
    """The default schedule computes lr * min(1, n / warmup), rounding included."""
    optimizer = Optimizer(make_student(), lr=3e-4, warmup_updates=7)
    assert all(optimizer.lr_of(n) == 3e-4 * min(1.0, n / 7) for n in range(1, 20))


def test_skipped_updates_do_not_advance_the_schedule() -> None:
    student = make_student()
    options = {"lr": 1e-2, "warmup_updates": 2, "lr_schedule": "linear", "total_updates": 5}
    # type: ignore[arg-type]
    optimizer = Optimizer(student, **options)
    rates = []
    for n in range(1, 8):
        set_gradients(student, seed=n)
        result = optimizer.step(loss=math.nan if n in (2, 5) else 0.0)
        assert result.skipped == (n in (2, 5))
        rates += [] if result.skipped else [result.lr]
    assert rates == [optimizer.lr_of(n) for n in range(1, 6)]
    assert rates == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """A skipped update changes no weight, no moment and no step of the warm-up.

    The run goes on bitwise as one that never had the bad gradients, also after save and load.
    """
    student = make_student()
    optimizer = Optimizer(student, lr=1e-2, warmup_updates=2)
    set_gradients(student, seed=0)
    optimizer.step()
    old_weights = [param.detach().clone() for param in student.parameters()]
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for num_bad in (1, 2):
        set_gradients(student, seed=num_bad)
        student.layers[1].mlp.down.weight.grad[3, 2] = bad
        result = optimizer.step()
        assert result.skipped
        assert not math.isfinite(result.grad_norm)
        assert optimizer.state_counts() == {
            "num_updates": 1 + num_bad,
            "num_skipped": num_bad,
            "num_skipped_in_a_row": num_bad,
        }
    set_gradients(student, seed=3)
    assert optimizer.step(loss=bad).skipped
    assert all(
        torch.equal(param, old)
        for param, old in zip(student.parameters(), old_weights, strict=True)
    )
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in optimizer.state_tensors().items()
    )
    set_gradients(student, seed=4)
    result = optimizer.step()
    # The second step of the warm-up: skipped ones do not count.
    assert (result.skipped, result.lr) == (False, 1e-2)
    assert optimizer.state_counts() == {
        "num_updates": 5,
        "num_skipped": 3,
        "num_skipped_in_a_row": 0,
    }
    undisturbed = make_student()
    undisturbed_optimizer = Optimizer(undisturbed, lr=1e-2, warmup_updates=2)
    for seed in (0, 4):
        set_gradients(undisturbed, seed)
        undisturbed_optimizer.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.parameters(), undisturbed.parameters(), strict=True)
    )
    resumed_student = make_student(seed=1)
    resumed_student.load_state_dict(student.state_dict())
    resumed_optimizer = Optimizer(resumed_student, lr=1e-2, warmup_updates=2)
    resumed_optimizer.load_state(optimizer.state_tensors(), optimizer.state_counts())
    for model, each in ((student, optimizer), (resumed_student, resumed_optimizer)):
        set_gradients(model, seed=5)
        each.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(student.parameters(), resumed_student.parameters(), strict=True)
    )


def test_missing_gradient_counts_as_zero() -> None:
    """A parameter without .grad is updated as one whose gradient is 0."""
    student = make_student()
    expected_student = make_student()
    optimizer = Optimizer(student, lr=1e-2)
    expected_optimizer = Optimizer(expected_student, lr=1e-2)
    for seed in range(3):
        set_gradients(student, seed)
        set_gradients(expected_student, seed)
        student.norm.weight.grad = None if seed == 1 else student.norm.weight.grad
        expected_student.norm.weight.grad *= 0 if seed == 1 else 1
        optimizer.step()
        expected_optimizer.step()
    assert all(
        torch.equal(actual, expected)
        for actual, expected in zip(
            student.parameters(), expected_student.parameters(), strict=True
        )
    )


def test_storage_never_moves() -> None:
    """Neither a step nor load_state allocates new weights or moments."""
    student = make_student()
    optimizer = Optimizer(student, lr=1e-2)
    pointers = [
        tensor.data_ptr() for tensor in (*student.parameters(), *optimizer.state_tensors().values())
    ]
    for seed in range(2):
        set_gradients(student, seed)
        optimizer.step()
    state = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    optimizer.load_state(state, optimizer.state_counts())
    assert pointers == [
        tensor.data_ptr() for tensor in (*student.parameters(), *optimizer.state_tensors().values())
    ]


def test_refusals() -> None:
    student = make_student()
    for options, message in (
        ({"lr": 0.0}, "lr must be finite and > 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be each in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0"),
        ({"warmup_updates": -1}, "warmup_updates must be >= 0"),
        (
            {"lr_schedule": "step"},
            "lr_schedule must be one of constant, linear, cosine, got 'step'",
        ),
        ({"min_lr_ratio": 1.0}, r"min_lr_ratio must be in \[0, 1\), got 1.0"),
        (
            {"lr_schedule": "linear"},
            "total_updates must be > warmup_updates 10 for lr_schedule 'linear', got None",
        ),
        (
            {"lr_schedule": "linear", "total_updates": 10},
            "total_updates must be > warmup_updates 10 .* got 10",
        ),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be > 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Optimizer(student, **{"lr": 1e-3} | options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError,
        match=r"dtype of embed.weight must be float32 or bfloat16, got torch.float16; load",
    ):
        Optimizer(make_student(dtype=torch.float16), lr=1e-3)
    narrow = make_student(dtype=torch.bfloat16)
    narrow.norm.weight.grad = torch.ones_like(narrow.norm.weight)
    with pytest.raises(
        ValueError, match="grad of norm.weight must be float32 or None, got torch.bfloat16; drop it"
    ):
        Optimizer(narrow, lr=1e-3)
    optimizer = Optimizer(student, lr=1e-3)
    tensors = optimizer.state_tensors()
    counts = optimizer.state_counts()
    new_state = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"1 odd names, exp_avg.norm.weight first"):
        optimizer.load_state(
            {name: x for name, x in new_state.items() if name != "exp_avg.norm.weight"}, counts
        )
    with pytest.raises(
        ValueError,
        match=r"exp_avg.norm.weight must be torch.float32 \[32\], got torch.float32 \[31\]",
    ):
        optimizer.load_state(new_state | {"exp_avg.norm.weight": torch.zeros(31)}, counts)
    assert not any(tensor.any() for tensor in optimizer.state_tensors().values())


def test_weights_written_from_outside_are_the_masters() -> None:
    """Weights written by other code become the masters; the old low bits do not count.

    At a weight of 0, negative low bits of another number would not even give a number.
    """
    student = make_student(dtype=torch.bfloat16)
    optimizer = Optimizer(student, lr=1e-2, warmup_updates=0)
    for seed in range(3):
        set_gradients(student, seed)
        optimizer.step()
    param = student.layers[0].mlp.down.weight
    low_bits = optimizer.low_bits["layers.0.mlp.down.weight"]
    assert (low_bits < 0).any()
    with torch.no_grad():
        param.zero_()
    # As a checkpoint stores them.
    assert not optimizer.state_tensors()["low_bits.layers.0.mlp.down.weight"].any()
    assert low_bits is optimizer.low_bits["layers.0.mlp.down.weight"]
    set_gradients(student, seed=4)
    optimizer.step()
    master = join_master(param.detach(), low_bits)
    assert (master != 0).all()
    assert (master.abs() < 2e-2).all()
    set_gradients(student, seed=5)
    optimizer.step()
    assert (join_master(param.detach(), low_bits) != master).all()
