"""Our engine in bench_rollout, through its public interface only: runs, the check before timing, parts of a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

from bench import _card as card_of
from bench._rollout_cases import Case, Work, prefilled_tokens
from socpo_fast.engine import Engine
from socpo_fast.model.decoder import Decoder
from socpo_fast.types import Attempt, SamplingParams

# Largest difference of a sampled token's log-prob from a transformers forward, by how weights and pages are stored.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
PARTS = {
    "linears": ("socpo::linear", "aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("socpo::paged_attention",),
    "KV write, rotary": ("socpo::rotary_write",),
    "norms": ("socpo::rms_norm",),
    "swiglu": ("socpo::swiglu",),
    "head and draw": ("socpo::linear_sample",),
}
OTHER_OPS, PYTHON = "other ops", "Python, scheduler"


@dataclass
class Ours:
    """One engine, kept over runs as a trainer keeps it."""

    engine: Engine

    @classmethod
    def of(cls, student: Decoder, case: Case, *, page_size: int = 32, **options: Any) -> Ours:
        config, weight = student.config, student.lm_head.weight
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * weight.element_size()
        num_tokens = (case.num_first + 1) * (case.longest + 2 * page_size)  # all of it, as if nothing were shared
        gib = num_tokens * per_token / 2**30
        return cls(Engine(student, kv_cache_gib=gib, page_size=page_size, **options))

    def rollouts(self, work: Work) -> list[list[Attempt]]:
        """First attempts, question by question, and the second ones behind every second of them."""
        case = work.case
        params = SamplingParams(
            temperature=1.0, max_new_tokens=case.new, eos_ids=(), n=case.rollouts, ignore_eos=True, seed=work.seed
        )
        groups = self.engine.generate(work.prompts, params, keep=bool(case.guidance))
        first = [attempt for group in groups for attempt in group]
        second: list[Attempt] = []
        if case.guidance:
            for attempt, suffix in zip(first[::2], work.suffixes, strict=True):
                kept_tokens = case.prompt + attempt.num_tokens
                self.engine.resume(attempt, suffix, replace(params, n=1), kept_tokens=kept_tokens)
            while self.engine.has_work:
                second += self.engine.step()
            second.sort(key=lambda attempt: (attempt.key, attempt.rollout_idx))
        self.engine.release(first + second)
        return [first, second]

    def prefill(self, work: Work) -> None:
        """The prompts only: one token of each rollout."""
        self.rollouts(replace(work, case=replace(work.case, new=1, guidance=0), suffixes=[]))


def check(ours: Ours, work: Work, folder: str) -> dict[str, Any]:
    """The same tokens and log-probs twice, and log-probs as a transformers forward has them; else RuntimeError."""
    with counted_rows(ours.engine.student.layers[0]) as counts:
        first = ours.rollouts(work)
    again, seconds = card_of.timed(lambda: ours.rollouts(work))
    pairs = [pair for rounds in zip(first, again, strict=True) for pair in zip(*rounds, strict=True)]
    if not all(a.token_ids == b.token_ids and torch.equal(a.logprobs, b.logprobs) for a, b in pairs):
        raise RuntimeError(f"bench: {work.case.name} must draw the same tokens twice, got other ones; test the engine")
    if {len(a.token_ids) for a, _ in pairs} != {work.case.new} or len(pairs) != work.case.generated // work.case.new:
        raise RuntimeError(f"bench: {work.case.name} must give attempts of {work.case.new} tokens, got {len(pairs)}")
    dtype = ours.engine.student.lm_head.weight.dtype
    difference = largest_difference(reference_model(folder, dtype), work, first)
    if not difference <= MAX_DIFFERENCE[dtype]:
        limit = MAX_DIFFERENCE[dtype]
        raise RuntimeError(f"bench: log-probs must be within {limit} of transformers', got {difference:.2g} off")
    prefilled = prefilled_tokens(work.case, sum(counts))
    return {"prefilled": prefilled, "unique": work.case.unique_tokens, "logprobs_off": difference, "seconds": seconds}


@contextmanager
def counted_rows(layer: nn.Module) -> Any:
    """A list, to which each call of the layer adds how many rows it put out."""
    rows: list[int] = []
    handle = layer.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    try:
        yield rows
    finally:
        handle.remove()


def largest_difference(reference: nn.Module, work: Work, attempts: list[list[Attempt]]) -> float:
    """Of the engine's log-probs from those of a Hugging Face model: first and last attempt of each round."""
    first, second = attempts
    contexts = {id(a): work.prompts[i // work.case.rollouts] for i, a in enumerate(first)}
    for before, after, suffix in zip(first[::2], second, work.suffixes, strict=False):
        contexts[id(after)] = contexts[id(before)] + before.token_ids + suffix
    worst = 0.0
    for attempt in (a for round_ in attempts if round_ for a in (round_[0], round_[-1])):
        context = contexts[id(attempt)]
        ids = torch.tensor([context + attempt.token_ids])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(context) - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, len(context) :, None])[:, 0]
        worst = max(worst, (logprobs - attempt.logprobs).abs().max().item())
    return worst


def reference_model(folder: str, dtype: torch.dtype) -> nn.Module:
    """The folder's model by transformers, computing in fp32 on weights as `dtype` keeps them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).float().eval()


def step_parts(run: Callable[[], object], seconds: float) -> dict[str, float]:
    """Seconds by part: ops' own time from a profiled run; of the `seconds` that an unprofiled one takes, the rest."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    with profile(use_cpu=True) as events:
        run()
    parts = dict.fromkeys([*PARTS, OTHER_OPS], 0.0)
    part_of = {op: part for part, ops in PARTS.items() for op in ops}
    for event in events.key_averages():
        parts[part_of.get(event.key, OTHER_OPS)] += event.self_cpu_time_total / 1e6
    return parts | {PYTHON: max(0.0, seconds - sum(parts.values()))}
