"""Makes groups of rollouts of random tokens, as a trainer gets them.

prompt -- answer
       -- answer -- bridge (guidance) -- answer        every second rollout
       ..
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from socpo_fast.types import Attempt, Rollout, RolloutKey, ShownGuidance, Turn


@dataclass(frozen=True)
class GroupShape:
    """Token counts of one question's rollouts."""

    prompt: int
    answer: int  # on average; lengths vary by a quarter
    bridge: int
    rollouts: int = 8


GROUP = GroupShape(300, 500, 130)
TINY_GROUP = GroupShape(12, 8, 3, rollouts=4)


def make_rollouts(vocab_size: int, shape: GroupShape, num_groups: int = 1) -> list[Rollout]:
    """Makes groups of random tokens; every second rollout has a second attempt."""
    rng = random.Random(0)
    rollouts = []
    for question_idx in range(num_groups):
        prompt_ids = _ids(rng, vocab_size, shape.prompt)
        for idx in range(shape.rollouts):
            num_attempts = 1 + idx % 2
            attempts = [_attempt(rng, vocab_size, shape, idx, k) for k in range(num_attempts)]
            rollout = Rollout(question_idx=question_idx, rollout_idx=idx, prompt_ids=prompt_ids)
            add_turns(rollout, attempts, _ids(rng, vocab_size, shape.bridge))
            rollouts.append(rollout)
    return rollouts


def _attempt(
    rng: random.Random, vocab_size: int, shape: GroupShape, rollout_idx: int, attempt_idx: int
) -> Attempt:
    """Returns an attempt whose length varies by a quarter."""
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


def add_turns(rollout: Rollout, attempts: list[Attempt], bridge_ids: list[int]) -> None:
    """Fills a rollout with attempts and a bridge between each two; no attempt is cut."""
    for turn_idx, attempt in enumerate(attempts):
        rollout.turns.append(Turn(attempt=attempt, advantage=1.0))
        if turn_idx < len(attempts) - 1:
            kept_tokens = rollout.context_length(turn_idx) + attempt.num_tokens
            guidance = ShownGuidance(raw_text="", text="", kept_tokens=kept_tokens)
            guidance.bridge_ids = bridge_ids
            rollout.turns[-1].guidance = guidance
