"""Makes models with random weights, in the shapes of released models.

A machine with a card rarely has a checkpoint at hand, and neither speed nor a comparison of two
implementations needs one. The fields are those of the released config.json files.
"""

from __future__ import annotations

from typing import Any

import torch

from socpo_fast.model import Decoder, ModelConfig


def _qwen3(width: int, intermediate_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """Returns the config.json of a Qwen3 of this size."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "Qwen3-8B": {**_qwen3(4096, 12288, 36, 32), "tie_word_embeddings": False},
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
    # Small models with the heads of the two families, for comparisons in which a CPU takes part.
    "small SmolLM2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 4999,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    "small Qwen3": {
        **_qwen3(512, 1024, 4, 16),
        "vocab_size": 4999,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    # For rehearsals on a CPU: all of Qwen3's features, and hardly any work.
    "tiny": {
        **_qwen3(32, 48, 2, 4),
        "vocab_size": 211,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    },
}
MODELS = {name: ModelConfig.from_hf(raw, where=f"models.{name}") for name, raw in CONFIGS.items()}


def make_model(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Decoder:
    """Returns a decoder with random weights, made on `device` without a copy elsewhere.

    Norm weights are 1. Matrices have a standard deviation of 2 / sqrt(columns): with it the logits
    prefer some tokens clearly, as in a trained model, and ties are rare. The weights depend on the
    device and the seed.
    """
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty has made two tensors of them
    generator = torch.Generator(device=device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            std = 2 * parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        else:
            torch.nn.init.ones_(parameter)
    return model
