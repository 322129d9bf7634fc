"""Counts bytes and FLOPs, and the least time they take.

All functions are pure; the tests compare them with cases counted by hand. A limit is work divided
by a ceiling that was measured in the same run (stage `ceilings`), never one of a data sheet. Bytes
count each tensor once, read or written, so a kernel that reads a tensor twice reaches a smaller
share of its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from socpo_fast.model import ModelConfig
from socpo_fast.report.sizes import head_parameters, kv_bytes, layer_parameters


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The rates of stage `ceilings`; are_measured is False for assumed ones."""

    copy_gb_s: float  # bytes read and bytes written both count
    read_gb_s: float
    bf16_tflop_s: float
    fp32_tflop_s: float
    tf32_tflop_s: float
    are_measured: bool = True

    def copy_ms(self, num_bytes: float) -> float:
        return 1e-6 * num_bytes / self.copy_gb_s

    def read_ms(self, num_bytes: float) -> float:
        return 1e-6 * num_bytes / self.read_gb_s

    def bf16_ms(self, num_flops: float) -> float:
        return 1e-9 * num_flops / self.bf16_tflop_s


# Rates of an H100 SXM5 80 GB, for a stage that runs without stage `ceilings` before it.
ASSUMED = Ceilings(
    copy_gb_s=3000,
    read_gb_s=3000,
    bf16_tflop_s=798,
    fp32_tflop_s=50,
    tf32_tflop_s=400,
    are_measured=False,
)


def decode_bytes(config: ModelConfig, live_tokens: int, itemsize: int) -> int:
    """Counts the bytes that a decode step reads: all weights, and KV of all live tokens."""
    weights = layer_parameters(config) + head_parameters(config)
    return itemsize * weights + live_tokens * kv_bytes(config, itemsize)


def rollout_bytes(
    config: ModelConfig, *, rows: int, num_new: int, unique: int, itemsize: int
) -> int:
    """Counts the bytes read by the steps in which `rows` sequences decode `num_new` tokens each.

    unique: tokens of all contexts at the start; tokens that siblings share count once.
    """
    first = decode_bytes(config, unique, itemsize)
    last = decode_bytes(config, unique + rows * (num_new - 1), itemsize)
    return num_new * (first + last) // 2


def update_flops(config: ModelConfig, num_tokens: int, loss_tokens: int, seen_pairs: int) -> float:
    """Counts an update's FLOPs: 6 for each parameter and token, and attention's seven products.

    The LM head counts for loss tokens only. seen_pairs: pairs of a query and a visible key, over
    all rows; each costs two products in the forward and five in the backward (scores again, dV, dP,
    dQ, dK).
    """
    lm_head = head_parameters(config)
    layers = 6.0 * num_tokens * layer_parameters(config)
    attention = 14.0 * seen_pairs * config.num_layers * config.num_heads * config.head_dim
    return layers + 6.0 * loss_tokens * lm_head + attention


def head_flops(num_rows: int, vocab: int, width: int) -> float:
    """Counts the policy head's FLOPs, forward and backward: three GEMMs."""
    return 6.0 * num_rows * vocab * width


def sample_bytes(num_rows: int, vocab: int, width: int, itemsize: int) -> int:
    """Counts the bytes of the LM head with its draw: weights and hidden rows, each once."""
    return itemsize * width * (vocab + num_rows)


def attention_bytes(
    config: ModelConfig, seq_lens: list[int], num_shared: int, itemsize: int
) -> int:
    """Counts the bytes of one layer's decode attention: shared keys and values count once."""
    keys = sum(seq_lens) - num_shared * (len(seq_lens) - 1)
    queries = 2 * len(seq_lens) * config.num_heads * config.head_dim  # q read and o written
    return itemsize * (2 * keys * config.num_kv_heads * config.head_dim + queries)
