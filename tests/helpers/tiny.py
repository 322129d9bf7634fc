"""A student small enough for thousands of steps, and `untouched`: what an attempt must be, whatever
happens to it.
"""

from __future__ import annotations

import torch

from socpo_fast.engine import Engine
from socpo_fast.engine.runner import Runner
from socpo_fast.engine.sequence import Sequence
from socpo_fast.model import Decoder, ModelConfig
from socpo_fast.types import Attempt, RolloutKey, SamplingParams

VOCAB = 37
POSITIONS = 128


def make_student(seed: int = 0, *, num_layers: int = 2) -> Decoder:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )
    torch.manual_seed(seed)
    student = Decoder(config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.5 if parameter.ndim > 1 else 1.0)
    return student


def make_engine(
    student: Decoder, *, num_pages: int = 200, page_size: int = 4, **options: int
) -> Engine:
    gib = (num_pages + 0.5) * Runner.page_bytes(student, page_size) / 2**30
    return Engine(student, kv_cache_gib=gib, page_size=page_size, **options)


def keys_of(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """(0, q) of each: the same draws in every engine, whatever was drawn before."""
    return [(0, q) for q in range(len(prompts))]


def generate_same(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, **options: bool
) -> list[list[Attempt]]:
    """Engine.generate under the prompts' own keys: every call draws the same tokens."""
    return engine.generate(prompts, params, keys=keys_of(prompts), **options)


def drain(engine: Engine) -> list[Attempt]:
    """Step until idle; everything that finished, in order of (key, rollout_idx, attempt_idx)."""
    finished = []
    while engine.has_work:
        finished += engine.step()
    return sorted(finished, key=lambda a: (a.key, a.rollout_idx, a.attempt_idx))


def kept(context: list[int], attempt: Attempt, cut: int | None = None) -> int:
    """The length of the row's prefix that stays: cut tokens of the attempt, None all, -m none and m
    fewer before it.
    """
    return len(context) + (attempt.num_tokens if cut is None else cut)


def bits(attempt: Attempt) -> tuple:
    """Everything of an attempt that must not differ in a single bit."""
    return (
        attempt.token_ids,
        attempt.logprobs.tolist(),
        attempt.kept_mass.tolist(),
        attempt.finish_reason,
    )


def untouched(
    student: Decoder,
    context: list[int],
    params: SamplingParams,
    *,
    key: tuple[int, int] = (0, 0),
    rollout_idx: int = 0,
    attempt_idx: int = 0,
    sampled: list[int] | None = None,
    max_sampled: int | None = None,
) -> tuple:
    """`bits` of the same attempt by an engine of its own: alone, prefilled whole, nothing forked,
    shared or preempted.

    sampled: what was sampled already (under other weights, say); max_sampled: stop after that many
    in all.
    """
    engine = make_engine(student)
    sequence = Sequence(
        key=RolloutKey(*key),
        params=params,
        token_ids=[*context, *(sampled or [])],
        attempt_start=len(context),
        priority=(1, 0),
        rollout_idx=rollout_idx,
        attempt_idx=attempt_idx,
    )
    engine._scheduler.enqueue(sequence)
    while engine.has_work and sequence.num_sampled != max_sampled:
        engine.step()
    attempt = sequence.attempt()
    reason = attempt.finish_reason if attempt else None
    new = sequence.token_ids[len(context) + len(sampled or []) :]
    floats = (
        torch.tensor(values, dtype=torch.float32).tolist()
        for values in (sequence.logprobs, sequence.kept_mass)
    )
    return new, *floats, reason
