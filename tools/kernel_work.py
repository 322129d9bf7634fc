"""Bytes and FLOPs of one launch of each kernel at the shapes of a Qwen3-1.7B student.

Bytes count each tensor once, read or written. A second read of a tensor is not counted, whether it
hits the cache or not: it is a cost of the kernel, not of the problem. FLOPs are those of matrix
products. The least time on paper is the larger of bytes over bandwidth and FLOPs over the rate of
bf16 products (fp32 where the product is in fp32). Read works, then the functions that it calls.
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
ROWS = 8192  # packed tokens of a microbatch
HEAD_ROWS = 2048  # rows of one chunk of the LM head
# The decode batch: sequences decoded together, each with so many tokens of context.
SEQUENCES = 256
CONTEXT = 1024
# The prefill batch: prompts and the tokens of each.
PROMPTS = 8
PROMPT = 1000
# The tree of training: answers that share one prompt, and the tokens of each.
ANSWERS = 8
ANSWER = 300
ATTEMPTS = 384  # of a batch
HALF = 2  # bytes of a bf16 number
WIDE = 4  # bytes of an fp32 number


class Card(NamedTuple):
    """A card: the two rates of its roofline."""

    name: str
    tb_s: float  # bytes read and bytes written both count
    bf16_tflop_s: float

    def us(self, work: Work) -> float:
        """Returns the least time of a launch on this card, microseconds."""
        return max(work.num_bytes / self.tb_s, work.num_flops / self.bf16_tflop_s) / 1e6


class Work(NamedTuple):
    """The work of one launch."""

    of: str  # its shapes, in words
    num_bytes: float
    num_flops: float = 0.0


# A100: from NVIDIA's data sheet of the SXM4 with 80 GB. H100: measured on an SXM5 with 80 GB, by a
# product of 8192^3 and a copy.
CARDS = (Card("A100", 2.039, 312.0), Card("H100", 3.0, 798.0))


def works(config: ModelConfig = MODELS[STUDENT]) -> dict[str, Work]:
    """Returns the work of one launch of each kernel, by the kernel's name."""
    launches: dict[str, Work] = {}
    for works_of in (elementwise, head, decoding, training_attention, others):
        launches |= works_of(config)
    return launches


def elementwise(config: ModelConfig) -> dict[str, Work]:
    """Returns the element-wise kernels over the bf16 rows of a microbatch."""
    hidden = HALF * config.hidden_size * ROWS
    gate = HALF * config.intermediate_size * ROWS
    one_head = HALF * config.head_dim * ROWS
    rotated = (config.num_heads + config.num_kv_heads) * one_head
    qkv = rotated + config.num_kv_heads * one_head
    tables = 2 * WIDE * config.head_dim * ROWS
    shapes = f"{ROWS} rows"
    return {
        "_rms_norm_kernel": Work(f"{shapes}, with the residual", 4 * hidden),
        "_rms_norm_backward_kernel": Work(f"{shapes}, with the residual", 4 * hidden),
        "_swiglu_kernel": Work(shapes, 3 * gate),
        "_swiglu_backward_kernel": Work(shapes, 5 * gate),
        "_rotary_kernel": Work(f"{shapes}, q and k", 2 * rotated + tables),
        "_rotary_backward_kernel": Work(f"{shapes}, all of qkv", rotated + 2 * qkv + tables),
    }


def head(config: ModelConfig) -> dict[str, Work]:
    """Returns the policy head's row passes over fp32 logits, between products of cuBLAS."""
    logits = WIDE * HEAD_ROWS * config.vocab_size
    # A gradient in bf16 adds half of the logits' bytes, hence 1.5 below. The last two kernels sum
    # rows of dX by destination: 8 bytes are a row's int64 index, 2 * 4 a destination's two bounds.
    row = WIDE * config.hidden_size
    shapes = f"{HEAD_ROWS} rows of fp32 logits"
    return {
        "_logprob_rows_kernel": Work(shapes, logits),
        "_logprob_rows_backward_kernel": Work(f"{shapes}, gradient in bf16", 1.5 * logits),
        "_policy_rows_kernel": Work(f"{shapes}, gradient in bf16", 1.5 * logits),
        "_mark_rows_kernel": Work(f"{ROWS} rows", (8 + 2 * 4) * ROWS),
        "_sum_rows_kernel": Work(f"{ROWS} rows, all different", (2 * row + 8 + 2 * 4) * ROWS),
    }


def decoding(config: ModelConfig) -> dict[str, Work]:
    """Returns one layer's attention of a decode batch, and the draw of one token for each row."""
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    vocab = config.vocab_size
    width = config.hidden_size
    split = paged_decode.DECODE_TILES[90][torch.bfloat16].split
    # Each split of the keys writes its own partial output, which _merge_splits_kernel adds up.
    partial = WIDE * SEQUENCES * heads * head_dim * -(-CONTEXT // split)
    seen_pairs = PROMPTS * PROMPT * (PROMPT + 1) / 2
    prompt = HALF * PROMPTS * PROMPT * (2 * heads + 2 * kv_heads) * head_dim
    tile = linear_sample.TILES[90][torch.bfloat16]
    # Each tile of the vocabulary leaves six numbers for each row.
    tiles = (5 * WIDE + WIDE) * SEQUENCES * -(-vocab // tile.tokens)
    cached = attention_bytes(config, [CONTEXT] * SEQUENCES, 0, HALF)
    output = HALF * SEQUENCES * heads * head_dim
    shapes = f"{SEQUENCES} sequences of {CONTEXT} tokens"
    return {
        "_decode_kernel": Work(shapes, cached - output + partial),
        "_merge_splits_kernel": Work(shapes, partial + output),
        "_prefill_kernel": Work(
            f"{PROMPTS} prompts of {PROMPT} tokens", prompt, 4 * seen_pairs * heads * head_dim
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
    """Returns one layer's attention over a tree: a prompt and its answers, forward and backward."""
    heads = config.num_heads
    kv_heads = config.num_kv_heads
    head_dim = config.head_dim
    until_T = visible_until_of_groups([(PROMPT, [ANSWER] * ANSWERS)])
    rows = len(until_T)
    # A long range of queries is cut into several programs; each then needs a slot for partial sums.
    num_slots = int((TreeMask.of(until_T).query_ranges_P7[:, 5] >= 0).sum())
    partial = WIDE * num_slots * 2 * ROWS_PER_BLOCK * kv_heads * head_dim
    product = 2 * head_dim * heads * num_pairs(until_T)
    queries = HALF * rows * heads * head_dim
    keys = HALF * rows * kv_heads * head_dim
    sums = WIDE * rows * heads
    # FLOPs are what the kernels do: the backward computes scores again in both of its kernels.
    tree = f"prompt of {PROMPT}, {ANSWERS} answers of {ANSWER}"
    return {
        "_tree_attention_kernel": Work(tree, 2 * queries + 2 * keys + sums, 2 * product),
        "_tree_grad_q_kernel": Work(tree, 4 * queries + 2 * keys + 2 * sums, 3 * product),
        "_tree_grad_kv_kernel": Work(
            tree, 2 * queries + 4 * keys + 2 * sums + partial, 4 * product
        ),
        "_tree_sum_kernel": Work(f"{tree}: {num_slots} partial sums", partial),
    }


def others(config: ModelConfig) -> dict[str, Work]:
    """Returns the optimizer step of the widest matrix, and the credit of a batch."""
    numbers = 2 * config.intermediate_size * config.hidden_size
    # Parameter, low half and both moments are read and written, the gradient is read.
    step_bytes = (2 * (HALF + HALF + 2 * WIDE) + WIDE) * numbers
    return {
        "_adamw_kernel": Work(f"gate_up of one layer, {numbers / 1e6:.1f}e6 numbers", step_bytes),
        "_decay_advantage_kernel": Work(f"{ATTEMPTS} attempts", (4 * 8 + 3 * WIDE) * ATTEMPTS),
    }
