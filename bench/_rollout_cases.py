"""The cases of bench_rollout: what is generated, how much of it is work that cannot be avoided, and what that costs.

A case's limit is its own linears replayed alone: the unique prompt tokens once, then each decode step, then the LM head
on every row that samples. `linear_steps` lists them as (rows through the layers, rows through the head, times).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from socpo_fast.model.config import ModelConfig

PREFILL_ROWS = 2048  # a step's token budget


@dataclass(frozen=True)
class Case:
    """num_prompts questions with num_rollouts answers each, `resumed` of which are followed by a second attempt."""

    name: str
    num_prompts: int
    num_rollouts: int
    prompt_tokens: int
    new_tokens: int
    guidance: int = 0  # tokens
    resumed: int = 0  # rollouts of each question

    @property
    def sequences(self) -> int:
        return self.num_prompts * self.num_rollouts

    @property
    def second_attempts(self) -> int:
        return self.num_prompts * self.resumed

    @property
    def generated(self) -> int:
        return (self.sequences + self.second_attempts) * self.new_tokens

    @property
    def unique_prefill(self) -> int:
        """Prompts once each, then the last token and the guidance of each second attempt."""
        return self.num_prompts * self.prompt_tokens + self.second_attempts * (1 + self.guidance)

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Token ids, the same for every contender; other ones for each seed, so that no cache has met them."""
        rng = random.Random(f"{self.name} {seed}")
        return [
            [rng.randrange(vocab_size // 8, vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.num_prompts)
        ]

    def suffix(self, seed: int, vocab_size: int) -> list[int]:
        rng = random.Random(f"{self.name} guidance {seed}")
        return [rng.randrange(vocab_size // 8, vocab_size) for _ in range(self.guidance)]

    def linear_steps(self) -> list[tuple[int, int, int]]:
        steps = _prefill(self.num_prompts * self.prompt_tokens, self.num_prompts)
        steps.append((self.sequences, self.sequences, self.new_tokens - 1))
        if self.second_attempts:
            steps += _prefill(self.second_attempts * (1 + self.guidance), self.second_attempts)
            steps.append((self.second_attempts, self.second_attempts, self.new_tokens - 1))
        return steps


def _prefill(tokens: int, sampled: int) -> list[tuple[int, int, int]]:
    """In steps of PREFILL_ROWS; the head's rows are put behind the last."""
    whole, rest = divmod(tokens, PREFILL_ROWS)
    steps = [(PREFILL_ROWS, 0, whole)] * (whole > 0) + [(rest, 0, 1)] * (rest > 0)
    return [*steps, (0, sampled, 1)]


def linear_flops(case: Case, config: ModelConfig) -> int:
    """Multiplications and additions of the case's linears."""
    heads, width = config.num_heads + 2 * config.num_kv_heads, config.hidden_size
    layer = (
        width * heads * config.head_dim
        + config.num_heads * config.head_dim * width
        + 3 * width * config.intermediate_size
    )
    body, head = 2 * config.num_layers * layer, 2 * config.vocab_size * width
    return sum((rows * body + sampled * head) * times for rows, sampled, times in case.linear_steps())


def _plain(batch: int) -> Case:
    return Case(f"a{batch}", num_prompts=batch, num_rollouts=1, prompt_tokens=40, new_tokens=64)


GROUPS = {"num_prompts": 8, "num_rollouts": 8, "prompt_tokens": 300, "new_tokens": 100}
CASES = [_plain(1), _plain(16), _plain(64), Case("b", **GROUPS), Case("c", **GROUPS, guidance=60, resumed=4)]
