"""Checks what the trainer's forward keeps and what its backward recomputes, without any effect.

Linear layers recompute their inputs from tensors that are kept anyway, and attention rotates back.
So memory is smaller and results are bitwise equal. The memory must be that of report.sizes.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from socpo_fast.model import decoder, packed_forward
from socpo_fast.model.accumulate import AccumulatingLinear, accumulate_in_fp32, accumulating
from socpo_fast.model.decoder import Decoder
from socpo_fast.ops import TreeMask
from socpo_fast.report import sizes
from tests.helpers.elementwise import needs_cpp
from tests.helpers.error_rule import assert_bitwise_equal
from tests.helpers.made_rollouts import VOCAB, make_student
from tests.helpers.whole_step import auto_means
from tests.training.test_accumulate import QWEN2, QWEN3

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "biases": QWEN2 | {"attention_bias": True},
    "norms of heads": QWEN3,
    # The backward needs more memory for rotating back than for the MLP.
    "many heads": QWEN3
    | {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 8},
    # The backward needs more memory for a norm than for the MLP.
    "wide": {
        "hidden_size": 256,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# The narrowest heads that Triton's attention takes.
TRITON = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
IMPLS = [pytest.param("cpp", marks=needs_cpp), "ref", "triton"]


def a_tree(num_tokens: int = 13) -> tuple[Tensor, Tensor, TreeMask]:
    """Returns ids, positions and mask of a prompt with two branches."""
    ids = torch.arange(num_tokens) * 7 % VOCAB
    positions = torch.arange(num_tokens)
    until = torch.full((num_tokens,), num_tokens, dtype=torch.int32)
    until[num_tokens // 4 : num_tokens // 2] = num_tokens // 2
    return ids, positions, TreeMask.of(until)


def gradients(student: Decoder, *, accumulates: bool = True, **options: Any) -> dict[str, Tensor]:
    """Returns the gradients of all parameters under a random gradient of the hidden states."""
    student.zero_grad(set_to_none=True)
    with accumulating() if accumulates else nullcontext():
        hidden_TD = packed_forward(student, *a_tree(), **options)
        generator = torch.Generator().manual_seed(1)
        hidden_TD.backward(torch.randn(hidden_TD.shape, generator=generator))
    return {
        name: param.grad.clone()
        for name, param in student.named_parameters()
        if param.grad is not None
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        assert_bitwise_equal(grad, expected[name], name=name)


def without_recomputation(patch: pytest.MonkeyPatch) -> None:
    """Patches the decoder so that products keep their inputs and attention is the ordinary ops."""
    apply: Callable[..., Tensor] = AccumulatingLinear.apply
    patch.setattr(
        AccumulatingLinear, "apply", lambda x, weight, bias, _: apply(x, weight, bias, None)
    )
    patch.setattr(decoder, "is_accumulating", lambda: False)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("impl", IMPLS)
def test_recomputing_changes_no_bit(impl: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(**MODELS[model] | (TRITON if impl == "triton" else {}))
    accumulate_in_fp32(student.parameters())
    with auto_means(impl):
        recomputed = gradients(student)
        assert_same(recomputed, gradients(student, checkpointing=True))
        without_recomputation(monkeypatch)
        assert_same(recomputed, gradients(student))


@needs_cpp
@pytest.mark.parametrize("model", MODELS)
def test_equals_ordinary_autograd(model: str) -> None:
    """Gradients are bitwise those of an unmarked student outside of the trainer.

    Only the sums of biases come from another kernel there.
    """
    student = make_student(**MODELS[model])
    expected = gradients(student, accumulates=False)
    accumulate_in_fp32(student.parameters())
    assert_same(gradients(student), expected)


FROZEN: dict[str, Callable[[str], bool]] = {
    "a layer": lambda name: name.startswith("layers.1."),
    "norms": lambda name: "norm" in name,
    "norms of heads": lambda name: name.endswith(("q_norm.weight", "k_norm.weight")),
    "products": lambda name: "norm" not in name and "embed" not in name,
    "qkv": lambda name: "qkv" in name,
    "embedding and first layer": lambda name: name.startswith(("embed", "layers.0.", "lm_head")),
}


@needs_cpp
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parameters_change_no_other(frozen: str, checkpointing: bool) -> None:
    """The gradients of trained parameters do not depend on which others are frozen."""
    student = make_student(**QWEN3)
    accumulate_in_fp32(student.parameters())
    expected = gradients(student)
    for name, param in student.named_parameters():
        param.requires_grad_(not FROZEN[frozen](name))
    actual = gradients(student, checkpointing=checkpointing)
    is_frozen = FROZEN[frozen]
    assert_same(actual, {name: grad for name, grad in expected.items() if not is_frozen(name)})


@needs_cpp
def test_a_hook_on_a_norm_is_called_once() -> None:
    """A forward hook on a norm runs once, although the backward recomputes its output.

    The products see the hook's result in the backward as well. So gradients are those of autograd.
    """
    student = make_student()
    accumulate_in_fp32(student.parameters())
    calls: list[int] = []

    def scale(
        _norm: torch.nn.Module, _args: Any, output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        calls.append(1)
        normed_TD, sum_TD = output
        return normed_TD * (1 + len(calls)), sum_TD

    student.layers[1].mlp_norm.register_forward_hook(scale)
    actual = gradients(student)
    assert len(calls) == 1
    calls.clear()
    assert_same(actual, gradients(student, checkpointing=False))
    plain = make_student()
    plain.layers[1].mlp_norm.register_forward_hook(scale)
    calls.clear()
    assert_same(actual, gradients(plain, accumulates=False))


class Watch(TorchDispatchMode):
    """Counts calls of ops, and the bytes of tensors made inside the block that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.calls[func._schema.name] += 1
        for x in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.live())
        return outputs

    def live(self) -> int:
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        return sum(self._sizes.values())


def measure(student: Decoder, num_tokens: int, checkpointing: bool) -> tuple[int, int]:
    """Returns the bytes alive after a forward, and how many more its backward needs at its peak."""
    inputs = a_tree(num_tokens)
    with accumulating(), Watch() as watch:
        hidden_TD = packed_forward(student, *inputs, checkpointing=checkpointing)
        gc.collect()
        kept_bytes = watch.live()
        grad_TD = torch.ones_like(hidden_TD)
        watch.peak = bytes_at_start = watch.live()
        hidden_TD.backward(grad_TD)
        return kept_bytes, watch.peak - bytes_at_start


def bytes_behind_forward(student: Decoder, checkpointing: bool) -> int:
    """Returns the formula's bytes a token, for what exists after the forward of this test.

    That is without the gradient of hidden states. Of a token's own numbers only the id exists.
    """
    missing_bytes = 4 * student.config.hidden_size + sizes.TOKEN_BYTES - 8
    return sizes.activation_bytes(student.config, 4, checkpointing=checkpointing) - missing_bytes


@needs_cpp
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_bytes_a_token_are_those_of_the_formulas(model: str, checkpointing: bool) -> None:
    """The bytes a token of forward and backward are exactly those of report.sizes.

    They are measured as the difference of 641 and 509 tokens, because gradients of norms do not
    depend on the number of tokens.
    """
    student = make_student(**MODELS[model], num_hidden_layers=3)
    accumulate_in_fp32(student.parameters())
    for _ in range(2):  # .grad of every parameter is there for the second one
        few, many = (measure(student, num_tokens, checkpointing) for num_tokens in (509, 641))
    kept_bytes, extra_bytes = ((b - a) / (641 - 509) for a, b in zip(few, many, strict=True))
    assert kept_bytes == bytes_behind_forward(student, checkpointing)
    assert extra_bytes == sizes.backward_bytes(student.config, 4, checkpointing=checkpointing)


@needs_cpp
def test_frozen_products_keep_no_input() -> None:
    """With frozen products, only the inputs of element-wise ops and attention are kept."""
    student = make_student(**QWEN3)
    for name, param in student.named_parameters():
        param.requires_grad_("norm" in name)
    accumulate_in_fp32(student.parameters())
    few, many = (measure(student, num_tokens, False)[0] for num_tokens in (509, 641))
    assert (many - few) / (641 - 509) == bytes_behind_forward(student, checkpointing=False)


@needs_cpp
@pytest.mark.parametrize("model", MODELS)
def test_no_product_and_no_attention_runs_twice(model: str) -> None:
    """Recomputing is cheap: it repeats element-wise ops and rotary, never a GEMM or attention."""
    student = make_student(**MODELS[model])
    accumulate_in_fp32(student.parameters())
    inputs = a_tree()
    with accumulating(), Watch() as watch:
        hidden_TD = packed_forward(student, *inputs)
        assert watch.calls["socpo_fast::linear"] == 4 * 2
        hidden_TD.backward(torch.ones_like(hidden_TD))
    calls = watch.calls
    assert calls["socpo_fast::linear"] == 4 * 2  # of two layers
    assert calls["socpo::matmul_"] == 2 * 4 * 2  # gradients of inputs and of weights
    assert sum(calls[f"aten::{name}"] for name in ("mm", "addmm", "matmul", "bmm", "linear")) == 0
    assert calls["socpo_fast::tree_attention"] == calls["socpo_fast::tree_attention_backward"] == 2
    assert calls["socpo_fast::rotary_qkv"] == 2 * calls["socpo_fast::rotary_qkv_backward"] == 4
