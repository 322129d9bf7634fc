"""Bytes and counts of a model's parts: pure functions of its config, counted by hand in the tests.

What updates keep is that of the decoder's fused layers: residual sums, raw qkv, attention's output
and its log-sum-exp, and gate_up. Norms, rotary embeddings and SwiGLU are computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socpo_fast.model import ModelConfig

# int64 ids, positions, targets, rows, attempts; fp32 log-probs, advantages, weights, six outputs.
TOKEN_BYTES = 5 * 8 + 12 * 4


def qkv_width(config: ModelConfig) -> int:
    """Of q, k and v together."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def head_parameters(config: ModelConfig) -> int:
    """Of the LM head, or of the embedding."""
    return config.vocab_size * config.hidden_size


def layer_parameters(config: ModelConfig) -> int:
    """Of all layers and the last norm."""
    width = config.hidden_size
    inner = config.intermediate_size
    matrices = qkv_width(config) + config.num_heads * config.head_dim + 3 * inner
    norms = 2 * width + 2 * config.head_dim * config.qk_norm
    biases = config.qkv_bias * qkv_width(config) + config.o_bias * width
    biases += config.mlp_bias * (2 * inner + width)
    return config.num_layers * (matrices * width + norms + biases) + width


def num_parameters(config: ModelConfig) -> int:
    """Numbers in a model; a head tied to the embedding counts once."""
    return layer_parameters(config) + (2 - config.tie_word_embeddings) * head_parameters(config)


def kv_bytes(config: ModelConfig, itemsize: int) -> int:
    """Of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def kept_bytes(config: ModelConfig, itemsize: int) -> int:
    """What one layer keeps of a token for its backward.

    That holds for kernels, not for references, and where the weights of all linear layers are
    trained: their inputs are computed again (model/accumulate.py).
    """
    values = 2 * config.hidden_size + qkv_width(config) + 2 * config.intermediate_size
    return (values + config.num_heads * config.head_dim) * itemsize + 4 * config.num_heads


def activation_bytes(config: ModelConfig, itemsize: int, *, checkpointing: bool) -> int:
    """What a token of a microbatch keeps until the backward of the first layer.

    All layers, the last sum, the hidden states and their gradient, and the token's cos, sin and
    numbers. A layer that is computed again keeps its two inputs, of which the first has one.
    """
    stream = config.hidden_size * itemsize
    layers = config.num_layers * kept_bytes(config, itemsize)
    if checkpointing:
        layers = (2 * config.num_layers - 1) * stream
    return layers + 3 * stream + 8 * config.head_dim + TOKEN_BYTES


def backward_bytes(config: ModelConfig, itemsize: int, *, checkpointing: bool) -> int:
    """What the backward of the layers takes of a token at once, on top of what is kept.

    Its first layer, the model's last, decides: what was kept goes one after the other, the last sum
    at once. Beside it tree attention has a workspace that grows with the tokens: 8 bytes a head,
    and partial sums of dK and dV for up to 8192 rows.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    attended = config.num_heads * config.head_dim
    # gate_up and the MLP's sum are gone.
    rotating_back = attended + 2 * qkv_width(config) - 2 * inner - width
    gating_back = 3 * inner  # of swiglu and gate_up; the stream's is as large as the last sum
    if checkpointing:  # the most in a layer's second forward is at its second norm
        most = max(rotating_back, gating_back, 3 * width - 2 * inner)
        return kept_bytes(config, itemsize) + most * itemsize
    return max(rotating_back, gating_back, 2 * width) * itemsize  # 2: at the last norm


def head_bytes(config: ModelConfig, itemsize: int, num_tokens: int, workspace_bytes: int) -> int:
    """Most that the policy head takes at once: workspace, dW, dx of loss tokens and of all, in
    fp32.
    """
    # Below fp32 the gradient of the logits has a buffer of its own.
    logit_bytes = 4 if itemsize == 4 else 4 + itemsize
    row_bytes = config.vocab_size * logit_bytes + 8 * config.hidden_size
    dx_bytes = 8 * num_tokens * config.hidden_size
    return min(workspace_bytes, num_tokens * row_bytes) + 4 * head_parameters(config) + dx_bytes


def filtered_draw_bytes(config: ModelConfig, num_rows: int) -> int:
    """What draws with top-p, those of an evaluation, make: their logits in fp32."""
    return 4 * num_rows * config.vocab_size


def step_bytes(config: ModelConfig, itemsize: int, num_tokens: int) -> int:
    """What one layer of an engine step makes at once."""
    attention = 2 * qkv_width(config) + config.num_heads * config.head_dim
    values = 4 * config.hidden_size + max(3 * config.intermediate_size, attention)
    return num_tokens * values * itemsize
