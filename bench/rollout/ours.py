"""Runs, checks and profiles our engine, through its public interface only.

Read Ours, then check (before any timing) and step_parts (where the time goes).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler import profile

from bench.machine import product_dtype
from bench.measure import CPU, timed
from bench.rollout.cases import Case, Work, prefilled_tokens
from socpo_fast.engine import Engine
from socpo_fast.model.decoder import Decoder
from socpo_fast.types import Attempt, SamplingParams

# The largest difference of a sampled token's log-prob from a transformers forward in fp32, by the
# dtype of weights and pages. On a card, which computes in bf16 as well, transformers in bf16 may be
# further off than this; then twice its difference is allowed.
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
PARTS = {
    "linears": ("socpo::linear", "aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("socpo::paged_attention",),
    "KV write, rotary": ("socpo::rotary_write",),
    "norms": ("socpo::rms_norm",),
    "swiglu": ("socpo::swiglu",),
    "head and draw": ("socpo::linear_sample",),
}
OTHER_OPS = "other ops"
PYTHON = "Python, scheduler"
# The same on a card, by words in the names of kernels: CUDA graphs hide which op launched them.
KERNELS = {
    "attention": ("_prefill_kernel", "_decode_kernel", "_merge_splits", "attention", "flash"),
    "KV write, rotary": ("rotary",),
    "norms": ("rms_norm",),
    "swiglu": ("swiglu",),
    "head and draw": ("_sample_tile", "_merge_tiles"),
    # Last, as attention kernels of libraries have such words in their names as well.
    "linears": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk"),
}


@dataclass
class Ours:
    """One engine, kept over all runs as a trainer keeps it."""

    engine: Engine

    @property
    def device(self) -> torch.device:
        """Returns the student's device."""
        return self.engine.student.lm_head.weight.device

    @classmethod
    def of(cls, student: Decoder, case: Case, *, page_size: int = 32, **options: Any) -> Ours:
        """Makes an engine with KV pages for all rollouts of a case at once."""
        config = student.config
        weight = student.lm_head.weight
        numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        per_token = numbers * weight.element_size()
        # As if rollouts shared no page, so that nothing is preempted.
        num_tokens = (case.num_first + 1) * (case.longest + 2 * page_size)
        gib = num_tokens * per_token / 2**30
        return cls(Engine(student, kv_cache_gib=gib, page_size=page_size, **options))

    def rollouts(self, work: Work) -> list[list[Attempt]]:
        """Returns [first attempts, second attempts], each in the order of questions."""
        case = work.case
        params = SamplingParams(
            temperature=1.0,
            max_new_tokens=case.new,
            eos_ids=(),
            n=case.rollouts,
            ignore_eos=True,
            seed=work.seed,
        )
        keys = [(0, question) for question in range(len(work.prompts))]
        groups = self.engine.generate(work.prompts, params, keys=keys, keep=bool(case.guidance))
        first = [attempt for group in groups for attempt in group]
        second: list[Attempt] = []
        if case.guidance:
            for attempt, suffix in zip(first[::2], work.suffixes, strict=True):
                kept_tokens = case.prompt + attempt.num_tokens
                resume_params = replace(params, n=1)
                self.engine.resume(attempt, suffix, resume_params, kept_tokens=kept_tokens)
            while self.engine.has_work:
                second += self.engine.step()
            second.sort(key=lambda attempt: (attempt.key, attempt.rollout_idx))
        self.engine.release(first + second)
        return [first, second]

    def prefill(self, work: Work) -> None:
        """Runs the prompts only: one token of each rollout."""
        self.rollouts(replace(work, case=replace(work.case, new=1, guidance=0), suffixes=[]))


def check(ours: Ours, work: Work, folder: str) -> dict[str, Any]:
    """Checks that two runs are bitwise equal and that log-probs agree with transformers.

    Raises:
        RuntimeError: they differ.
    """
    weight = ours.engine.student.lm_head.weight
    with counted_rows(ours.engine.student.layers[0]) as counts:
        first = ours.rollouts(work)
    again, seconds = timed(lambda: ours.rollouts(work), weight.device)
    pairs = [
        pair for rounds in zip(first, again, strict=True) for pair in zip(*rounds, strict=True)
    ]
    if not all(
        a.token_ids == b.token_ids and torch.equal(a.logprobs, b.logprobs) for a, b in pairs
    ):
        raise RuntimeError(
            f"bench: {work.case.name} must draw the same tokens twice, got other ones; "
            "test the engine"
        )
    seq_lens = {len(a.token_ids) for a, _ in pairs}
    if seq_lens != {work.case.new} or len(pairs) != work.case.generated // work.case.new:
        raise RuntimeError(
            f"bench: {work.case.name} must give attempts of {work.case.new} tokens, "
            f"got {len(pairs)} of {sorted(seq_lens)}"
        )
    difference, limit = logprobs_off(folder, work, first, weight)
    if not difference <= limit:
        raise RuntimeError(
            f"bench: log-probs must be within {limit:.2g} of transformers', "
            f"got {difference:.2g} off"
        )
    return {
        "prefilled": prefilled_tokens(work.case, sum(counts)),
        "unique": work.case.unique_tokens,
        "logprobs_off": difference,
        "seconds": seconds,
    }


@contextmanager
def counted_rows(layer: nn.Module) -> Any:
    """Yields a list to which each call of the layer appends its number of output rows."""
    rows: list[int] = []
    handle = layer.register_forward_hook(
        lambda module, args, output: rows.append(output[0].shape[0])
    )
    try:
        yield rows
    finally:
        handle.remove()


def logprobs_off(
    folder: str, work: Work, attempts: list[list[Attempt]], like: Tensor
) -> tuple[float, float]:
    """Returns the largest difference from a transformers forward in fp32, and the allowed one.

    Compares the first and the last attempt of each round, on the device of `like` and with weights
    rounded to its dtype.
    """
    picked = [a for round_ in attempts if round_ for a in (round_[0], round_[-1])]
    contexts = contexts_of(work, attempts)
    reference = reference_model(folder, like.dtype).to(like.device)
    truths = [logprobs_by(reference.float(), contexts[id(a)], a) for a in picked]
    pairs = zip(truths, picked, strict=True)
    off = max(float((truth - a.logprobs.cpu()).abs().max()) for truth, a in pairs)
    limit = MAX_DIFFERENCE[like.dtype]
    if product_dtype(like.device, like.dtype) != torch.float32:
        # float() changed the model in place. Its weights were rounded to this dtype before, so
        # converting them back loses nothing.
        plain = reference.to(like.dtype)
        plain_logprobs = [logprobs_by(plain, contexts[id(a)], a) for a in picked]
        pairs = zip(truths, plain_logprobs, strict=True)
        limit = max(limit, 2 * max(float((truth - x).abs().max()) for truth, x in pairs))
    return off, limit


def contexts_of(work: Work, attempts: list[list[Attempt]]) -> dict[int, list[int]]:
    """Returns the context of each attempt, by the attempt's id()."""
    first, second = attempts
    contexts = {id(a): work.prompts[i // work.case.rollouts] for i, a in enumerate(first)}
    for first_attempt, second_attempt, suffix in zip(
        first[::2], second, work.suffixes, strict=False
    ):
        contexts[id(second_attempt)] = (
            contexts[id(first_attempt)] + first_attempt.token_ids + suffix
        )
    return contexts


@torch.no_grad()
def logprobs_by(model: nn.Module, context: list[int], attempt: Attempt) -> Tensor:
    """Returns log-probs of an attempt's tokens by a Hugging Face model, on the CPU."""
    ids = torch.tensor([context + attempt.token_ids], device=next(model.parameters()).device)
    logits = model(ids).logits[0, len(context) - 1 : -1].float()
    logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, len(context) :, None])
    return logprobs[:, 0].cpu()


def reference_model(folder: str, dtype: torch.dtype) -> nn.Module:
    """Loads the folder's model by transformers, with weights rounded to `dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def step_parts(
    run: Callable[[], object], seconds: float, device: torch.device = CPU
) -> dict[str, float]:
    """Returns seconds by part, from a profiled run: each op's own time, on a card its kernels'.

    PYTHON is what remains of `seconds`, the time of a run without the profiler. Profiling slows
    down Python more than the ops, so a profiled run's own total would be misleading.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
    parts = dict.fromkeys([*PARTS, OTHER_OPS], 0.0)
    is_card = device.type == "cuda"
    with profile(use_cpu=True, use_device="cuda" if is_card else None) as events:
        run()
    part_of = {op: part for part, ops in PARTS.items() for op in ops}
    for event in events.key_averages():
        if not is_card:
            parts[part_of.get(event.key, OTHER_OPS)] += event.self_cpu_time_total / 1e6
        elif event.device_type == DeviceType.CUDA:
            parts[part_of_kernel(event.key)] += event.self_device_time_total / 1e6
    return parts | {PYTHON: max(0.0, seconds - sum(parts.values()))}


def part_of_kernel(name: str) -> str:
    """Returns the first part of KERNELS with a word that occurs in the kernel's name."""
    for part_name, words in KERNELS.items():
        if any(word in name.lower() for word in words):
            return part_name
    return OTHER_OPS
