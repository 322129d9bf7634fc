"""Writes the memory and time plan of a run, as `socpo plan` and a run on a GPU print it.

Read plan_text (the command), then plan_table (the text). The numbers come from memory_plan.py and
batch_time.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from socpo_fast.config import Config
from socpo_fast.config.text import to_text
from socpo_fast.ops._checks import check_rule
from socpo_fast.report.batch_time import RESUMED, batch_seconds
from socpo_fast.report.cards import GIB, card_named
from socpo_fast.report.memory_plan import Plan, make_plan
from socpo_fast.report.sizes import activation_bytes, num_parameters

# Typical lengths in tokens. Settings know their limits only; an answer is taken at its limit.
ORDINARY = {"prompt": 300, "guidance": 130}
CHOSEN = ("engine.kv_cache_gib", "train.token_budget", "train.checkpointing")


def plan_text(config: Config, student_folder: Path, options: Mapping[str, str]) -> str:
    """Returns what `socpo plan` prints.

    Args:
        options: the command's own options, "card" and "answer_tokens" among them, as typed.

    Raises:
        ValueError: an option breaks its rule, or the run does not fit.
    """
    device = config.run.device
    check_rule(
        "plan",
        "run.device",
        device,
        device != "cpu",
        "cuda or left out with --card",
        "leave one out",
    )
    token_options = {
        name: text for name in limits(config) if (text := options.get(f"{name}_tokens"))
    }
    for name, text in token_options.items():
        setting, limit = limits(config)[name]
        is_count = re.fullmatch("0*[1-9][0-9]{0,8}", text) is not None and int(text) <= limit
        check_rule(
            "plan",
            f"--{name}-tokens",
            text,
            is_count,
            f"an integer from 1 to {setting}, {limit}",
            "name one, or leave it out",
        )
    # Options are checked before the card, whose absence would hide their errors.
    card = card_named(options.get("card"), device)
    plan = make_plan(config, student_folder, card, is_training=True)
    return plan_table(plan, **{name: int(text) for name, text in token_options.items()})


def limits(config: Config) -> dict[str, tuple[str, int]]:
    """Returns the setting that limits each length, with its value."""
    return {
        "prompt": ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        "answer": ("rollout.max_new_tokens", config.rollout.max_new_tokens),
        "guidance": ("rollout.guidance_limit", config.rollout.guidance_limit),
    }


def plan_table(plan: Plan, **token_counts: int) -> str:
    """Returns a table of memory by use, the chosen settings, and the least time of a batch.

    Args:
        token_counts: typical lengths of prompt, answer and guidance, where the user gave them.
    """
    card = plan.card
    requested = plan.asked
    billions = num_parameters(plan.model) / 1e9
    kind = requested.student.dtype + ", trained" * plan.is_training
    lines = [
        f"memory plan, GiB: {billions:.3g}B parameters, {kind}, on {card.name} with "
        f"{card.total_gib:.1f}",
        *(f"  {name:<42}{size / GIB:8.2f}" for name, size in memory_rows(plan).items()),
        *(chosen_line(plan, name) for name in CHOSEN[: 3 if plan.is_training else 1]),
    ]
    if not card.tb_s:
        return "\n".join([*lines, f"no times: the rates of {card.name} are not known"])
    token_counts = {
        name: min(ORDINARY.get(name, limit), limit)
        for name, (_, limit) in limits(requested).items()
    } | token_counts
    seconds = batch_seconds(plan, **token_counts)
    seconds["together"] = sum(seconds.values())
    words = ", ".join(f"{name} {length}" for name, length in token_counts.items())
    rates = (
        f"{card.tb_s:g} TB/s, {card.bf16_tflop_s:g} TFLOP/s in bf16, {card.fp32_tflop_s:g} in fp32"
    )
    return "\n".join(
        [
            *lines,
            f"time of a batch, seconds, at least: {words} tokens, {RESUMED:.0%} resumed",
            *(f"  {name:<42}{phase_s:8.2f}" for name, phase_s in seconds.items()),
            f"  at {rates} ({card.source})",
        ]
    )


def memory_rows(plan: Plan) -> dict[str, int]:
    """Returns all parts, which add up to the card, and the longest rollout's share of them."""
    tensor = f"KV{f', gradients ({plan.gradients / GIB:.2f}): one tensor' * plan.is_training}"
    rows = plan.residents | {tensor: plan.shared} | plan.temporaries
    if plan.card.others_gib:
        rows["held by others"] = int(plan.card.others_gib * GIB)
    rows |= {"gaps of the allocator (estimate)": plan.gaps, "left": plan.left}
    if plan.is_training:
        checkpointing = bool(plan.config.train.checkpointing)
        kept_bytes = activation_bytes(plan.model, plan.itemsize, checkpointing=checkpointing)
        rows[f"(longest rollout alone: {plan.longest[1]} tokens)"] = plan.longest[1] * kept_bytes
    return rows


def chosen_line(plan: Plan, name: str) -> str:
    """Returns a setting's value in this run, and whether the plan or the user chose it."""
    section, key = name.split(".")
    value, requested = (
        getattr(getattr(config, section), key) for config in (plan.config, plan.asked)
    )
    value_text = f"{value:.2f}" if isinstance(value, float) else to_text(value)
    tokens = f", {plan.kv_pages * plan.config.engine.page_size} tokens" * (name == CHOSEN[0])
    return f"  {name} = {value_text} ({'auto' if requested == 'auto' else 'fixed'}{tokens})"
