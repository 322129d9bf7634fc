"""Stage `training`: an update's forward and backward at a real shape, beside its FLOPs.

One question's rollouts as a trainer gets them: a shared prompt, eight first answers, guidance and a
second answer behind half of them. bf16 is what training will be in; fp32 is what it is in today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from socpo_fast import Engine
from socpo_fast.model import Decoder
from socpo_fast.ops import policy_loss
from socpo_fast.train.optimizer import Optimizer
from socpo_fast.train.packing import pack_rollouts
from socpo_fast.train.step import compute_logprobs, policy_gradients
from socpo_fast.types import Rollout, Turn
from tools.gpu_check.check import Check, Part, check_close, check_finite
from tools.gpu_check.decoding import make_engine, params_of
from tools.gpu_check.engines import prompts_of
from tools.gpu_check.groups import GROUP, TINY_GROUP, make_rollouts
from tools.gpu_check.models import CONFIGS, MODELS, make_model
from tools.gpu_check.rooflines import num_parameters, update_flops
from tools.gpu_check.timing import median_ms, peak_gib, profile_table

TOKEN_BUDGET = 16384


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
            if check.is_cuda:
                reserved = torch.cuda.max_memory_reserved(check.device) / 2**30
                check.figure("training.reserved_gib", reserved, of=of)
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
                turns=[Turn(attempt=attempt)],
            )
            for q, group in enumerate(groups)
            for attempt in group
        ]
        logprobs = compute_logprobs(student, rollouts, token_budget=TOKEN_BUDGET, temperature=1.0)
        differences = torch.cat([
            (ours[0] - rollout.turns[0].attempt.logprobs).abs()
            for ours, rollout in zip(logprobs, rollouts, strict=True)
        ])  # fmt: skip
        of = str(used).removeprefix("torch.")
        check.figure("training.mismatch_mean_nats", float(differences.mean()), of=of)
        check.figure("training.mismatch_max_nats", float(differences.max()), of=of)

    return part


def beside_cpu(check: Check) -> None:
    """Every parameter's gradient on the card is the CPU's, in fp32, for every shape of rollout."""
    config = MODELS["tiny" if check.tiny else "small Qwen3"]
    rollouts = make_rollouts(config.vocab_size, TINY_GROUP)
    found = []
    for device in (torch.device("cpu"), check.device):
        student = make_model(config, device="cpu", dtype=torch.float32).to(device)
        gradients(student, rollouts, checkpointing=False)
        found.append({name: p.grad for name, p in student.named_parameters()})
    worst = 0.0
    for name, truth in found[0].items():
        actual, expected = found[1][name].cpu().double(), truth.double()
        worst = max(worst, float((actual - expected).norm() / expected.norm()))
        check_close(f"gradient of {name}", actual, expected)
    check.figure("training.gradient_error", worst, of="fp32 beside the CPU")


def bf16_beside_fp32(check: Check) -> None:
    """The whole gradient of equal weights in bf16 and in fp32, on the device."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    rollouts = make_rollouts(config.vocab_size, TINY_GROUP)
    narrow = make_model(config, device=check.device, dtype=check.dtype)
    wide = make_model(config, device=check.device, dtype=torch.float32)
    wide.load_state_dict(narrow.state_dict())
    squares = [0.0, 0.0]
    for student in (narrow, wide):
        gradients(student, rollouts, checkpointing=False)
    for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
        squares[0] += float((p.grad.double() - q.grad.double()).square().sum())
        squares[1] += float(q.grad.double().square().sum())
    error = (squares[0] / squares[1]) ** 0.5
    check.figure("training.gradient_error", error, of="bf16 beside fp32")


def kernels_of_an_update(check: Check) -> None:
    """Kernels by time. Last: a profiler stays in the way of what follows."""
    model = "tiny" if check.tiny else "Qwen3-0.6B"
    student = make_model(MODELS[model], device=check.device, dtype=check.dtype)
    rollouts = make_rollouts(MODELS[model].vocab_size, TINY_GROUP if check.tiny else GROUP)

    def run() -> None:
        gradients(student, rollouts, checkpointing=False)

    run()
    table, num_launches = profile_table(run, check.device, num_rows=25)
    check.figure("training.launches", num_launches)
    check.note(f"gradients of {model}, kernels by time\n{table}")


def optimizer_step(check: Check) -> None:
    """Clipping and AdamW over fp32 parameters: read p, g, m, v, write p, m, v."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    student = make_model(config, device=check.device, dtype=torch.float32)
    optimizer = Optimizer(student, lr=1e-6)
    gradients_of = {p: torch.full_like(p, 1e-3) for p in student.parameters()}

    def run() -> None:
        for parameter, gradient in gradients_of.items():
            parameter.grad = gradient  # a step takes them away
        optimizer.step()

    ms = median_ms(run, check.device)
    limit = check.ceilings.copy_ms(28 * num_parameters(config))
    check.figure("training.optimizer_ms", ms, of="Qwen3-0.6B in fp32", limit=limit)


def beside_padded_rows(check: Check) -> None:
    """The same rollouts as padded rows through transformers, as most trainers have them."""
    from transformers import AutoConfig, AutoModelForCausalLM

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
        rollout.context_ids(len(rollout.turns) - 1) + rollout.turns[-1].attempt.token_ids
        for rollout in rollouts
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)

    def run() -> None:
        theirs.zero_grad(set_to_none=True)
        for row_ids, row_mask in zip(ids.split(2), mask.split(2), strict=True):
            logits = (
                theirs(row_ids, attention_mask=row_mask, use_cache=False).logits[:, :-1].float()
            )
            picked: Tensor = logits.log_softmax(-1).gather(2, row_ids[:, 1:, None])[..., 0]
            flat = picked.flatten()
            ones = torch.ones_like(flat)
            loss = policy_loss(flat, flat.detach(), ones, num_loss_tokens=mask.numel()).loss
            loss.backward()

    return run


PARTS: dict[str, Part] = {
    "gradients beside the CPU": beside_cpu,
    "bf16, 0.6B": update("Qwen3-0.6B", torch.bfloat16),
    "mismatch in bf16": mismatch(torch.bfloat16),
    "bf16, 1.7B": update("Qwen3-1.7B", torch.bfloat16),
    "padded rows": beside_padded_rows,
    "bf16 beside fp32": bf16_beside_fp32,
    "optimizer": optimizer_step,
    "bf16, 4B": update("Qwen3-4B", torch.bfloat16, checkpointing=True),
    "mismatch in fp32": mismatch(torch.float32),
    "fp32 by tf32, 0.6B": update("Qwen3-0.6B", torch.float32, precision="tf32"),
    "fp32, 0.6B": update("Qwen3-0.6B", torch.float32),
    "kernels of an update": kernels_of_an_update,
}
