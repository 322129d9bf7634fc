"""Checks the decoder's own backward, which adds gradients in fp32 to .grad, in place.

Autograd would allocate a gradient in the weight's dtype for each microbatch and add it to .grad. An
Optimizer marks its parameters. Inside of `accumulating()` the products of marked parameters add
their gradients themselves.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from socpo_fast.model import accumulate
from socpo_fast.model.accumulate import MARK, accumulates, accumulating
from socpo_fast.model.decoder import Decoder
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import policy_gradients
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.made_rollouts import make_rollouts, make_student
from tests.helpers.naive_update import distance, norm

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": QWEN2,
    "norms of heads": QWEN3,
}


def gradients(student: Decoder, **options: Any) -> dict[str, Tensor]:
    """Returns the gradients of an update of several microbatches, by parameter."""
    student.zero_grad(set_to_none=True)
    options = {"token_budget": 60, "temperature": 0.8} | options
    assert policy_gradients(student, make_rollouts(), **options).num_microbatches > 1
    return {name: param.grad.clone() for name, param in student.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_in_place_gradients_match_autograd(model: str) -> None:
    """Gradients added in place are as near to fp64 as those that autograd returned and added."""
    student = make_student(**MODELS[model])
    truth = gradients(copy.deepcopy(student).double())
    plain = gradients(student)
    Optimizer(student, lr=1e-3)
    in_place = gradients(student)
    size = norm(truth)
    assert distance(in_place, truth) <= 2 * distance(plain, truth) + 1e-6 * size
    for name, grad in in_place.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-4, atol=1e-5 * float(size), msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_weights_have_fp32_gradients(model: str) -> None:
    """Gradients of bf16 weights are sums in fp32, within 1 % of the same weights' in fp64.

    They are as near as those of an fp32 student, except for the LM head's input, which is bf16.
    """
    student = make_student(dtype=torch.bfloat16, **MODELS[model])
    # With a ratio of 1 everywhere, rounding cannot move a row across a clip bound.
    truth = gradients(copy.deepcopy(student).double(), old_logprobs="current")
    Optimizer(student, lr=1e-3)
    actual = gradients(student, old_logprobs="current")
    assert {grad.dtype for grad in actual.values()} == {torch.float32}
    assert distance(actual, truth) <= 0.01 * norm(truth)
    # Sums that were rounded to bf16 after each microbatch would have no more than 8 bits. The
    # embedding is left out: a token that occurs in one row only has a bf16 gradient anyway.
    for name, grad in actual.items():
        num_rounded = (grad == grad.bfloat16().float()).sum() - (grad == 0).sum()
        assert name.startswith("embed") or num_rounded < 0.1 * grad.numel() + 2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_equal_with_checkpointing(dtype: torch.dtype) -> None:
    """Two runs, and a run that recomputes activations, give bitwise equal gradients."""
    student = make_student(dtype=dtype)
    Optimizer(student, lr=1e-3)
    runs = [
        gradients(student, checkpointing=checkpointing) for checkpointing in (False, False, True)
    ]
    for run in runs[1:]:
        for name, grad in runs[0].items():
            assert_bitwise_equal(grad, run[name], name=name)


def test_gradients_accumulate_in_place() -> None:
    """A second update's microbatches allocate no gradient: every .grad keeps its address."""
    student = make_student(dtype=torch.bfloat16)
    Optimizer(student, lr=1e-3)
    gradients(student)
    pointers = {name: param.grad.data_ptr() for name, param in student.named_parameters()}
    policy_gradients(student, make_rollouts(), token_budget=60, temperature=0.8)
    assert pointers == {name: param.grad.data_ptr() for name, param in student.named_parameters()}


def test_copies_are_not_marked() -> None:
    """Copies train as unmarked models, with gradients in bf16.

    A deep copy loses the mark. A pickled copy keeps it but not the dtype of .grad, so it does not
    count as marked either.
    """
    student = make_student(dtype=torch.bfloat16)
    Optimizer(student, lr=1e-3)
    assert all(hasattr(param, MARK) for param in student.parameters())
    assert not any(hasattr(param, MARK) for param in copy.deepcopy(student).parameters())
    for unmarked in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert {grad.dtype for grad in gradients(unmarked).values()} == {torch.bfloat16}


def test_frozen_parameters_are_left_alone() -> None:
    """Frozen parameters get no gradient; the optimizer neither decays nor counts them."""
    student = make_student(**QWEN2)
    frozen = [student.layers[0].mlp.down.weight, student.layers[1].attention.qkv.bias]
    for param in frozen:
        param.requires_grad_(False)
    old_weights = [param.clone() for param in frozen]
    optimizer = Optimizer(student, lr=1e-2, weight_decay=0.1, warmup_updates=0)
    policy_gradients(student, make_rollouts(), token_budget=60, temperature=0.8)
    assert all(param.grad is None for param in frozen)
    assert student.layers[1].attention.qkv.weight.grad is not None
    optimizer.step()
    assert all(torch.equal(new, old) for new, old in zip(frozen, old_weights, strict=True))
    assert "exp_avg.layers.0.mlp.down.weight" not in optimizer.state_tensors()


def test_backwards_outside_of_the_trainer_are_plain() -> None:
    """Without `accumulating()` gradients are returned, and only autograd writes to .grad."""
    student = make_student(dtype=torch.bfloat16)
    Optimizer(student, lr=1e-3)
    x = torch.randn(3, 32, requires_grad=True)
    linear = student.layers[0].mlp.down
    y = student.layers[0].mlp(x)
    (grad,) = torch.autograd.grad(y.sum(), [linear.weight], retain_graph=True)
    assert grad.shape == linear.weight.shape
    assert linear.weight.grad is None
    y.sum().backward(inputs=[x], retain_graph=True)
    assert linear.weight.grad is None
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32  # autograd's, added in fp32


def test_changed_weights_end_the_backward() -> None:
    """A weight that changes between forward and backward is an error, as in autograd."""
    student = make_student()
    Optimizer(student, lr=1e-3)
    linear = student.layers[0].mlp.down
    with accumulating():
        y = linear(torch.randn(3, 48, requires_grad=True))
        with torch.no_grad():
            linear.weight.mul_(2)
        with pytest.raises(RuntimeError, match="a weight must stay as it was until the backward"):
            y.sum().backward()


def test_interrupted_product_leaves_no_raw_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the GEMM of a gradient does not leave uninitialised memory in .grad."""
    student = make_student()
    Optimizer(student, lr=1e-3)
    linear = student.layers[0].mlp.down
    monkeypatch.setattr(accumulate, "matmul_", interrupted)
    with accumulating(), pytest.raises(KeyboardInterrupt):
        linear(torch.randn(3, 48)).sum().backward()
    assert linear.weight.grad is None
    assert not accumulates(linear.weight)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
