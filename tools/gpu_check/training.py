"""Stage `training`: times whole updates at real shapes beside their FLOPs, and checks gradients.

Rollouts are as a trainer gets them (groups.py): a shared prompt, eight first answers, and guidance
and a second answer after half of them. Parameters are bf16, the high half of an fp32 master, with
fp32 gradients and moments. Updates in fp32 are measured for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from socpo_fast.model import Decoder
from socpo_fast.ops import policy_loss
from socpo_fast.training.optimizer import Optimizer
from socpo_fast.training.step import compute_logprobs
from socpo_fast.types import Rollout, Turn
from tests.helpers.tiny import generate_same
from tools.gpu_check.check import Check, Part, check_close, relative_error
from tools.gpu_check.decoding import make_engine, params_of
from tools.gpu_check.engines import prompts_of
from tools.gpu_check.groups import GROUP, TINY_GROUP, make_rollouts
from tools.gpu_check.models import CONFIGS, MODELS, make_model
from tools.gpu_check.timing import median_ms
from tools.gpu_check.updates import TOKEN_BUDGET, gradients, kernels_of_an_update, update


def mismatch(dtype: torch.dtype) -> Part:
    """Returns a part that compares the trainer's log-probs with the sampler's, before an update."""

    def part(check: Check) -> None:
        config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
        used = dtype if check.is_cuda else torch.float32
        student = make_model(config, device=check.device, dtype=used)
        prompt, new = (12, 8) if check.tiny else (300, 100)
        differences = mismatch_of(student, prompts_of(student, 4, prompt), new)
        of = str(dtype).removeprefix("torch.")
        check.figure("training.mismatch_mean_nats", float(differences.mean()), of=of)
        check.figure("training.mismatch_max_nats", float(differences.max()), of=of)

    return part


def mismatch_of(student: Decoder, prompts: list[list[int]], num_new: int) -> Tensor:
    """Returns |log-prob - the sampler's| of all tokens, eight rollouts a prompt, nats."""
    longest = max(map(len, prompts))
    engine = make_engine(student, len(prompts) * 8 * (longest + num_new + 64))
    groups = generate_same(engine, prompts, params_of(num_new, n=8))
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
    return torch.cat([
        (ours[0] - rollout.turns[0].attempt.logprobs).abs()
        for ours, rollout in zip(logprobs, rollouts, strict=True)
    ])  # fmt: skip


def beside_cpu(check: Check) -> None:
    """Checks every parameter's fp32 gradient on the card against the CPU's."""
    config = MODELS["tiny" if check.tiny else "small Qwen3"]
    rollouts = make_rollouts(config.vocab_size, TINY_GROUP)
    gradients_by_device = []
    for device in (torch.device("cpu"), check.device):
        # Made on the CPU in both cases: a card's generator gives other numbers.
        student = make_model(config, device="cpu", dtype=torch.float32).to(device)
        gradients(student, rollouts)
        gradients_by_device.append({name: p.grad for name, p in student.named_parameters()})
    worst = 0.0
    for name, truth in gradients_by_device[0].items():
        actual = gradients_by_device[1][name].cpu()
        expected = truth.double()
        worst = max(worst, relative_error(actual, expected))
        check_close(f"gradient of {name}", actual, expected)
    check.figure("training.gradient_error", worst, of="fp32 beside the CPU")


def bf16_beside_fp32(check: Check) -> None:
    """Compares the whole gradient of equal weights in bf16 and in fp32, on the device."""
    config = MODELS["tiny" if check.tiny else "Qwen3-0.6B"]
    rollouts = make_rollouts(config.vocab_size, TINY_GROUP)
    narrow = make_model(config, device=check.device, dtype=check.dtype)
    wide = make_model(config, device=check.device, dtype=torch.float32)
    # fp32 holds every bf16 weight exactly, so both start from equal weights.
    wide.load_state_dict(narrow.state_dict())
    squares = [0.0, 0.0]
    optimizers = [Optimizer(student, lr=1e-6) for student in (narrow, wide)]  # they make .grad
    for student in (narrow, wide):
        gradients(student, rollouts)
    for bf16_param, fp32_param in zip(narrow.parameters(), wide.parameters(), strict=True):
        squares[0] += float((bf16_param.grad.double() - fp32_param.grad.double()).square().sum())
        squares[1] += float(fp32_param.grad.double().square().sum())
        assert bf16_param.grad.dtype == torch.float32, (
            f"a gradient must be float32, got {bf16_param.grad.dtype}"
        )
    del optimizers
    error = (squares[0] / squares[1]) ** 0.5
    check.figure("training.gradient_error", error, of="bf16 beside fp32")


def beside_padded_rows(check: Check) -> None:
    """Times the same rollouts as padded rows in transformers, as in most trainers."""
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
    # Their model must be gone before ours is timed, for the sake of memory.
    del theirs, run
    student = make_model(MODELS[name], device=check.device, dtype=check.dtype)

    def ours() -> None:
        student.zero_grad(set_to_none=True)
        gradients(student, rollouts)

    ms = median_ms(ours, check.device)
    check.figure("training.padded_rows_ms", their_ms, of="transformers")
    check.figure("training.times_padded_rows", their_ms / ms)


def padded_update(
    theirs: torch.nn.Module, rollouts: list[Rollout], device: torch.device
) -> Callable[[], None]:
    """Returns a forward and backward over [rollouts, longest] with logits of all tokens."""
    rows = [
        rollout.context_ids(len(rollout.turns) - 1) + rollout.turns[-1].attempt.token_ids
        for rollout in rollouts
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)

    def run() -> None:
        theirs.zero_grad(set_to_none=True)
        # Two rows at a time: with all rows at once, logits would take too much memory.
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
    "bf16, 0.6B": update("Qwen3-0.6B", torch.bfloat16, num_groups=2),
    "bf16, 1.7B": update("Qwen3-1.7B", torch.bfloat16, num_groups=2),
    "mismatch in bf16": mismatch(torch.bfloat16),
    "bf16 beside fp32": bf16_beside_fp32,
    "padded rows": beside_padded_rows,
    "bf16, 4B": update("Qwen3-4B", torch.bfloat16, checkpointing=True, repeats=False),
    "mismatch in fp32": mismatch(torch.float32),
    "fp32, 0.6B": update("Qwen3-0.6B", torch.float32, repeats=False),
    "kernels of an update": kernels_of_an_update,
}
