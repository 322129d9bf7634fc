"""Checks the decoder against transformers for every family, and what conversions do to it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from socpo_fast.model import Decoder, load_student, packed_forward
from socpo_fast.ops import visible_until_of_sequences
from tests.helpers.error_rule import assert_bitwise_equal

# A sequence of one token, and one long enough for slow rotary frequencies to matter.
LENGTHS = (1, 5, 64, 17)
SMOLLM2 = Path(os.environ.get("SOCPO_SMOLLM2", "~/.cache/socpo/smollm2-135m-instruct")).expanduser()
FAMILIES = (
    *("llama_tied", "llama_untied", "llama_biases", "llama3_rope", "mistral"),
    *("qwen2_tied", "qwen2_untied", "qwen3_tied", "qwen3_untied"),
)


def packed_logits(student: Decoder, sequences: list[Tensor], **forward: Any) -> Tensor:
    """Returns [T, V] logits of several sequences in one packed row."""
    seq_lens = [len(ids) for ids in sequences]
    positions_T = torch.cat([torch.arange(length) for length in seq_lens])
    hidden_TD = packed_forward(
        student, torch.cat(sequences), positions_T, visible_until_of_sequences(seq_lens), **forward
    )
    return F.linear(hidden_TD, student.lm_head.weight)


def reference_logits(reference: PreTrainedModel, sequences: list[Tensor]) -> Tensor:
    """Returns [T, V] logits of transformers, one sequence at a time."""
    with torch.no_grad():
        return torch.cat([reference(ids[None]).logits[0] for ids in sequences])


def random_sequences(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in LENGTHS]


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(make_hf: Callable, family: str, max_shard_size: str) -> None:
    reference, folder = make_hf(family, max_shard_size=max_shard_size)
    assert (folder / "model.safetensors").exists() == (max_shard_size == "5GB")
    student = load_student(folder)
    sequences = random_sequences(student.config.vocab_size)
    expected_TV = reference_logits(reference, sequences)
    assert expected_TV.abs().max() > 1  # otherwise the tolerance would prove nothing
    torch.testing.assert_close(packed_logits(student, sequences), expected_TV, rtol=0, atol=1e-4)


def test_llama3_frequencies_equal_transformers(make_hf: Callable) -> None:
    """Llama 3's scaled frequencies are transformers', with kept, blended and divided ones."""
    reference, folder = make_hf("llama3_rope")
    inv_freq = load_student(folder).inv_freq
    torch.testing.assert_close(inv_freq, reference.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    stretch = plain / inv_freq
    is_kept = torch.isclose(stretch, torch.ones(8))
    is_divided = torch.isclose(stretch, torch.full((8,), 8.0))
    assert is_kept.any() and is_divided.any() and (~is_kept & ~is_divided).any()


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_untied"])
def test_checkpointing_keeps_every_gradient(make_hf: Callable, family: str) -> None:
    student = load_student(make_hf(family)[1])
    sequences = random_sequences(student.config.vocab_size)
    gradients = []
    for checkpointing in (False, True):
        student.zero_grad(set_to_none=True)
        packed_logits(student, sequences, checkpointing=checkpointing).square().mean().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for (name, _), plain, recomputed in zip(student.named_parameters(), *gradients, strict=True):
        assert plain.abs().max() > 0 and torch.equal(plain, recomputed), name


@pytest.mark.parametrize("family", ["llama_biases", "qwen3_tied"])
def test_bf16_weights_compute_in_fp32_on_a_cpu(make_hf: Callable, family: str) -> None:
    """On a CPU bf16 weights are only read as such: activations are fp32, with and without autograd.

    Otherwise sampling, old log-probs and the gradient would differ in how activations are rounded.
    """
    folder = make_hf(family)[1]
    student, wide = (load_student(folder, dtype="bfloat16") for _ in range(2))
    wide.float()
    ids = torch.arange(17)

    def attend(_layer: int, qkv_THE: Tensor, _scale: float) -> Tensor:
        return qkv_THE[:, :4]

    with torch.no_grad():
        without_grad, expected = (model(ids, ids, attend) for model in (student, wide))
    with_grad = student(ids, ids, attend)
    assert with_grad.dtype == without_grad.dtype == torch.float32
    torch.testing.assert_close(without_grad, expected)
    torch.testing.assert_close(with_grad, expected)
    with_grad.sum().backward()
    assert (
        student.layers[0].attention_norm.weight.grad.dtype
        == student.layers[0].mlp.down.weight.grad.dtype
    )
    assert student.layers[0].mlp.down.weight.grad.dtype == torch.bfloat16


CONVERSIONS: dict[str, Callable[[Decoder], Decoder]] = {
    "bfloat16": lambda student: student.to(torch.bfloat16),
    "half": lambda student: student.half(),
    "half and back": lambda student: student.half().float(),
    "double": lambda student: student.double(),
    "cpu": lambda student: student.cpu(),
    "to_empty": lambda student: student.to_empty(device="cpu"),
    "meta and to_empty": lambda student: student.to("meta").to_empty(device="cpu"),
    "as a part of another module": lambda student: nn.Sequential(student).bfloat16()[0],
    "deepcopy": copy.deepcopy,
    "deepcopy of bfloat16": lambda student: copy.deepcopy(student.bfloat16()),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("family", ["llama3_rope", "qwen3_tied"])
def test_no_conversion_loses_angles(make_hf: Callable, family: str, conversion: str) -> None:
    student = CONVERSIONS[conversion](load_student(make_hf(family)[1]))
    assert student.inv_freq.device.type == "cpu"
    assert_bitwise_equal(student.inv_freq, student.config.inverse_frequencies(), name=conversion)


def test_angles_follow_the_weights_to_a_device(make_hf: Callable) -> None:
    """Rotary frequencies survive the meta device, whether the model is made or moved there."""
    folder = make_hf("llama_tied")[1]
    moved = load_student(folder).bfloat16().to("meta")
    assert moved.inv_freq.is_meta and moved.inv_freq.dtype == torch.float32
    with torch.device("meta"):
        made = Decoder(moved.config)
    for student in (made.half().to_empty(device="cpu"), moved.to_empty(device="cpu")):
        expected = student.config.inverse_frequencies()
        assert_bitwise_equal(student.inv_freq, expected, name="inv_freq")


def test_no_op_conversion_keeps_the_buffer(make_hf: Callable) -> None:
    """A conversion that changes nothing keeps the buffer's address, which captured graphs read."""
    student = load_student(make_hf("llama_tied")[1])
    old_buffer = student.inv_freq
    assert student.cpu().float().share_memory().inv_freq is old_buffer


@pytest.mark.smollm2
@pytest.mark.skipif(
    not SMOLLM2.exists(), reason=f"{SMOLLM2} is not there; SOCPO_SMOLLM2 names another place"
)
@torch.no_grad()
def test_smollm2_logits_equal_transformers() -> None:
    """Logits of the real model are transformers' in fp64; in fp32 its rounding is the tolerance."""
    reference = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float64)
    student = load_student(SMOLLM2)
    sequences = random_sequences(student.config.vocab_size)
    expected_TV = reference_logits(reference, sequences)
    torch.testing.assert_close(
        packed_logits(student, sequences).double(), expected_TV, rtol=0, atol=1e-4
    )
