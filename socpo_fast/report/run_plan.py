"""Writes what a run is about to do, before anything is computed. Read run_plan_text.

run molar_mass from the start: 0.8M parameters, cpu; ops: cpp, 1 in plain torch
  questions      20,000 to train on, 200 held out
  batches        40 of 128 rollouts (16 questions x 8), 5,120 in all
  updates        80 in all, 2 a batch
  evaluations    11 of 800 rollouts (200 questions x 4), 8,800 in all
  most guidance  5,120 calls in batches, 8,800 calls in evaluations
  most tokens    1.3M sampled in batches, 2.3M sampled in evaluations
  memory         KV cache 0.25 GiB
"""

from collections import Counter
from typing import NamedTuple

import torch

from socpo_fast.config import Config
from socpo_fast.ops import available_impls

CALLS = "most guidance"
TOKENS = "most tokens"
DRY_RUN_END = (
    "dry run: nothing was computed; the time left is estimated after the first batch of a run"
)


class Reached(NamedTuple):
    """How far a run is when it starts, and whether it begins with an evaluation."""

    batches: int
    updates: int
    eval_due: bool


def first_line(name: str, student: torch.nn.Module, device: str) -> str:
    """Returns a line that names what runs, the model's size, and what the ops run on."""
    millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    # `socpo env` lists the implementation of each op.
    counts = Counter(available_impls(device).values())
    num_plain = counts.pop("ref", 0)
    impls = [*counts, *[f"{num_plain} in plain torch"] * (num_plain > 0)]
    return f"{name}: {millions:.1f}M parameters, {device}; ops: {', '.join(impls)}"


def run_plan_text(
    config: Config,
    *,
    memory: str,
    num_questions: int = 0,
    num_held_out: int = 0,
    num_left_out: int = 0,
    reached: Reached | None = None,
) -> str:
    """Returns the sizes of what is about to run, one line each, and the memory note.

    Args:
        memory:        the session's memory_note: one line, or a table, which then comes last.
        num_questions: to train on or to roll out; 0: there is only an evaluation.
        num_held_out:  to evaluate on; 0: there is no evaluation.
        num_left_out:  because their prompts are too long.
        reached:       where the training starts, so that the counts are of what is left; None:
                       there are no updates.
    """
    rollout = config.rollout
    rest = "left" if reached and reached.batches else "in all"
    names = ("questions", "batches", "updates", "evaluations", CALLS, TOKENS)
    rows: dict[str, list[str]] = {name: [] for name in names}

    def add(name: str, count: int, text: str) -> None:
        if count:
            rows[name].append(f"{amount(count)} {text}")

    def add_rollouts(kind: str, count: int, questions: int, size: int, attempts: int) -> None:
        each = questions * size
        product = f"({amount(questions)} questions x {size})"
        add(kind, count, f"of {amount(each)} rollouts {product}, {amount(count * each)} {rest}")
        add(CALLS, count * each * (attempts - 1), f"calls in {kind}")
        add(TOKENS, count * each * attempts * rollout.max_new_tokens, f"sampled in {kind}")

    add("questions", num_questions, "to train on" if reached else "to roll out")
    add("questions", num_held_out, "held out")
    limit = amount(config.data.max_prompt_tokens)
    add("questions", num_left_out, f"left out (prompts of more than {limit} tokens)")
    if num_questions:
        batches = config.run.num_batches - (reached.batches if reached else 0)
        size = (rollout.questions_per_batch, rollout.group_size)
        add_rollouts("batches", batches, *size, rollout.max_attempts)
        if reached:
            each = updates_a_batch(config)
            add("updates", batches * each, f"{rest}, {each} a batch")
    if num_held_out:
        count = num_evaluations(config, reached) if reached else 1
        attempts = rollout.max_attempts if config.eval.assisted else 1
        add_rollouts("evaluations", count, num_held_out, config.eval.samples, attempts)
    is_table = "\n" in memory
    rows["memory"] = [] if is_table else [memory]
    lines = [f"  {name:<15}{', '.join(parts)}" for name, parts in rows.items() if parts]
    return "\n".join([*lines, *[memory] * is_table])


def updates_a_batch(config: Config) -> int:
    """Returns the number of updates of one batch."""
    return config.num_updates // config.run.num_batches


def num_evaluations(config: Config, reached: Reached) -> int:
    """Returns how many evaluations a training makes from here on, the one at its end included."""
    batches = config.run.num_batches - reached.batches
    each = updates_a_batch(config)
    last = reached.updates + batches * each
    every = config.eval.every_updates
    # One after each batch whose updates cross a multiple of `every`, and one after the last batch.
    crossings = last // every - reached.updates // every if every else 0
    is_last_due = every > 0 and (last - each) // every < last // every
    regular = min(batches, crossings) + (batches > 0 and not is_last_due)
    return regular + reached.eval_due


def amount(count: int) -> str:
    """Returns a count for people: 5,120 or 1.3M or 2.0B."""
    if count < 1_000_000:
        return f"{count:,}"
    return f"{count / 1e6:.1f}M" if count < 10**9 else f"{count / 1e9:,.1f}B"
