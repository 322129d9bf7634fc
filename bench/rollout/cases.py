"""Defines the bench's cases, their token ids, and the work that no engine can avoid.

Read Case, then linear_steps: the forward passes of an engine that forwards every unique token once.
The last sampled token of a rollout is never forwarded, unless a second attempt goes on behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from socpo_fast.model.config import ModelConfig


@dataclass(frozen=True)
class Case:
    """Rollouts of some questions, with lengths in tokens.

    If guidance > 0, every second rollout has a second attempt:

        prompt | new tokens                              half of the rollouts
        prompt | new tokens | guidance | new tokens      the other half
    """

    name: str
    questions: int
    rollouts: int  # of each question
    prompt: int
    new: int  # tokens of each attempt
    guidance: int = 0  # tokens between the attempts

    @property
    def num_first(self) -> int:
        """Returns the number of first attempts."""
        return self.questions * self.rollouts

    @property
    def num_second(self) -> int:
        """Returns the number of second attempts."""
        return len(range(0, self.num_first, 2)) if self.guidance else 0

    @property
    def generated(self) -> int:
        """Returns the number of sampled tokens."""
        return (self.num_first + self.num_second) * self.new

    @property
    def unique_tokens(self) -> int:
        """Returns the tokens that must be prefilled.

        These are each prompt once, and each guidance with the token sampled last before it, which
        has no KV yet.
        """
        return self.questions * self.prompt + self.num_second * (1 + self.guidance)

    @property
    def longest(self) -> int:
        """Returns the tokens of the longest context."""
        return self.prompt + self.new + (self.guidance + self.new if self.guidance else 0)

    @property
    def title(self) -> str:
        """Describes the case in one line."""
        text = f"{self.questions} x {self.rollouts} rollouts, prompt {self.prompt}"
        text += f", {self.new} new tokens"
        if self.guidance:
            text += f", {self.num_second} go on behind {self.guidance} of guidance"
        return text

    def shortened(self) -> Case:
        """Returns the case with very few tokens, to test only that everything runs."""
        few = {"prompt": 12, "new": 4, "questions": 2, "rollouts": 2, "guidance": 5}
        return replace(self, **{name: min(most, getattr(self, name)) for name, most in few.items()})


CASES = {
    case.name: case
    for case in (
        Case("a1", 1, 1, 40, 64),
        Case("a16", 16, 1, 40, 64),
        Case("a64", 64, 1, 40, 64),
        Case("b", 8, 8, 300, 100),
        Case("c", 8, 8, 300, 100, guidance=60),
    )
}


@dataclass(frozen=True)
class Work:
    """A case with its token ids, the same for every contender.

    Suffixes are the guidance of every second rollout.
    """

    case: Case
    seed: int
    prompts: list[list[int]]
    suffixes: list[list[int]]

    def to_json(self) -> dict[str, Any]:
        """Returns it as a peer's process reads it."""
        return asdict(self)


def make_work(case: Case, vocab_size: int, seed: int, text_ids: Sequence[int] = ()) -> Work:
    """Cuts prompts and guidance from a text, one behind the other, or draws random ones.

    They differ from seed to seed, so no prefix cache has seen them.
    """
    piece_lens = [case.prompt] * case.questions + [case.guidance] * case.num_second
    total = sum(piece_lens)
    if text_ids:
        if len(text_ids) < total + 1:
            raise ValueError(
                f"bench: the text must have more than {total} tokens, got {len(text_ids)}; "
                "see --data"
            )
        # Multiples of a prime spread the starts over the text.
        start = 7919 * seed % (len(text_ids) - total)
        ids = list(text_ids[start : start + total])
    else:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (total,), generator=generator).tolist()
    pieces = []
    offset = 0
    for piece_len in piece_lens:
        pieces.append(ids[offset : offset + piece_len])
        offset += piece_len
    return Work(case, seed, pieces[: case.questions], pieces[case.questions :])


def read_text(student_folder: str, data: str) -> list[int]:
    """Returns the token ids of all questions of a file, one behind the other."""
    from transformers import AutoTokenizer

    from socpo_fast.socratic.data import load_questions

    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    text = "\n\n".join(question.text for question in load_questions(data))
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


class Step(NamedTuple):
    """One forward pass: rows of the layers' linears, and rows of the LM head."""

    rows: int
    head_rows: int
    is_prefill: bool


def linear_steps(case: Case, token_budget: int = 2048) -> list[Step]:
    """Returns the passes of a case by an engine that does nothing twice.

    Rollouts of one question share the logits of its prompt, so these take one row of the LM head.
    """
    num_prompt_tokens = case.questions * case.prompt
    sizes = num_prompt_tokens, case.questions, case.num_first
    steps = _passes(*sizes, case.new, token_budget)
    if case.guidance:
        guided = case.num_second * (1 + case.guidance)
        steps += _passes(guided, case.num_second, case.num_second, case.new, token_budget)
    return steps


def _passes(
    num_tokens: int, head_rows: int, num_sequences: int, new: int, budget: int
) -> list[Step]:
    # Prefill in chunks of the budget; only the last one yields logits. The first new token comes
    # from the prompt's logits, so new - 1 rounds of decoding follow.
    chunks = [min(budget, num_tokens - start) for start in range(0, num_tokens, budget)]
    prefill = [Step(rows, 0, True) for rows in chunks[:-1]] + [Step(chunks[-1], head_rows, True)]
    return prefill + [Step(num_sequences, num_sequences, False)] * (new - 1)


def layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns (outputs, inputs) of one layer's linears, in order of use."""
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    width = config.hidden_size
    inner = config.intermediate_size
    return [(qkv, width), (width, heads), (2 * inner, width), (width, inner)]


def linear_flops(config: ModelConfig, steps: Sequence[Step]) -> float:
    """Returns the FLOPs of the linears: two a weight and row."""
    layers = config.num_layers * sum(outs * ins for outs, ins in layer_shapes(config))
    lm_head = config.vocab_size * config.hidden_size
    return 2.0 * sum(step.rows * layers + step.head_rows * lm_head for step in steps)


def linear_bytes(config: ModelConfig, steps: Sequence[Step], element_size: int = 4) -> float:
    """Returns the bytes of weights read, once a pass.

    Inputs and outputs of linears do not count, as they may stay in the cache.
    """
    layers = config.num_layers * sum(outs * ins for outs, ins in layer_shapes(config))
    lm_head = config.vocab_size * config.hidden_size
    return float(element_size) * sum(layers + (lm_head if step.head_rows else 0) for step in steps)


def roofline_s(
    config: ModelConfig,
    steps: Sequence[Step],
    *,
    gflop_s: float,
    gb_s: float,
    element_size: int,
) -> float:
    """Returns seconds of the linears at the machine's peaks.

    Each pass takes the longer of the time for its FLOPs and the time for its bytes.
    """
    return sum(
        max(
            1e-9 * linear_flops(config, [step]) / gflop_s,
            1e-9 * linear_bytes(config, [step], element_size) / gb_s,
        )
        for step in steps
    )


def prefilled_tokens(case: Case, num_rows: int) -> int:
    """Returns the tokens prefilled, if num_rows went through a layer: all that were not decoded."""
    return num_rows - (case.num_first + case.num_second) * (case.new - 1)
