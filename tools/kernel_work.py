"""Bytes and FLOPs of one launch of each kernel at the shapes of a Qwen3-1.7B student.

Bytes count each tensor once, read or written; what a kernel reads a second time, out of the cache
or not, is its own cost. FLOPs are those of matrix products. Time on paper is the larger of bytes
over bandwidth and FLOPs over the rate of bf16 products (fp32 where the product is in fp32).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from socpo_fast.kernels import linear_sample, paged_decode
from socpo_fast.kernels._tree_plan import ROWS_PER_BLOCK
from socpo_fast.model import ModelConfig
from socpo_fast.ops import TreeMask
from socpo_fast.ops.tree_attention import num_pairs
from tools.gpu_check.models import MODELS
from tools.gpu_check.rooflines import attention_bytes, sample_bytes
from tools.tree_balance import visible_until_of_groups

STUDENT = "Qwen3-1.7B"
ROWS = 8192  # of a microbatch
HEAD_ROWS = 2048  # of a chunk of the LM head
# decoded together
SEQUENCES = 256
CONTEXT = 1024
PROMPTS = 8
PROMPT = 1000
# of a tree behind one prompt
ANSWERS = 8
ANSWER = 300
ATTEMPTS = 384  # of a batch
# bytes of bf16 and fp32
HALF = 2
WIDE = 4


class Card(NamedTuple):
    """What a roofline divides by."""

    name: str
    tb_s: float  # bytes read and bytes written both count
    bf16_tflop_s: float

    def us(self, work: Work) -> float:
        return max(work.num_bytes / self.tb_s, work.num_flops / self.bf16_tflop_s) / 1e6


class Work(NamedTuple):
    """One launch."""

    of: str
    num_bytes: float
    num_flops: float = 0.0


# A100: NVIDIA's data sheet of the SXM4 with 80 GB. H100: measured on an SXM5 with 80 GB, a product
# of 8192^3 and a copy.
CARDS = (Card("A100", 2.039, 312.0), Card("H100", 3.0, 798.0))


def works(config: ModelConfig = MODELS[STUDENT]) -> dict[str, Work]:
    """Kernel -> its launch."""
    made: dict[str, Work] = {}
    for part in (elementwise, head, decoding, training_attention, others):
        made |= part(config)
    return made


def elementwise(config: ModelConfig) -> dict[str, Work]:
    """bf16 rows of a microbatch."""
    row = HALF * config.hidden_size * ROWS
    gate = HALF * config.intermediate_size * ROWS
    head = HALF * config.head_dim * ROWS
    rotated = (config.num_heads + config.num_kv_heads) * head
    qkv = rotated + config.num_kv_heads * head
    tables = 2 * WIDE * config.head_dim * ROWS
    of = f"{ROWS} rows"
    return {
        "_rms_norm_kernel": Work(f"{of}, with the residual", 4 * row),
        "_rms_norm_backward_kernel": Work(f"{of}, with the residual", 4 * row),
        "_swiglu_kernel": Work(of, 3 * gate),
        "_swiglu_backward_kernel": Work(of, 5 * gate),
        "_rotary_kernel": Work(f"{of}, q and k", 2 * rotated + tables),
        "_rotary_backward_kernel": Work(f"{of}, all of qkv", rotated + 2 * qkv + tables),
    }


def head(config: ModelConfig) -> dict[str, Work]:
    """Row passes over fp32 logits, between products of cuBLAS; behind them the rows of dX."""
    logits = WIDE * HEAD_ROWS * config.vocab_size
    row = WIDE * config.hidden_size
    of = f"{HEAD_ROWS} rows of fp32 logits"
    return {
        "_logprob_rows_kernel": Work(of, logits),
        "_logprob_rows_backward_kernel": Work(f"{of}, gradient in bf16", 1.5 * logits),
        "_policy_rows_kernel": Work(f"{of}, gradient in bf16", 1.5 * logits),
        "_mark_rows_kernel": Work(f"{ROWS} rows", (8 + 2 * 4) * ROWS),
        "_sum_rows_kernel": Work(f"{ROWS} rows, all different", (2 * row + 8 + 2 * 4) * ROWS),
    }


def decoding(config: ModelConfig) -> dict[str, Work]:
    """One layer's attention of rollouts, and the draw of one token each."""
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    vocab = config.vocab_size
    width = config.hidden_size
    split = paged_decode.DECODE_TILES[90][torch.bfloat16].split
    partial = WIDE * SEQUENCES * heads * head_dim * -(-CONTEXT // split)
    seen = PROMPTS * PROMPT * (PROMPT + 1) / 2
    prompt = HALF * PROMPTS * PROMPT * (2 * heads + 2 * kv_heads) * head_dim
    tile = linear_sample.TILES[90][torch.bfloat16]
    tiles = (5 * WIDE + WIDE) * SEQUENCES * -(-vocab // tile.tokens)
    cached = attention_bytes(config, [CONTEXT] * SEQUENCES, 0, HALF)
    output = HALF * SEQUENCES * heads * head_dim
    of = f"{SEQUENCES} sequences of {CONTEXT} tokens"
    return {
        "_decode_kernel": Work(of, cached - output + partial),
        "_merge_splits_kernel": Work(of, partial + output),
        "_prefill_kernel": Work(
            f"{PROMPTS} prompts of {PROMPT} tokens", prompt, 4 * seen * heads * head_dim
        ),
        "_sample_tile_kernel": Work(
            f"{SEQUENCES} draws",
            sample_bytes(SEQUENCES, vocab, width, HALF) + tiles,
            2 * SEQUENCES * vocab * width,
        ),
        "_merge_tiles_kernel": Work(f"{SEQUENCES} draws", tiles),
        "_filtered_draw_kernel": Work(f"{SEQUENCES} filtered draws", WIDE * SEQUENCES * vocab),
    }


def training_attention(config: ModelConfig) -> dict[str, Work]:
    """One layer's attention over a tree: a prompt and its answers. FLOPs are the kernel's own."""
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    until_T = visible_until_of_groups([(PROMPT, [ANSWER] * ANSWERS)])
    rows = len(until_T)
    num_slots = int((TreeMask.of(until_T).query_ranges_P7[:, 5] >= 0).sum())
    partial = WIDE * num_slots * 2 * ROWS_PER_BLOCK * kv_heads * head_dim
    product = 2 * head_dim * heads * num_pairs(until_T)
    queries = HALF * rows * heads * head_dim
    keys = HALF * rows * kv_heads * head_dim
    sums = WIDE * rows * heads
    of = f"prompt of {PROMPT}, {ANSWERS} answers of {ANSWER}"
    return {
        "_tree_attention_kernel": Work(of, 2 * queries + 2 * keys + sums, 2 * product),
        "_tree_grad_q_kernel": Work(of, 4 * queries + 2 * keys + 2 * sums, 3 * product),
        "_tree_grad_kv_kernel": Work(of, 2 * queries + 4 * keys + 2 * sums + partial, 4 * product),
        "_tree_sum_kernel": Work(f"{of}: {num_slots} partial sums", partial),
    }


def others(config: ModelConfig) -> dict[str, Work]:
    """The step of the widest matrix, and the credit of a batch."""
    numbers = 2 * config.intermediate_size * config.hidden_size
    # Parameter, low half and both moments are read and written, the gradient is read.
    step = (2 * (HALF + HALF + 2 * WIDE) + WIDE) * numbers
    return {
        "_adamw_kernel": Work(f"gate_up of one layer, {numbers / 1e6:.1f}e6 numbers", step),
        "_decay_advantage_kernel": Work(f"{ATTEMPTS} attempts", (4 * 8 + 3 * WIDE) * ATTEMPTS),
    }
