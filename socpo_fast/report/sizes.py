"""Counts parameters and bytes of a model's parts: pure functions of its config.

The tests count the same cases by hand. What an update keeps for its backward is what the decoder's
fused layers keep: both residual sums, raw qkv, attention's output and log-sum-exp, and gate_up.
Norms, rotary embeddings and SwiGLU are computed again in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from socpo_fast.model import ModelConfig

# Per token of a packed microbatch: five int64 (ids, positions, targets, rows, attempts) and twelve
# fp32 values (log-probs, advantages, weights, six outputs).
TOKEN_BYTES = 5 * 8 + 12 * 4


def qkv_width(config: ModelConfig) -> int:
    """Returns the width of q, k and v together."""
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim


def head_parameters(config: ModelConfig) -> int:
    """Returns the parameters of the LM head, which are as many as the embedding's."""
    return config.vocab_size * config.hidden_size


def layer_parameters(config: ModelConfig) -> int:
    """Returns the parameters of all layers and the last norm."""
    width = config.hidden_size
    inner = config.intermediate_size
    matrices = qkv_width(config) + config.num_heads * config.head_dim + 3 * inner
    norms = 2 * width + 2 * config.head_dim * config.qk_norm
    biases = config.qkv_bias * qkv_width(config) + config.o_bias * width
    biases += config.mlp_bias * (2 * inner + width)
    return config.num_layers * (matrices * width + norms + biases) + width


def num_parameters(config: ModelConfig) -> int:
    """Returns a model's parameters; an LM head tied to the embedding counts once."""
    return layer_parameters(config) + (2 - config.tie_word_embeddings) * head_parameters(config)


def kv_bytes(config: ModelConfig, itemsize: int) -> int:
    """Returns the bytes of one token's keys and values in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def kept_bytes(config: ModelConfig, itemsize: int) -> int:
    """Returns the bytes that one layer keeps of a token for its backward.

    This holds for the kernels, not for their references, and only if the weights of all linear
    layers are trained: then their inputs are computed again (model/accumulate.py).
    """
    values = 2 * config.hidden_size + qkv_width(config) + 2 * config.intermediate_size
    return (values + config.num_heads * config.head_dim) * itemsize + 4 * config.num_heads


def activation_bytes(config: ModelConfig, itemsize: int, *, checkpointing: bool) -> int:
    """Returns the bytes a token that a microbatch keeps until the backward of the first layer.

    That is what all layers keep, then the last residual sum, the final hidden states and their
    gradient (three times hidden_size), cos and sin, and TOKEN_BYTES. With checkpointing a layer
    keeps only its two inputs (residual sum and delta); the first layer has just one.
    """
    stream = config.hidden_size * itemsize
    layers = config.num_layers * kept_bytes(config, itemsize)
    if checkpointing:
        layers = (2 * config.num_layers - 1) * stream
    return layers + 3 * stream + 8 * config.head_dim + TOKEN_BYTES


def backward_bytes(config: ModelConfig, itemsize: int, *, checkpointing: bool) -> int:
    """Returns the peak bytes a token of the layers' backward, on top of what is kept.

    The peak is in the first layer of the backward, which is the model's last: then most activations
    are still alive. Each layer frees what it kept as it goes, and the last residual sum is freed at
    once. Not counted here: tree attention's workspace, which takes 8 bytes a token and head, and
    partial sums of dK and dV for up to 8192 rows.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    attended = config.num_heads * config.head_dim
    # Three moments may hold the most. Values a token, less what the layer has freed by then:
    # 1. The backward of attention and rotary embedding, when gate_up and the MLP's residual sum
    #    have been freed.
    rope_backward = attended + 2 * qkv_width(config) - 2 * inner - width
    # 2. The backward of SwiGLU: gradients of its output and of gate_up. The residual stream's
    #    gradient replaces the last sum, which is as large.
    swiglu_backward = 3 * inner
    # 3. The last norm, or, with checkpointing, the second norm while a layer's forward runs again.
    if checkpointing:
        most = max(rope_backward, swiglu_backward, 3 * width - 2 * inner)
        return kept_bytes(config, itemsize) + most * itemsize
    return max(rope_backward, swiglu_backward, 2 * width) * itemsize


def head_bytes(config: ModelConfig, itemsize: int, num_tokens: int, workspace_bytes: int) -> int:
    """Returns the peak bytes of the policy head: workspace, dW, and dx twice, in fp32.

    dx exists for the loss tokens and again for all tokens.
    """
    # In bf16 the gradient of the logits needs a buffer besides the fp32 logits; in fp32 it
    # overwrites them.
    logit_bytes = 4 if itemsize == 4 else 4 + itemsize
    row_bytes = config.vocab_size * logit_bytes + 8 * config.hidden_size
    dx_bytes = 8 * num_tokens * config.hidden_size
    return min(workspace_bytes, num_tokens * row_bytes) + 4 * head_parameters(config) + dx_bytes


def filtered_draw_bytes(config: ModelConfig, num_rows: int) -> int:
    """Returns the bytes of the fp32 logits that draws with top-p need, as in an evaluation."""
    return 4 * num_rows * config.vocab_size


def step_bytes(config: ModelConfig, itemsize: int, num_tokens: int) -> int:
    """Returns the peak bytes that one layer of an engine step allocates."""
    attention = 2 * qkv_width(config) + config.num_heads * config.head_dim
    values = 4 * config.hidden_size + max(3 * config.intermediate_size, attention)
    return num_tokens * values * itemsize
