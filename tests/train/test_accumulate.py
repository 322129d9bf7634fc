"""Gradients added in fp32 to .grad in place, by the decoder's own backward."""

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
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.step import policy_gradients
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
    """Of several microbatches."""
    student.zero_grad(set_to_none=True)
    options = {"token_budget": 60, "temperature": 0.8} | options
    assert policy_gradients(student, make_rollouts(), **options).num_microbatches > 1
    return {name: param.grad.clone() for name, param in student.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_equals_autograds_own(model: str) -> None:
    """As near to fp64 as gradients that autograd returned and added."""
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
    """As near to fp64 as a student with the same weights in fp32, but for the head's bf16 input."""
    student = make_student(dtype=torch.bfloat16, **MODELS[model])
    # With a ratio of 1 everywhere rounding moves no row across a clip.
    truth = gradients(copy.deepcopy(student).double(), old_logprobs="current")
    Optimizer(student, lr=1e-3)
    found = gradients(student, old_logprobs="current")
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert distance(found, truth) <= 0.01 * norm(truth)
    # Rounded to bf16 after each microbatch they would have no more than 8 bits. A token that stands
    # in one row only brings its row of the embedding such a gradient anyway.
    for name, grad in found.items():
        num_rounded = (grad == grad.bfloat16().float()).sum() - (grad == 0).sum()
        assert name.startswith("embed") or num_rounded < 0.1 * grad.numel() + 2, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_checkpointing(dtype: torch.dtype) -> None:
    student = make_student(dtype=dtype)
    Optimizer(student, lr=1e-3)
    found = [
        gradients(student, checkpointing=checkpointing) for checkpointing in (False, False, True)
    ]
    for other in found[1:]:
        for name, grad in found[0].items():
            assert_bitwise_equal(grad, other[name], name=name)


def test_added_where_it_lies() -> None:
    """The second microbatch allocates no gradient; a parameter's storage stays."""
    student = make_student(dtype=torch.bfloat16)
    Optimizer(student, lr=1e-3)
    gradients(student)
    places = {name: param.grad.data_ptr() for name, param in student.named_parameters()}
    policy_gradients(student, make_rollouts(), token_budget=60, temperature=0.8)
    assert places == {name: param.grad.data_ptr() for name, param in student.named_parameters()}


def test_copies_are_not_marked() -> None:
    """A pickled copy has the mark and not the dtype; it trains as if it had neither."""
    student = make_student(dtype=torch.bfloat16)
    Optimizer(student, lr=1e-3)
    assert all(hasattr(param, MARK) for param in student.parameters())
    assert not any(hasattr(param, MARK) for param in copy.deepcopy(student).parameters())
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert {grad.dtype for grad in gradients(other).values()} == {torch.bfloat16}


def test_frozen_parameters_are_left_alone() -> None:
    """They have no gradient, and the optimizer neither decays nor counts them."""
    student = make_student(**QWEN2)
    frozen = [student.layers[0].mlp.down.weight, student.layers[1].attention.qkv.bias]
    for param in frozen:
        param.requires_grad_(False)
    before = [param.clone() for param in frozen]
    optimizer = Optimizer(student, lr=1e-2, weight_decay=0.1, warmup_updates=0)
    policy_gradients(student, make_rollouts(), token_budget=60, temperature=0.8)
    assert all(param.grad is None for param in frozen)
    assert student.layers[1].attention.qkv.weight.grad is not None
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(frozen, before, strict=True))
    assert "exp_avg.layers.0.mlp.down.weight" not in optimizer.state_tensors()


def test_other_backwards_add_nothing() -> None:
    """Outside of the trainer gradients are returned, and .grad is nobody's but autograd's."""
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
