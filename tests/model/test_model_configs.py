"""Checks how a model's config.json is read: older formats, refusals and their messages."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from socpo_fast.model import Decoder, ModelConfig, load_student
from tests.helpers.model_folders import assert_refused, edit_json


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama_tied",
            {"architectures": ["GemmaForCausalLM"]},
            "architectures must be one of LlamaForCausalLM, ",
        ),
        ("llama_tied", {"architectures": ...}, "architectures is missing"),
        (
            "llama_tied",
            {"model_type": "mistral"},
            "model_type must be 'llama' for LlamaForCausalLM, got 'mistral'",
        ),
        ("llama_tied", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (
            "llama_tied",
            {"quantization_config": {"bits": 4}},
            "quantization_config must be absent, got {'bits': 4}",
        ),
        (
            "llama_tied",
            {"num_key_value_heads": 3},
            "num_key_value_heads must be a divisor of num_attention_heads=4",
        ),
        ("llama_tied", {"head_dim": 5}, "head_dim must be even, for rotary embeddings, got 5"),
        ("llama_tied", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama_tied", {"vocab_size": 53.0}, "vocab_size must be an integer >= 1, got 53.0"),
        ("llama_tied", {"rms_norm_eps": 0}, "rms_norm_eps must be a finite number > 0, got 0"),
        ("llama_tied", {"tie_word_embeddings": ...}, "tie_word_embeddings is missing"),
        (
            "llama_tied",
            {"tie_word_embeddings": "yes"},
            "tie_word_embeddings must be true or false, got 'yes'",
        ),
        (
            "mistral",
            {"sliding_window": 127},
            "sliding_window must be null or >= max_position_embeddings=128, got 127",
        ),
        ("mistral", {"sliding_window": ...}, "sliding_window is missing"),
        ("qwen2_tied", {"use_sliding_window": True}, "use_sliding_window must be false, got True"),
        (
            "qwen2_tied",
            {"layer_types": ["full_attention", "sliding"]},
            "layer_types must be 'full_attention' once a ",
        ),
        ("qwen3_tied", {"head_dim": ...}, "head_dim is missing"),
        ("llama_tied", {"rope_parameters": ...}, "rope_theta is missing"),
        (
            "llama_tied",
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_parameters.rope_type is missing",
        ),
        ("llama_tied", {"rope_parameters": 3}, "rope_parameters must be an object or null, got 3"),
        (
            "llama_tied",
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling must be absent beside rope_parameters",
        ),
        (
            "llama_tied",
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor must be 1 or absent, got 0.5",
        ),
        (
            "llama_tied",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters.rope_type must be 'default' or 'llama3', got 'yarn'",
        ),
        (
            "llama_tied",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 9,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor must be > low_freq_factor=4.0, got 4.0",
        ),
    ],
)
def test_wrong_config_is_refused(
    make_hf: Callable, family: str, changes: dict[str, Any], message: str
) -> None:
    folder = make_hf(family)[1]
    edit_json(folder / "config.json", **changes)
    assert_refused(folder, f"{folder}/config.json: {message}")


def test_older_config_reads_the_same(make_hf: Callable) -> None:
    """A config as transformers 4 wrote it, without the fields that it derives, reads the same."""
    for family in ("llama_tied", "llama3_rope"):
        folder = make_hf(family)[1]
        raw = json.loads((folder / "config.json").read_text())
        older = {
            name: value for name, value in raw.items() if name not in ("attention_bias", "mlp_bias")
        }
        rope = older.pop("rope_parameters").copy()
        older |= {
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": rope if family == "llama3_rope" else None,
        }
        if family == "llama_tied":
            del older["head_dim"]
        assert ModelConfig.from_hf(older, where="older") == ModelConfig.from_hf(raw, where="newer")
    heads = ModelConfig.from_hf(older | {"num_key_value_heads": None}, where="older")
    assert heads.num_kv_heads == heads.num_heads == 4


def test_duplicate_rope_fields_resolve_like_hf(make_hf: Callable) -> None:
    """Of fields that stand twice, the same one wins as in transformers.

    For rope_theta it is the one in rope_parameters, for the original length that of the top level.
    """
    folder = make_hf("llama3_rope")[1]
    edit_json(folder / "config.json", rope_theta=70.0, original_max_position_embeddings=32)
    config = load_student(folder).config
    assert config.rope_theta == 500.0 and config.llama3_rope == (8.0, 1.0, 4.0, 32)
    expected = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(config.inverse_frequencies(), expected, rtol=1e-6, atol=0)


def test_config_is_hashable_and_builds_a_decoder(make_hf: Callable) -> None:
    config = load_student(make_hf("qwen3_tied")[1]).config
    assert hash(config) == hash(dataclasses.replace(config, raw={}))
    assert Decoder(config).embed.weight.shape == (53, 24)
