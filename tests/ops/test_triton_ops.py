"""Tests whole ops and a whole training step with impl="triton".

On a CPU the kernels run in the interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.kernels import linear_policy_loss as kernels
from socpo_fast.ops import PolicyLoss, _impl, linear_logprob, linear_policy_loss
from socpo_fast.training.step import compute_logprobs, policy_gradients
from tests.helpers.error_rule import assert_bitwise_equal, assert_error_rule
from tests.helpers.loss_options import gathered
from tests.helpers.made_rollouts import make_rollouts, make_student

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_TERMS = {"entropy_coef": 0.1, "kl_coef": 0.2}
Inputs = dict[str, Tensor]


def make_inputs(
    num_tokens: int = 9, num_rows: int = 19, vocab: int = 1031, width: int = 12
) -> Inputs:
    """Returns rows that repeat, with ratios on both sides of the clips.

    Some have weight or advantage 0, and the width is no multiple of 8.
    """
    rng = torch.Generator().manual_seed(num_rows)
    # bf16 holds these exactly, so every dtype computes on the same numbers.
    hidden = torch.randn(num_tokens, width, generator=rng).bfloat16()
    weight = torch.randn(vocab, width, generator=rng).bfloat16()
    rows = torch.randint(num_tokens, (num_rows,), generator=rng) if num_tokens else torch.arange(0)
    targets = torch.randint(vocab, (num_rows,), generator=rng)
    temperature = 0.5 + torch.rand(num_rows, generator=rng)
    logits = (hidden[rows].double() @ weight.T.double()) / temperature[:, None]
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    return {
        "hidden_TD": hidden.float(),
        "weight_VD": weight.float(),
        "targets_N": targets,
        "old_logprobs_N": logprobs + 0.4 * torch.randn(num_rows, generator=rng),
        "advantages": torch.tensor([1.5, -0.7, -2.0, 0.0]),
        "attempt_of_token_N": torch.arange(num_rows) % 4,
        "weights_N": torch.rand(num_rows, generator=rng)
        * (torch.rand(num_rows, generator=rng) < 0.8),
        "ref_logprobs_N": logprobs + 0.4 * torch.randn(num_rows, generator=rng),
        "rows_N": rows,
        "temperature": temperature,
    }


def run_loss(
    inputs: Inputs, dtype: torch.dtype, impl: str, **options: Any
) -> tuple[PolicyLoss, Tensor, Tensor]:
    """Runs the loss and its backward, with hidden and weight in `dtype`.

    Values by token are in the dtype that logits are held in.
    """
    wide = torch.promote_types(dtype, torch.float32)
    moved = {
        name: x.to(DEVICE, wide if x.is_floating_point() else x.dtype) for name, x in inputs.items()
    }
    hidden, weight = (
        moved.pop(name).to(dtype, copy=True).requires_grad_() for name in ("hidden_TD", "weight_VD")
    )
    result = linear_policy_loss(hidden, weight, **moved, impl=impl, **gathered(options))
    (3 * result.loss).backward()  # an upstream gradient that is not 1
    return result, hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, ALL_TERMS], ids=["bare", "all terms"])
def test_linear_policy_loss(dtype: torch.dtype, options: dict[str, float]) -> None:
    inputs = make_inputs()
    actual = run_loss(inputs, dtype, "triton", **options)
    plain = run_loss(inputs, dtype, "ref", **options)
    truth = run_loss(inputs, torch.float64, "ref", **options)
    for name in ("loss", "logprobs", "entropy", "ratio", "clip_fraction"):
        results = (getattr(result[0], name) for result in (actual, plain, truth))
        assert_error_rule(*results, name=name)
    for i, name in ((1, "dX"), (2, "dW")):
        scale = truth[i].abs().max()
        results = (result[i].double() / scale for result in (actual, plain, truth))
        assert_error_rule(*results, name=name, dtype=dtype)


def test_make_aot_compiles_what_the_op_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant of the row pass that the op launches is among those compiled ahead of time."""
    launches = set()

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda _, grad, *args, NEED_ENTROPY, ENTROPY_GRAD, **constants: launches.add(
                (grad is not None, NEED_ENTROPY, ENTROPY_GRAD)
            )

    compiled = {
        (  # the constants that make another variant of the kernel
            config.pointers["grad_ptr"] is not None,
            config.constants["NEED_ENTROPY"],
            config.constants["ENTROPY_GRAD"],
        )
        for config in kernels.aot_configs()
    }
    monkeypatch.setattr(kernels, "_policy_rows_kernel", Recorder())
    for options in ({}, ALL_TERMS):
        run_loss(make_inputs(), torch.float32, "triton", **options)
    assert len(launches) == 2 and launches <= compiled


def test_deterministic_and_chunks_only_round() -> None:
    """Two runs are bitwise equal; chunks of 16 rows change only the last bits."""
    inputs = make_inputs(num_rows=70)
    first, second = (run_loss(inputs, torch.float32, "triton", **ALL_TERMS) for _ in range(2))
    chunked = run_loss(inputs, torch.float32, "triton", workspace_mib=0.1, **ALL_TERMS)
    for name, a, b, c in zip(
        ("loss", "dX", "dW"),
        *((result[0].loss.detach(), *result[1:]) for result in (first, second, chunked)),
        strict=True,
    ):
        assert_bitwise_equal(a, b, name=name)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows(num_rows: int) -> None:
    inputs = make_inputs(num_rows=num_rows)
    inputs["weights_N"] = torch.ones(num_rows)
    actual = run_loss(inputs, torch.float32, "triton")
    expected = run_loss(inputs, torch.float32, "ref")
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_all_rows_masked_give_zero_gradients() -> None:
    inputs = make_inputs()
    inputs["weights_N"] = torch.zeros(19)
    result, dx, dw = run_loss(inputs, torch.float32, "triton")
    assert result.loss.item() == 0.0 and not dx.any() and not dw.any()


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_logprob(dtype: torch.dtype, entropy_grad: bool) -> None:
    inputs = make_inputs()
    results = {}
    for role, impl, in_dtype in (
        ("actual", "triton", dtype),
        ("plain", "ref", dtype),
        ("truth", "ref", torch.float64),
    ):
        hidden, weight = (
            inputs[name].to(DEVICE, in_dtype, copy=True).requires_grad_()
            for name in ("hidden_TD", "weight_VD")
        )
        targets, rows, temperature = (
            inputs[name].to(DEVICE) for name in ("targets_N", "rows_N", "temperature")
        )
        logprobs, entropy = linear_logprob(
            hidden,
            weight,
            targets,
            temperature=temperature,
            rows_N=rows,
            entropy_grad=entropy_grad,
            impl=impl,
        )
        loss = logprobs.cos().sum() + (entropy.square().sum() if entropy_grad else 0.0)
        loss.backward()
        results[role] = (logprobs, entropy, hidden.grad / 30, weight.grad / 30)
    for name, *triple in zip(("logprobs", "entropy", "dX", "dW"), *results.values(), strict=True):
        assert_error_rule(*triple, name=name, dtype=dtype)


def test_a_whole_training_step() -> None:
    """The kernels' gradient of every parameter keeps the error rule beside the reference's.

    The step has a packed tree, the model, the LM head and the loss.
    """
    rollouts = make_rollouts()
    options = {"token_budget": 60, "temperature": 0.8, "entropy_coef": 0.01}
    gradients = {}
    stats = {}
    for impl, dtype in (("triton", torch.float32), ("ref", torch.float32), ("ref", torch.float64)):
        student = make_student(dtype=dtype).to(DEVICE)
        stats[impl, dtype] = policy_gradients(student, rollouts, impl=impl, **gathered(options))
        gradients[impl, dtype] = {name: param.grad for name, param in student.named_parameters()}
    assert stats["triton", torch.float32].num_microbatches > 1
    actual, plain, truth = gradients.values()
    for name in truth:
        scale = truth[name].abs().max()
        assert_error_rule(actual[name] / scale, plain[name] / scale, truth[name] / scale, name=name)
    assert stats["triton", torch.float32].loss == pytest.approx(
        stats["ref", torch.float64].loss, rel=1e-5
    )

    student = make_student().to(DEVICE)
    per_impl = [
        compute_logprobs(student, rollouts, token_budget=60, temperature=0.8, impl=impl)
        for impl in ("triton", "ref")
    ]
    torch.testing.assert_close(*per_impl)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_impl, "INTERPRETS", False)
    with pytest.raises(
        ValueError, match="which runs on a GPU, and on the CPU under TRITON_INTERPRET=1"
    ):
        _impl.pick_impl("linear_policy_loss", "triton", torch.empty(0))
