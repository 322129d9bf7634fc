"""Bytes and FLOPs of what is measured, and the least time they take: pure functions, counted by
hand in the tests.

A limit is work divided by a ceiling that was measured in the same run (stage `ceilings`), never a
data sheet's. Bytes count each tensor once, read or written; a kernel that reads a tensor twice
reaches less of its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from socpo_fast.model import ModelConfig
from socpo_fast.report.sizes import head_parameters, kv_bytes, layer_parameters


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the card did in stage `ceilings`; are_measured is False for stand-ins."""

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


# An H100 SXM5 80 GB, for a stage that is run without the first one; figures then say "assumed".
ASSUMED = Ceilings(
    copy_gb_s=3000,
    read_gb_s=3000,
    bf16_tflop_s=798,
    fp32_tflop_s=50,
    tf32_tflop_s=400,
    are_measured=False,
)


def decode_bytes(config: ModelConfig, live_tokens: int, itemsize: int) -> int:
    """Read by one decode step: the weights once, and the keys and values of all live tokens."""
    weights = layer_parameters(config) + head_parameters(config)
    return itemsize * weights + live_tokens * kv_bytes(config, itemsize)


def rollout_bytes(
    config: ModelConfig, *, rows: int, num_new: int, unique: int, itemsize: int
) -> int:
    """Read by the steps in which each of `rows` sequences decodes `num_new` tokens.

    unique: tokens they begin with, all together; those that siblings share are read once a step.
    """
    first = decode_bytes(config, unique, itemsize)
    last = decode_bytes(config, unique + rows * (num_new - 1), itemsize)
    return num_new * (first + last) // 2


def update_flops(config: ModelConfig, num_tokens: int, loss_tokens: int, seen_pairs: int) -> float:
    """Forward and backward: 6 a parameter and token, the head over loss tokens only, attention's
    seven products.

    seen_pairs: (query, key) pairs with key <= query, over all rows; each costs two products in the
    forward and five in the backward (scores again, dV, dP, dQ, dK).
    """
    head = head_parameters(config)
    layers = 6.0 * num_tokens * layer_parameters(config)
    attention = 14.0 * seen_pairs * config.num_layers * config.num_heads * config.head_dim
    return layers + 6.0 * loss_tokens * head + attention


def head_flops(num_rows: int, vocab: int, width: int) -> float:
    """The policy head, forward and backward: three GEMMs."""
    return 6.0 * num_rows * vocab * width


def sample_bytes(num_rows: int, vocab: int, width: int, itemsize: int) -> int:
    """The LM head and a draw from it: weights and hidden rows, each once."""
    return itemsize * width * (vocab + num_rows)


def attention_bytes(
    config: ModelConfig, seq_lens: list[int], num_shared: int, itemsize: int
) -> int:
    """One layer's decode attention: each key and value once, shared ones once for all."""
    keys = sum(seq_lens) - num_shared * (len(seq_lens) - 1)
    queries = 2 * len(seq_lens) * config.num_heads * config.head_dim  # q read and o written
    return itemsize * (2 * keys * config.num_kv_heads * config.head_dim + queries)
