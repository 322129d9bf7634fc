"""Computes the least time that a batch takes on a card: bytes / bandwidth, FLOPs / GEMM rate.

This is a lower limit, not a forecast: real kernels reach only a part of these rates. The model is
simpler than the engine in two ways: all first attempts end before any second one begins (the engine
overlaps them), and all answers have the same length. Read batch_seconds, then rollout_seconds and
update_seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from socpo_fast.config import LocalTeacherConfig
from socpo_fast.report import sizes
from socpo_fast.report.cards import GIB
from socpo_fast.report.memory_plan import ITEMSIZES, Plan

if TYPE_CHECKING:
    from socpo_fast.model import ModelConfig

TEACHER_PROMPT_TOKENS = 200  # the teacher's instructions, without question and attempt
TEACHER_RUNNING = 256  # rollouts that a local teacher's engine decodes at once
RESUMED = 0.5  # share of the rollouts with attempt k that go on to attempt k + 1
# Elementwise kernels are bound by memory, so their time is the number of times that they read or
# write each tensor. Counted per token and layer, forward and backward together: passes over the
# residual stream (hidden_size wide), over raw qkv, and over one half of gate_up.
STREAM_PASSES = 20
QKV_PASSES = 6
SWIGLU_PASSES = 9
# Bytes of traffic a parameter. AdamW reads the fp32 gradient twice (once for the norm) and reads
# and writes master weight and both moments. Each microbatch reads and writes the gradient sum.
ADAMW_BYTES = 32
SUM_BYTES = 8


class Spans(NamedTuple):
    """A number of equally long texts, each behind a context of `context` tokens."""

    num_texts: float
    context: int
    length: int

    @property
    def tokens(self) -> float:
        """Returns the tokens of all texts, without their contexts."""
        return self.num_texts * self.length

    @property
    def pairs(self) -> float:
        """Returns the number of (query, key) pairs under a causal mask."""
        return self.tokens * (self.context + self.length / 2)


def batch_seconds(plan: Plan, *, prompt: int, answer: int, guidance: int) -> dict[str, float]:
    """Returns the least seconds of each phase of a batch, for a card whose rates are known.

    Args:
        prompt, answer, guidance: their typical lengths in tokens.
    """
    rollout = plan.config.rollout
    positions = plan.model.max_position_embeddings
    num_rollouts = rollout.questions_per_batch * rollout.group_size
    # The next attempt sees at most attempt_limit tokens of this one, and then the guidance. An
    # attempt whose context would exceed the model's positions is never made.
    #
    #   prompt | attempt 0 (cut) | guidance | attempt 1 (cut) | guidance | attempt 2 ..
    #            \----- seen_tokens ------/
    seen_tokens = min(answer, rollout.attempt_limit) + guidance
    contexts = [prompt + k * seen_tokens for k in range(rollout.max_attempts)]
    attempts = [
        Spans(num_rollouts * RESUMED**k, context, min(answer, positions - context))
        for k, context in enumerate(contexts)
        if context < positions
    ]
    # A seam is the guidance between two attempts; it ends where the next attempt begins.
    seams = [Spans(x.num_texts, x.context - guidance, guidance) for x in attempts[1:]]
    prompts = Spans(rollout.questions_per_batch, 0, prompt)
    seconds = rollout_seconds(plan, prompts, attempts, seams)
    if plan.is_training:
        seconds |= update_seconds(plan, attempts, [prompts, *attempts, *seams])
    return seconds


def flops_a_second(plan: Plan, itemsize: int) -> float:
    """Returns the card's GEMM rate for fp32 (itemsize 4) or bf16 factors."""
    return 1e12 * (plan.card.fp32_tflop_s if itemsize == 4 else plan.card.bf16_tflop_s)


def rollout_seconds(
    plan: Plan, prompts: Spans, attempts: list[Spans], seams: list[Spans]
) -> dict[str, float]:
    """Returns seconds of decode, of prefill, and of a local teacher.

    They add up, even where they run at the same time: all of them need the memory bus.
    """
    model = plan.model
    itemsize = plan.itemsize
    byte_s = 1e12 * plan.card.tb_s
    # Rollouts that run at once are limited by max_running and by the tokens that KV pages hold.
    capacity = plan.config.engine.max_running, plan.kv_pages * plan.config.engine.page_size
    decode = sum(decode_bytes(model, itemsize, x, *capacity) for x in attempts)
    # decode_bytes counts the prompt's KV once for every rollout. Cascade attention reads it once
    # for the whole group, so the reads of all rollouts but one a question are taken off again.
    num_shared_reads = sum(
        max(x.num_texts - prompts.num_texts, 0) * x.length * prompts.length for x in attempts
    )
    num_prefilled = prompts.tokens + sum(x.tokens for x in seams)
    seconds = {
        "rollouts: decode": (decode - num_shared_reads * sizes.kv_bytes(model, itemsize)) / byte_s,
        "rollouts: prefill": 2
        * sizes.layer_parameters(model)
        * num_prefilled
        / flops_a_second(plan, itemsize),
    }
    teacher = plan.config.teacher
    if plan.teacher is not None and seams and isinstance(teacher, LocalTeacherConfig):
        itemsize = ITEMSIZES[teacher.dtype]
        num_kv_tokens = int(teacher.kv_cache_gib * GIB) // sizes.kv_bytes(plan.teacher, itemsize)
        # The teacher's prompt: its instructions, the question, and the attempt that was wrong.
        prompt = min(attempts[0].length, plan.config.rollout.attempt_limit)
        prompt += prompts.length + TEACHER_PROMPT_TOKENS
        requests = Spans(
            sum(x.num_texts for x in seams), prompt, min(seams[0].length, teacher.max_new_tokens)
        )
        decode = decode_bytes(plan.teacher, itemsize, requests, TEACHER_RUNNING, num_kv_tokens)
        flops = 2 * sizes.layer_parameters(plan.teacher) * requests.num_texts * prompt
        seconds["rollouts: local teacher"] = decode / byte_s + flops / flops_a_second(
            plan, itemsize
        )
    return seconds


def decode_bytes(
    model: ModelConfig, itemsize: int, texts: Spans, max_running: int, room: int
) -> float:
    """Returns the bytes that decoding reads: all weights once a step, and every token's context KV.

    Args:
        room: tokens that the KV cache holds, which limits how many rollouts run at once.
    """
    mean_length = texts.context + texts.length / 2
    at_once = min(max_running, texts.num_texts, max(room / mean_length, 1))
    weights = itemsize * (sizes.layer_parameters(model) + sizes.head_parameters(model))
    return texts.tokens / at_once * weights + texts.pairs * sizes.kv_bytes(model, itemsize)


def update_seconds(plan: Plan, attempts: list[Spans], tree: list[Spans]) -> dict[str, float]:
    """Returns seconds of the log-probs before the updates, and of the updates of all epochs."""
    config = plan.config
    model = plan.model
    epochs = plan.config.train.epochs
    byte_s = 1e12 * plan.card.tb_s
    flop_s = flops_a_second(plan, plan.itemsize)
    num_tokens = sum(x.tokens for x in tree)
    layers = 2 * num_tokens * sizes.layer_parameters(model)
    lm_head = 2 * sum(x.tokens for x in attempts) * sizes.head_parameters(model)
    attention = 2 * sum(x.pairs for x in tree) * model.num_layers * model.num_heads * model.head_dim
    forward = layers + lm_head + 2 * attention
    # Attention has seven products: two in the forward, five in the backward (which computes the
    # scores again). A linear has three of equal cost: y, dx and dW.
    update = 3 * layers + 3 * lm_head + 7 * attention
    # With checkpointing the layers' forward runs a second time during the backward.
    update += (layers + 2 * attention) * bool(config.train.checkpointing)
    passes = STREAM_PASSES * model.hidden_size + QKV_PASSES * sizes.qkv_width(model)
    passes += SWIGLU_PASSES * model.intermediate_size
    traffic = num_tokens * model.num_layers * passes * plan.itemsize
    num_updates = config.rollout.questions_per_batch / config.train.questions_per_update
    optimizer = ADAMW_BYTES * num_updates + SUM_BYTES * max(
        num_tokens / plan.num_tokens, num_updates
    )
    optimizer *= sizes.num_parameters(model)
    return {
        "log-probs before": forward * num_forwards(plan, num_updates) / flop_s,
        "updates: products": epochs * update / flop_s,
        "updates: elementwise": epochs * traffic / byte_s,
        "updates: optimizer, sums of gradients": epochs * optimizer / byte_s,
    }


def num_forwards(plan: Plan, num_updates: float) -> float:
    """Returns forward passes a token before the updates: for old log-probs and the reference."""
    loss = plan.config.loss
    num_questions = plan.config.rollout.questions_per_batch
    # What "auto" does (training/update.py): in fp32 it computes log-probs of the first question
    # only, to measure the mismatch with the sampler. In bf16 it computes all but those of the first
    # update, which come out of that update itself, unless a second epoch needs them again.
    in_bf16 = 1.0 if plan.config.train.epochs > 1 else 1 - 1 / num_updates
    by_choice = {
        "sampler": 0.0,
        "recompute": 1.0,
        "auto": 1 / num_questions if plan.itemsize == 4 else in_bf16,
    }
    return by_choice[loss.old_logprobs] + (loss.kl_coef > 0)
