"""Makes a student small enough for thousands of steps, and engines for it.

`expected_attempt` computes what an attempt must be, whatever else happens in its engine.
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
    """Returns a tiny Llama with random weights."""
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
    """Returns an engine whose cache has exactly num_pages pages."""
    # Half a page more, so that rounding cannot lose one.
    gib = (num_pages + 0.5) * Runner.page_bytes(student, page_size) / 2**30
    return Engine(student, kv_cache_gib=gib, page_size=page_size, **options)


def keys_of(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Returns the key (0, q) for each prompt.

    With these, every engine draws the same tokens, whatever it drew earlier.
    """
    return [(0, q) for q in range(len(prompts))]


def generate_same(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, **options: bool
) -> list[list[Attempt]]:
    """Generates under keys_of(prompts), so that every call draws the same tokens."""
    return engine.generate(prompts, params, keys=keys_of(prompts), **options)


def drain(engine: Engine) -> list[Attempt]:
    """Steps until the engine is idle; returns all finished attempts.

    They are in order of (key, rollout_idx, attempt_idx).
    """
    finished = []
    while engine.has_work:
        finished += engine.step()
    return sorted(finished, key=lambda a: (a.key, a.rollout_idx, a.attempt_idx))


def kept(context: list[int], attempt: Attempt, cut: int | None = None) -> int:
    """Returns the length of the prefix that stays when an attempt is resumed.

    cut is the number of the attempt's tokens that stay. None: all. -m: none, and the last m tokens
    of the context go too.
    """
    return len(context) + (attempt.num_tokens if cut is None else cut)


def bits(attempt: Attempt) -> tuple:
    """Returns everything of an attempt that must be bitwise equal."""
    return (
        attempt.token_ids,
        attempt.logprobs.tolist(),
        attempt.kept_mass.tolist(),
        attempt.finish_reason,
    )


def expected_attempt(
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
    """Returns `bits` of the same attempt from an engine of its own.

    There it is alone, prefilled at once, and nothing is forked, shared or preempted. `sampled` are
    tokens that were sampled already, under other weights for example. With max_sampled the attempt
    stops at that many tokens in all.
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
    engine.scheduler.enqueue(sequence)
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
