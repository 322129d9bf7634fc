"""The least time that a batch takes on a card: bytes over bandwidth, FLOPs over the rate of GEMMs.

A limit and no forecast: real kernels reach a part of it. Rounds of attempts follow each other here,
while the engine lets them overlap, and all answers are equally long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from socpo_fast.config import LocalTeacherConfig
from socpo_fast.report import sizes
from socpo_fast.report.cards import GIB
from socpo_fast.report.memory_plan import ITEMSIZES, Plan

if TYPE_CHECKING:
    from socpo_fast.model import ModelConfig

TEACHER_PROMPT_TOKENS = 200  # of its instructions, beside question and attempt
TEACHER_RUNNING = 256  # at once, of its engine
RESUMED = 0.5  # of the rollouts that made an attempt, those that make the next one
# Numbers that elementwise kernels read and write a token and layer, forward and backward: of the
# residual stream, of raw qkv, and of one half of gate_up.
STREAM_PASSES = 20
QKV_PASSES = 6
SWIGLU_PASSES = 9
# Of a parameter: gradient twice, master and moments read and written; and for each microbatch the
# sum of gradients read and written.
ADAMW_BYTES = 32
SUM_BYTES = 8


class Spans(NamedTuple):
    """So many texts of one length, each behind a context."""

    num_texts: float
    context: int
    length: int

    @property
    def tokens(self) -> float:
        return self.num_texts * self.length

    @property
    def pairs(self) -> float:
        """Tokens and those that each of them sees."""
        return self.tokens * (self.context + self.length / 2)


def batch_seconds(plan: Plan, *, prompt: int, answer: int, guidance: int) -> dict[str, float]:
    """Seconds of each phase of a batch, at least, on a card whose rates are known.

    Args:
        prompt, answer, guidance: tokens of ordinary ones.
    """
    rollout = plan.config.rollout
    positions = plan.model.max_position_embeddings
    num_rollouts = rollout.questions_per_batch * rollout.group_size
    # Of an attempt the next one sees attempt_limit tokens; behind the model's positions there is
    # none.
    seen = min(answer, rollout.attempt_limit) + guidance
    contexts = [prompt + k * seen for k in range(rollout.max_attempts)]
    attempts = [
        Spans(num_rollouts * RESUMED**k, context, min(answer, positions - context))
        for k, context in enumerate(contexts)
        if context < positions
    ]
    # Guidance stands before the attempt that sees it.
    seams = [Spans(x.num_texts, x.context - guidance, guidance) for x in attempts[1:]]
    prompts = Spans(rollout.questions_per_batch, 0, prompt)
    seconds = rollout_seconds(plan, prompts, attempts, seams)
    if plan.is_training:
        seconds |= update_seconds(plan, attempts, [prompts, *attempts, *seams])
    return seconds


def flops_a_second(plan: Plan, itemsize: int) -> float:
    return 1e12 * (plan.card.fp32_tflop_s if itemsize == 4 else plan.card.bf16_tflop_s)


def rollout_seconds(
    plan: Plan, prompts: Spans, attempts: list[Spans], seams: list[Spans]
) -> dict[str, float]:
    """Decode, prefill and a local teacher's both: memory bounds all of it, so they add up."""
    model = plan.model
    itemsize = plan.itemsize
    byte_s = 1e12 * plan.card.tb_s
    capacity = plan.config.engine.max_running, plan.kv_pages * plan.config.engine.page_size
    decode = sum(decode_bytes(model, itemsize, x, *capacity) for x in attempts)
    # A prompt is read once for the rollouts of its group.
    shared = sum(
        max(x.num_texts - prompts.num_texts, 0) * x.length * prompts.length for x in attempts
    )
    read = prompts.tokens + sum(x.tokens for x in seams)
    seconds = {
        "rollouts: decode": (decode - shared * sizes.kv_bytes(model, itemsize)) / byte_s,
        "rollouts: prefill": 2
        * sizes.layer_parameters(model)
        * read
        / flops_a_second(plan, itemsize),
    }
    teacher = plan.config.teacher
    if plan.teacher is not None and seams and isinstance(teacher, LocalTeacherConfig):
        itemsize = ITEMSIZES[teacher.dtype]
        room = int(teacher.kv_cache_gib * GIB) // sizes.kv_bytes(plan.teacher, itemsize)
        seen = min(attempts[0].length, plan.config.rollout.attempt_limit)
        seen += prompts.length + TEACHER_PROMPT_TOKENS
        asked = Spans(
            sum(x.num_texts for x in seams), seen, min(seams[0].length, teacher.max_new_tokens)
        )
        decode = decode_bytes(plan.teacher, itemsize, asked, TEACHER_RUNNING, room)
        flops = 2 * sizes.layer_parameters(plan.teacher) * asked.num_texts * seen
        seconds["rollouts: local teacher"] = decode / byte_s + flops / flops_a_second(
            plan, itemsize
        )
    return seconds


def decode_bytes(
    model: ModelConfig, itemsize: int, texts: Spans, max_running: int, room: int
) -> float:
    """Weights once a step, and at each step the keys and values of what was there before."""
    mean_length = texts.context + texts.length / 2
    at_once = min(max_running, texts.num_texts, max(room / mean_length, 1))
    weights = itemsize * (sizes.layer_parameters(model) + sizes.head_parameters(model))
    return texts.tokens / at_once * weights + texts.pairs * sizes.kv_bytes(model, itemsize)


def update_seconds(plan: Plan, attempts: list[Spans], tree: list[Spans]) -> dict[str, float]:
    """Log-probs that are computed before the updates, and the updates of all epochs."""
    config = plan.config
    model = plan.model
    epochs = plan.config.train.epochs
    byte_s = 1e12 * plan.card.tb_s
    flop_s = flops_a_second(plan, plan.itemsize)
    num_tokens = sum(x.tokens for x in tree)
    layers = 2 * num_tokens * sizes.layer_parameters(model)
    head = 2 * sum(x.tokens for x in attempts) * sizes.head_parameters(model)
    attention = 2 * sum(x.pairs for x in tree) * model.num_layers * model.num_heads * model.head_dim
    forward = layers + head + 2 * attention
    # Attention has seven products: two of the forward, five of the backward.
    update = 3 * layers + 3 * head + 7 * attention
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
    """Counts forward passes before the updates: old log-probs (train/update.py), the reference."""
    loss = plan.config.loss
    num_questions = plan.config.rollout.questions_per_batch
    # auto: in fp32 the first question, to measure the mismatch; in bf16 all but the first update's,
    # which a second epoch meets again.
    in_bf16 = 1.0 if plan.config.train.epochs > 1 else 1 - 1 / num_updates
    by_choice = {
        "sampler": 0.0,
        "recompute": 1.0,
        "auto": 1 / num_questions if plan.itemsize == 4 else in_bf16,
    }
    return by_choice[loss.old_logprobs] + (loss.kl_coef > 0)
