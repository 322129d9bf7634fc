"""Engines to compare: students, prompts, and when two engines count as having said the same.

Tokens are those of counter-based noise, so two engines with the same weights draw the same ones up
to rounding: they may part only where two scores are a near tie.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from socpo_fast import Engine, SamplingParams
from socpo_fast.engine.runner import Runner
from socpo_fast.model import Decoder, packed_forward
from socpo_fast.ops import row_key, visible_until_of_sequences
from socpo_fast.ops.sample import noise_bits
from socpo_fast.types import Attempt
from tests.helpers.tiny import generate_same
from tools.gpu_check.check import Check
from tools.gpu_check.models import MODELS, make_model

MAX_NATS = 1e-3  # between a card's log-probs and a CPU's, both fp32
NEAR_TIE = 1e-2  # a lead below it may change hands by rounding
PAGE_SIZE = 16
NEW_TOKENS = 48
TINY_NEW_TOKENS = 12
PROMPTS = ((3, 37), (1, 70))  # how many of which length
SUFFIX = 9  # tokens of guidance before a second attempt


def make_student(check: Check, model: str, device: torch.device | str) -> Decoder:
    """The same weights on every device: made on the CPU, in fp32."""
    config = MODELS["tiny" if check.tiny else model]
    return make_model(config, device="cpu", dtype=torch.float32).to(device)


def make_engine(student: Decoder, *, num_pages: int = 400, **options: int) -> Engine:
    gib = (num_pages + 0.5) * Runner.page_bytes(student, PAGE_SIZE) / 2**30
    return Engine(student, kv_cache_gib=gib, page_size=PAGE_SIZE, **options)


def prompts_of(student: Decoder, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    vocab_size = student.config.vocab_size
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def params_of(check: Check, **changes: Any) -> SamplingParams:
    new_tokens = TINY_NEW_TOKENS if check.tiny else NEW_TOKENS
    usual = {"temperature": 1.0, "max_new_tokens": new_tokens, "n": 4, "eos_ids": ()}
    return SamplingParams(**usual | {"ignore_eos": True, "seed": 3} | changes)


def drain(engine: Engine) -> list[Attempt]:
    finished: list[Attempt] = []
    while engine.has_work:
        finished += engine.step()
    return sorted(finished, key=lambda a: (a.key, a.rollout_idx))


def exact(groups: list[list[Attempt]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs, for comparing bits."""
    return [(attempt.token_ids, attempt.logprobs.tolist()) for group in groups for attempt in group]


def logits_of(student: Decoder, token_ids_T: torch.Tensor, num_last: int = 0) -> torch.Tensor:
    """[T, V], or of the last rows only, by a plain forward; fp64."""
    weight = student.lm_head.weight
    device = token_ids_T.device
    positions_T = torch.arange(len(token_ids_T), device=device)
    until_T = visible_until_of_sequences([len(token_ids_T)])
    with torch.no_grad():
        hidden = packed_forward(student, token_ids_T, positions_T, until_T)[-num_last:]
        return (hidden @ weight.T).double()


def lead(
    student: Decoder,
    context: list[int],
    params: SamplingParams,
    attempt: Attempt,
    position: int,
) -> float:
    """By how much the drawn token's score (logit + noise) beats the next, by a plain forward."""
    scores = logits_of(student, torch.tensor(context), num_last=1)[0]
    if params.temperature > 0:
        key = row_key(params.seed, *attempt.key, attempt.rollout_idx, attempt.attempt_idx, position)
        v = (noise_bits(torch.tensor([key]), len(scores))[0].double() + 0.5) * 2.0**-32
        noise = -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))
        scores = scores / params.temperature + noise
    first, second = scores.topk(2).values.tolist()
    return first - second


def same_attempt(
    student: Decoder, context: list[int], params: SamplingParams, ours: Attempt, theirs: Attempt
) -> tuple[bool, float]:
    """(All tokens equal, largest difference of log-probs up to there); may part at a near tie."""
    pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    difference = 0.0
    if equal:
        difference = float((ours.logprobs[:equal] - theirs.logprobs[:equal]).abs().max())
    where = f"question {ours.key.question}, rollout {ours.rollout_idx}, attempt {ours.attempt_idx}"
    assert difference <= MAX_NATS, f"{where}: log-probs differ by {difference:.3g} nats"
    if equal < len(pairs):
        tie = lead(student, context + theirs.token_ids[:equal], params, theirs, equal)
        assert tie < NEAR_TIE, f"{where}: token {equal} differs, though it leads by {tie:.3g}"
        return False, difference
    counts = ours.num_tokens, theirs.num_tokens
    assert counts[0] == counts[1], f"{where}: {counts[0]} tokens and {counts[1]}"
    return True, difference


def compare_engines(check: Check, ours: Engine, theirs: Engine, *, of: str) -> None:
    """Groups and second attempts of two engines; the student of `theirs` judges near ties."""
    prompts = [p for count, length in PROMPTS for p in prompts_of(theirs.student, count, length)]
    num_equal = num_all = 0
    worst = 0.0
    settings: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.0, "n": 1}, {"temperature": 0.7})
    for changes in settings:
        params = params_of(check, **changes)
        groups = [generate_same(engine, prompts, params, keep=True) for engine in (ours, theirs)]
        contexts = {
            (attempt.key, attempt.rollout_idx): prompt
            for prompt, group in zip(prompts, groups[1], strict=True)
            for attempt in group
        }
        first = [[attempt for group in found for attempt in group] for found in groups]
        for attempt_idx in range(2):
            equal = []
            differences = [0.0]
            for a, b in zip(*first, strict=True):
                is_equal, difference = same_attempt(
                    theirs.student, contexts[b.key, b.rollout_idx], params, a, b
                )
                equal += [(a, b)] if is_equal else []
                differences.append(difference)
            num_equal = num_equal + len(equal)
            num_all = num_all + len(first[0])
            worst = max(worst, *differences)
            if attempt_idx == 0:
                resume_both(ours, theirs, equal, contexts, prompts[0][:SUFFIX], params)
                first = [drain(engine) for engine in (ours, theirs)]
        for engine in (ours, theirs):
            engine.release(list(engine._scheduler.pinned))
            assert engine.stats.pages_free == engine.stats.pages_total, "pages leaked"
    check.figure("engine.equal_attempts", num_equal / num_all, of=of)
    check.figure("engine.max_nats", worst, of=of)
    assert num_equal >= 0.9 * num_all, f"only {num_equal} of {num_all} attempts are equal"


def resume_both(
    ours: Engine,
    theirs: Engine,
    pairs: list[tuple[Attempt, Attempt]],
    contexts: dict[Any, list[int]],
    suffix_ids: list[int],
    params: SamplingParams,
) -> None:
    """Second attempts behind the first half of equal first ones."""
    for a, b in pairs:
        context = contexts[b.key, b.rollout_idx]
        kept_tokens = len(context) + params.max_new_tokens // 2
        ours.resume(a, suffix_ids, params, kept_tokens=kept_tokens)
        theirs.resume(b, suffix_ids, params, kept_tokens=kept_tokens)
        row = context + b.token_ids
        contexts[b.key, b.rollout_idx] = row[:kept_tokens] + suffix_ids


def launch_rounds(engine: Engine) -> None:
    """No graphs: the same rounds, padded alike, launched op by op."""
    loop = engine._steps.loop
    assert loop is not None
    loop._graph = lambda *size: SimpleNamespace(replay=lambda: loop._round(*size))
