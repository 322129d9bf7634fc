"""Stage `training`: an update's forward and backward at a real shape, beside its FLOPs.

One question's rollouts as a trainer gets them: a shared prompt, eight first answers, guidance and a
second answer behind half of them. bf16 is what training will be in; fp32 is what it is in today.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from socpo_fast import Engine
from socpo_fast.model import Decoder
from socpo_fast.ops import policy_loss
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.packing import pack_rollouts
from socpo_fast.train.step import compute_logprobs, policy_gradients
from socpo_fast.types import Attempt, Rollout, RolloutKey
from tools.gpu_check.check import Check, Part, check_finite
from tools.gpu_check.decode import make_engine, params_of
from tools.gpu_check.engines import prompts_of
from tools.gpu_check.models import MODELS, make_model
from tools.gpu_check.rooflines import num_parameters, update_flops
from tools.gpu_check.timing import median_ms, peak_gib, profile_table

TOKEN_BUDGET = 16384


@dataclass(frozen=True)
class GroupShape:
    """Eight rollouts of one question, in tokens."""

    prompt: int
    answer: int  # on average; lengths vary by a quarter
    bridge: int
    rollouts: int = 8


GROUP, TINY_GROUP = GroupShape(300, 500, 130), GroupShape(12, 8, 3, rollouts=4)


def make_rollouts(vocab_size: int, shape: GroupShape) -> list[Rollout]:
    """Random tokens; every second rollout has a second attempt."""
    rng = random.Random(0)
    prompt_ids = _ids(rng, vocab_size, shape.prompt)
    rollouts = []
    for idx in range(shape.rollouts):
        num_attempts = 1 + idx % 2
        attempts = [_attempt(rng, vocab_size, shape, idx, k) for k in range(num_attempts)]
        rollouts.append(
            Rollout(
                question_idx=0,
                rollout_idx=idx,
                prompt_ids=prompt_ids,
                attempts=attempts,
                bridges=[_ids(rng, vocab_size, shape.bridge)] * (num_attempts - 1),
                cuts=[None] * (num_attempts - 1),
                advantages=[rng.uniform(-1.0, 1.0) for _ in attempts],
            )
        )
    return rollouts


def _attempt(
    rng: random.Random, vocab_size: int, shape: GroupShape, rollout_idx: int, attempt_idx: int
) -> Attempt:
    length = shape.answer + rng.randint(-shape.answer // 4, shape.answer // 4)
    return Attempt(
        token_ids=_ids(rng, vocab_size, length),
        logprobs=torch.full((length,), -8.0),
        kept_mass=torch.ones(length),
        finish_reason="length",
        key=RolloutKey(0, 0),
        rollout_idx=rollout_idx,
        attempt_idx=attempt_idx,
        policy_version=0,
    )


def _ids(rng: random.Random, vocab_size: int, length: int) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(length)]


def flops_of(student: Decoder, rollouts: list[Rollout]) -> float:
    """Of the update, from its packed segments."""
    total = 0.0
    for batch in pack_rollouts(rollouts, packing="tree", token_budget=TOKEN_BUDGET):
        seen_pairs = 0
        for start, end, context in batch.segments:
            rows = end - start
            seen_pairs += rows * sum(b - a for a, b in context) + rows * (rows + 1) // 2
        counts = batch.tokens_forwarded, batch.targets_N.numel(), seen_pairs
        total += update_flops(student.config, *counts)
    return total


def gradients(student: Decoder, rollouts: list[Rollout], *, checkpointing: bool) -> None:
    """One update's gradients, into cleared .grad."""
    student.zero_grad(set_to_none=True)
    policy_gradients(
        student,
        rollouts,
        token_budget=TOKEN_BUDGET,
        temperature=1.0,
        checkpointing=checkpointing,
    )


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """What a product of fp32 matrices is computed in on a card: "ieee" or "tf32"."""
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, precision
    try:
        yield
    finally:
        backend.fp32_precision = before


def update(
    model: str, dtype: torch.dtype, *, precision: str = "ieee", checkpointing: bool = False
) -> Part:
    """Time, share of the card's GEMM rate, peak memory and kernels of one update's gradients."""

    def part(check: Check) -> None:
        config = MODELS["tiny" if check.tiny else model]
        used = dtype if check.is_cuda else torch.float32
        student = make_model(config, device=check.device, dtype=used)
        rollouts = make_rollouts(config.vocab_size, TINY_GROUP if check.tiny else GROUP)
        word = str(used).removeprefix("torch.") + (" by tf32" if precision == "tf32" else "")
        of = f"{model} in {word}" + (", layers recomputed" if checkpointing else "")

        def run() -> None:
            gradients(student, rollouts, checkpointing=checkpointing)

        with fp32_products(precision):
            peak = peak_gib(run, check.device)
            num_flops = flops_of(student, rollouts)
            key = "training.update_ms" if dtype == torch.bfloat16 else "training.fp32_update_ms"
            limit = check.ceilings.bf16_ms(num_flops)
            check.figure(key, median_ms(run, check.device), of=of, limit=limit)
            check.figure("training.peak_gib", peak, of=of)
            table, num_launches = profile_table(run, check.device)
            check.figure("training.launches", num_launches, of=of)
            check.note(f"gradients of {of}, kernels by time\n{table}")
            first = student.lm_head.weight.grad
            assert first is not None, "the head has no gradient"
            check_finite("the gradient", first)
            run()
            check.figure("training.repeats", torch.equal(first, student.lm_head.weight.grad), of=of)

    return part


def mismatch(dtype: torch.dtype) -> Part:
    """By how much the trainer's log-probs differ from the sampler's, before any update."""

    def part(check: Check) -> None:
        config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
        used = dtype if check.is_cuda else torch.float32
        student = make_model(config, device=check.device, dtype=used)
        prompt, new = (12, 8) if check.tiny else (300, 100)
        engine: Engine = make_engine(student, 4 * 8 * (prompt + new + 64))
        prompts = prompts_of(student, 4, prompt)
        groups = engine.generate(prompts, params_of(new, n=8))
        rollouts = [
            Rollout(
                question_idx=q,
                rollout_idx=attempt.rollout_idx,
                prompt_ids=prompts[q],
                attempts=[attempt],
            )
            for q, group in enumerate(groups)
            for attempt in group
        ]
        logprobs = compute_logprobs(student, rollouts, token_budget=TOKEN_BUDGET, temperature=1.0)
        differences = torch.cat([
            (ours[0] - rollout.attempts[0].logprobs).abs()
            for ours, rollout in zip(logprobs, rollouts, strict=True)
        ])  # fmt: skip
        of = str(used).removeprefix("torch.")
        check.figure("training.mismatch_mean_nats", float(differences.mean()), of=of)
        check.figure("training.mismatch_max_nats", float(differences.max()), of=of)

    return part


def optimizer_step(check: Check) -> None:
    """Clipping and AdamW over fp32 parameters: read p, g, m, v, write p, m, v."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=torch.float32)
    optimizer = Optimizer(student, lr=1e-6)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    ms = median_ms(optimizer.step, check.device)
    limit = check.ceilings.memory_ms(28 * num_parameters(config))
    check.figure("training.optimizer_ms", ms, of="Qwen3-0.6B in fp32", limit=limit)


def beside_padded_rows(check: Check) -> None:
    """The same rollouts as padded rows through transformers, as most trainers have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tools.gpu_check.models import CONFIGS

    name = "tiny" if check.tiny else "Qwen3-0.6B"
    raw = {key: value for key, value in CONFIGS[name].items() if key != "architectures"}
    hf_config = AutoConfig.for_model(**raw)
    with torch.device(check.device):
        theirs = AutoModelForCausalLM.from_config(hf_config, dtype=check.dtype)
    rollouts = make_rollouts(raw["vocab_size"], TINY_GROUP if check.tiny else GROUP)
    run = padded_update(theirs, rollouts, check.device)
    their_ms = median_ms(run, check.device)
    theirs.zero_grad(set_to_none=True)
    del theirs, run
    student = make_model(MODELS[name], device=check.device, dtype=check.dtype)
    ms = median_ms(lambda: gradients(student, rollouts, checkpointing=False), check.device)
    check.figure("training.padded_rows_ms", their_ms, of="transformers")
    check.figure("training.times_padded_rows", their_ms / ms)


def padded_update(
    theirs: torch.nn.Module, rollouts: list[Rollout], device: torch.device
) -> Callable[[], None]:
    """Forward and backward over [rollouts, longest] with logits of all tokens."""
    rows = [
        rollout.prompt_ids
        + rollout.attempts[0].token_ids
        + [i for bridge in rollout.bridges for i in bridge]
        + [i for attempt in rollout.attempts[1:] for i in attempt.token_ids]
        for rollout in rollouts
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)

    def run() -> None:
        theirs.zero_grad(set_to_none=True)
        for row_ids, row_mask in zip(ids.split(2), mask.split(2), strict=True):
            logits = theirs(row_ids, attention_mask=row_mask).logits[:, :-1].float()
            picked: Tensor = logits.log_softmax(-1).gather(2, row_ids[:, 1:, None])[..., 0]
            flat = picked.flatten()
            ones = torch.ones_like(flat)
            loss = policy_loss(flat, flat.detach(), ones, num_loss_tokens=mask.numel()).loss
            loss.backward()

    return run


PARTS: dict[str, Part] = {
    "bf16, 0.6B": update("Qwen3-0.6B", torch.bfloat16),
    "bf16, 1.7B": update("Qwen3-1.7B", torch.bfloat16),
    "bf16, 4B": update("Qwen3-4B", torch.bfloat16, checkpointing=True),
    "mismatch in bf16": mismatch(torch.bfloat16),
    "mismatch in fp32": mismatch(torch.float32),
    "fp32 by tf32, 0.6B": update("Qwen3-0.6B", torch.float32, precision="tf32"),
    "fp32, 0.6B": update("Qwen3-0.6B", torch.float32),
    "optimizer": optimizer_step,
    "padded rows": beside_padded_rows,
}
