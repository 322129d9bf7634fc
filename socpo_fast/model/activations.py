"""Bytes of activations that the trainer's forward and backward hold, by formula, for a plan of memory.

A layer keeps the two sums that are normed, raw qkv, attention's output and log-sum-exp, gate_up.
The rest is element-wise and computed again: inputs of products from their Source (accumulate.py),
rotated q and k from raw qkv (there, too). The formulas hold for kernels, not for references, which
keep what torch keeps.
"""

import torch

from socpo_fast.model.config import ModelConfig


def kept_bytes_per_token(config: ModelConfig, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Returns the bytes that the graph of a forward holds a token.

    Beside it the caller holds the hidden states. dtype is what the model computes in:
    decoder.computing_dtype.
    """
    width = config.hidden_size * dtype.itemsize
    by_layers = config.num_layers * layer_bytes_per_token(config, dtype)
    if checkpointing:
        by_layers = (2 * config.num_layers - 1) * width  # a layer's two inputs; the first has one
    return by_layers + width + 8 * config.head_dim + 8  # the last sum; cos and sin; its id


def layer_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Returns the bytes that one layer keeps a token."""
    attended, qkv = _widths(config)
    width = 2 * config.hidden_size + qkv + attended + 2 * config.intermediate_size
    return width * dtype.itemsize + 4 * config.num_heads


def backward_bytes_per_token(config: ModelConfig, dtype: torch.dtype, *, checkpointing: bool) -> int:
    """Returns the bytes a token by which the backward of the layers exceeds what was kept before it.

    Its first layer, the model's last, decides: what was kept goes one after the other, the last sum
    at once. Beside it an op has a workspace of its own, of which that of tree attention grows with
    the tokens: 8 bytes a head, and partial sums of dK and dV for up to 8192 rows.
    """
    width, inner = config.hidden_size, config.intermediate_size
    attended, qkv = _widths(config)
    rotating_back = attended + 2 * qkv - 2 * inner - width  # gate_up and the MLP's sum are gone
    gating_back = 3 * inner  # of swiglu and gate_up; the stream's is as large as the last sum
    if checkpointing:  # the most in a layer's second forward is at its second norm
        most = max(rotating_back, gating_back, 3 * width - 2 * inner)
        return layer_bytes_per_token(config, dtype) + most * dtype.itemsize
    return max(rotating_back, gating_back, 2 * width) * dtype.itemsize  # 2: at the last norm


def _widths(config: ModelConfig) -> tuple[int, int]:
    """Of attention's output and of qkv."""
    attended = config.num_heads * config.head_dim
    return attended, attended + 2 * config.num_kv_heads * config.head_dim
