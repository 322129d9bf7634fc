"""Holds small random models of every supported family, as transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Head width 24 / 4 = 6 is no power of two, and Qwen3's 16 is not hidden_size / heads; the
# vocabulary, 53, is prime.
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# Chosen so that all three cases occur: of 8 frequencies some are kept, some blended, some divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama_biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3_rope": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_untied": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
}


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """Returns make_hf(family, **save_pretrained's keywords) -> (transformers' model, folder)."""

    def make(
        family: str, *, dtype: torch.dtype = torch.float32, **save: Any
    ) -> tuple[PreTrainedModel, Path]:
        generator = torch.Generator().manual_seed(0)
        reference = (
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | FAMILIES[family]))
            .to(dtype)
            .eval()
        )
        with torch.no_grad():
            for parameter in reference.parameters():  # so that no bias is 0 and no norm weight 1
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
        folder = tmp_path / family
        reference.save_pretrained(folder, **save)
        return reference, folder

    return make
