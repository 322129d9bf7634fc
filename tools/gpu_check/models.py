"""Models by configuration: shapes of released models, with random weights made where they will be
used.

A machine with a card rarely has a checkpoint at hand, and neither speed nor agreement between two
implementations needs one. The configurations are those of the released config.json files.
"""

from __future__ import annotations

import torch

from socpo_fast.model import Decoder, ModelConfig


def _qwen3(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int
) -> ModelConfig:
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=True,
    )


def _llama(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    heads: tuple[int, int, int],
    vocab_size: int,
) -> ModelConfig:
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


MODELS = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32),
    "SmolLM2-135M": _llama(576, 1536, 30, (9, 3, 64), 49152),
}


def make_model(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Decoder:
    """Returns a decoder with random weights, made on `device` without a copy elsewhere.

    Norm weights are 1 and matrices have a standard deviation of 2 / sqrt(columns): at that size
    some tokens are likely and no two equally so, as in a trained model. The bits of the weights
    depend on the device and the seed.
    """
    with torch.device("meta"):
        model = Decoder(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty makes a tensor for each name
    generator = torch.Generator(device=device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(
                parameter, std=2 * parameter.shape[1] ** -0.5, generator=generator
            )
        else:
            torch.nn.init.ones_(parameter)
    model.inv_freq = config.inverse_frequencies().to(
        device
    )  # a module made on "meta" has no angles yet
    return model
