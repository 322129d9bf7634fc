"""Makes engines, students and prompts, and compares what two engines generate.

The sampler's noise is counter-based. So two engines with the same weights draw the same tokens up
to rounding: they may differ only where the two best scores are a near tie. Read compare_engines,
then same_attempt.
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
NEAR_TIE = 1e-2  # a lead smaller than this can be reversed by rounding
PAGE_SIZE = 16
NEW_TOKENS = 48
TINY_NEW_TOKENS = 12
PROMPTS = ((3, 37), (1, 70))  # (number of prompts, their tokens)
SUFFIX = 9  # tokens of guidance before a second attempt


def make_student(check: Check, model: str, device: torch.device | str) -> Decoder:
    """Returns a student with the same weights on every device: made on the CPU, in fp32."""
    config = MODELS["tiny" if check.tiny else model]
    return make_model(config, device="cpu", dtype=torch.float32).to(device)


def make_engine(student: Decoder, *, num_pages: int = 400, **options: int) -> Engine:
    """Returns an engine with so many pages."""
    # Half a page more, so that rounding does not lose a page.
    gib = (num_pages + 0.5) * Runner.page_bytes(student, PAGE_SIZE) / 2**30
    return Engine(student, kv_cache_gib=gib, page_size=PAGE_SIZE, **options)


def prompts_of(student: Decoder, count: int, length: int) -> list[list[int]]:
    """Returns random prompts, the same ones in every call."""
    generator = torch.Generator().manual_seed(length)
    vocab_size = student.config.vocab_size
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def params_of(check: Check, **changes: Any) -> SamplingParams:
    new_tokens = TINY_NEW_TOKENS if check.tiny else NEW_TOKENS
    usual = {"temperature": 1.0, "max_new_tokens": new_tokens, "n": 4, "eos_ids": ()}
    return SamplingParams(**usual | {"ignore_eos": True, "seed": 3} | changes)


def drain(engine: Engine) -> list[Attempt]:
    """Runs an engine until it has no work; returns the attempts in the order of their rollouts."""
    finished: list[Attempt] = []
    while engine.has_work:
        finished += engine.step()
    return sorted(finished, key=lambda a: (a.key, a.rollout_idx))


def exact(groups: list[list[Attempt]]) -> list[tuple[list[int], list[float]]]:
    """Returns tokens and log-probs, for bitwise comparison."""
    return [(attempt.token_ids, attempt.logprobs.tolist()) for group in groups for attempt in group]


def logits_of(student: Decoder, token_ids_T: torch.Tensor, num_last: int = 0) -> torch.Tensor:
    """Returns the logits of a plain forward in fp64: [T, V], or the last rows only."""
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
    """Returns by how much the best score (logit + noise) leads the next one, by a plain forward."""
    scores = logits_of(student, torch.tensor(context), num_last=1)[0]
    if params.temperature > 0:
        key = row_key(params.seed, *attempt.key, attempt.rollout_idx, attempt.attempt_idx, position)
        # Gumbel noise from 32 uniform bits, in fp64, as ops/sample.py defines it.
        uniform = (noise_bits(torch.tensor([key]), len(scores))[0].double() + 0.5) * 2.0**-32
        noise = -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
        scores = scores / params.temperature + noise
    first, second = scores.topk(2).values.tolist()
    return first - second


def same_attempt(
    student: Decoder, context: list[int], params: SamplingParams, ours: Attempt, theirs: Attempt
) -> tuple[bool, float]:
    """Returns (whether all tokens are equal, largest log-prob difference up to the first other).

    Asserts that tokens differ only at a near tie, and log-probs by no more than rounding.
    """
    pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
    num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    difference = 0.0
    if num_equal:
        difference = float((ours.logprobs[:num_equal] - theirs.logprobs[:num_equal]).abs().max())
    attempt_name = (
        f"question {ours.key.question}, rollout {ours.rollout_idx}, attempt {ours.attempt_idx}"
    )
    # Log-probs are compared up to the first different token: after it contexts differ.
    assert difference <= MAX_NATS, f"{attempt_name}: log-probs differ by {difference:.3g} nats"
    if num_equal < len(pairs):
        tie = lead(student, context + theirs.token_ids[:num_equal], params, theirs, num_equal)
        assert tie < NEAR_TIE, (
            f"{attempt_name}: token {num_equal} differs, though it leads by {tie:.3g}"
        )
        return False, difference
    counts = ours.num_tokens, theirs.num_tokens
    assert counts[0] == counts[1], f"{attempt_name}: {counts[0]} tokens and {counts[1]}"
    return True, difference


def compare_engines(check: Check, ours: Engine, theirs: Engine, *, of: str) -> None:
    """Compares groups and second attempts; the student of `theirs` decides what is a near tie."""
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
        attempts = [
            [attempt for group in engine_groups for attempt in group] for engine_groups in groups
        ]
        for attempt_idx in range(2):
            equal = []
            differences = [0.0]
            for a, b in zip(*attempts, strict=True):
                is_equal, difference = same_attempt(
                    theirs.student, contexts[b.key, b.rollout_idx], params, a, b
                )
                equal += [(a, b)] if is_equal else []
                differences.append(difference)
            num_equal = num_equal + len(equal)
            num_all = num_all + len(attempts[0])
            worst = max(worst, *differences)
            # Pairs that already differ have different contexts, so only equal ones are resumed.
            if attempt_idx == 0:
                resume_both(ours, theirs, equal, contexts, prompts[0][:SUFFIX], params)
                attempts = [drain(engine) for engine in (ours, theirs)]
        for engine in (ours, theirs):
            engine.release(list(engine.scheduler.pinned))
            # Everything was released, so every page must be free again.
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
    """Resumes both engines with guidance, after the first half of each equal first attempt."""
    for a, b in pairs:
        context = contexts[b.key, b.rollout_idx]
        kept_tokens = len(context) + params.max_new_tokens // 2
        ours.resume(a, suffix_ids, params, kept_tokens=kept_tokens)
        theirs.resume(b, suffix_ids, params, kept_tokens=kept_tokens)
        row = context + b.token_ids
        contexts[b.key, b.rollout_idx] = row[:kept_tokens] + suffix_ids


def launch_rounds(engine: Engine) -> None:
    """Turns graphs off: the same rounds, with the same padding, are launched kernel by kernel."""
    loop = engine.steps.loop
    assert loop is not None
    # The loop asks for a graph and replays it; this "graph" runs the round itself.
    loop.graph_for = lambda *size: SimpleNamespace(replay=lambda: loop.run_round(*size))
