"""Checks the bytes and FLOPs of the rooflines, counted by hand or known from released models."""

from __future__ import annotations

import pytest
import torch

from socpo_fast.report.sizes import kv_bytes, layer_parameters, num_parameters
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.rooflines import (
    ASSUMED,
    attention_bytes,
    decode_bytes,
    head_flops,
    rollout_bytes,
    sample_bytes,
    update_flops,
)

TINY = MODELS["tiny"]  # D 32, I 48, 2 layers, 4 heads on 2 of 16, V 211, tied


@pytest.mark.parametrize(
    ("name", "billions", "kv_kb"),
    [("Qwen3-0.6B", 0.596, 115), ("Qwen3-1.7B", 1.72, 115), ("Qwen3-4B", 4.02, 147)],
)
def test_released_models_have_their_sizes(name: str, billions: float, kv_kb: float) -> None:
    """Parameters and KV bytes a token are those that are published for the models."""
    assert num_parameters(MODELS[name]) / 1e9 == pytest.approx(billions, rel=2e-3)
    assert kv_bytes(MODELS[name], 2) / 1e3 == pytest.approx(kv_kb, rel=5e-3)


def test_parameters_are_those_of_the_module() -> None:
    student = make_model(TINY, device="cpu", dtype=torch.float32)
    assert student.lm_head.weight is student.embed.weight
    assert num_parameters(TINY) == sum(parameter.numel() for parameter in student.parameters())
    # Twice: qkv, o, gate_up and down, four norms. Once: the last norm and the LM head.
    layer = 32 * 128 + 64 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16
    assert layer_parameters(TINY) + 211 * 32 == 2 * layer + 32 + 211 * 32


def test_a_decode_step_reads_weights_and_live_keys() -> None:
    assert kv_bytes(TINY, 4) == 2 * 2 * 2 * 16 * 4
    weights = layer_parameters(TINY) + 211 * 32
    assert decode_bytes(TINY, 10, 4) == 4 * weights + 10 * kv_bytes(TINY, 4)
    assert ASSUMED.copy_ms(3e9) == ASSUMED.read_ms(3e9) == pytest.approx(1.0)
    assert ASSUMED.bf16_ms(798e9) == pytest.approx(1.0)


def test_a_rollout_reads_what_its_steps_read() -> None:
    """Three steps of 4 sequences that start from 10 tokens read 10, 14 and 18 keys."""
    steps = [decode_bytes(TINY, live, 4) for live in (10, 14, 18)]
    assert rollout_bytes(TINY, rows=4, num_new=3, unique=10, itemsize=4) == sum(steps)


def test_attention_reads_shared_keys_once() -> None:
    """Of 8 tokens that three sequences share, two of the three reads are saved."""
    unshared = attention_bytes(TINY, [10, 10, 10], 0, 2)
    shared = attention_bytes(TINY, [10, 10, 10], 8, 2)
    assert unshared == 2 * (2 * 30 * 2 * 16 + 2 * 3 * 4 * 16)
    assert unshared - shared == 2 * (2 * 2 * 8 * 2 * 16)


def test_flops_of_an_update_and_of_the_head() -> None:
    layers = 6 * 7 * layer_parameters(TINY)
    attention = 14 * 28 * 2 * 4 * 16
    assert update_flops(TINY, 7, 5, 28) == layers + 6 * 5 * 211 * 32 + attention
    assert head_flops(5, 211, 32) == 6 * 5 * 211 * 32
    assert sample_bytes(3, 211, 32, 2) == 2 * 32 * 214
