"""Provides an engine whose student follows a script, and the tokenizer it speaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.types import Attempt, Question, RolloutKey, SamplingParams
from tests.helpers.tiny_tokenizers import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer(CHATML)
BRIDGE = Bridge(TOKENIZER, guidance_limit=50)
END = BRIDGE.end_of_turn_id
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=20, eos_ids=BRIDGE.eos_ids)


def question(idx: int, truth: str = "yes") -> Question:
    messages = ({"role": "user", "content": f"question {idx}"},)
    return Question(question_idx=idx, messages=messages, ground_truth=truth, data_source="test")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def contains(text: str, question: Question) -> bool:
    """Grades an attempt: it is correct if the ground truth is in its text."""
    return question.ground_truth in text


@dataclass
class ScriptedEngine:
    """A stand-in for Engine: attempt k of rollout r of question q is script[q, r][k].

    It remembers the context of every attempt.
    """

    script: dict[tuple[int, int], list[list[int]]]
    max_tokens: int = 500
    contexts: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    pending: list[tuple[RolloutKey, int, int]] = field(default_factory=list)
    pinned: list[Attempt] = field(default_factory=list)
    steps_at_resume: list[int] = field(default_factory=list)
    num_steps: int = 0
    per_step: int = 100
    eos_ids: tuple[int, ...] = PARAMS.eos_ids
    driven_by: int | None = None

    # Any tokenizer fits this student.
    student = SimpleNamespace(config=SimpleNamespace(vocab_size=2**31))

    @property
    def has_work(self) -> bool:
        return bool(self.pending)

    def submit(
        self, prompt_ids: list[int], params: SamplingParams, *, key: tuple[int, int]
    ) -> None:
        for r in range(params.n):
            self.contexts[key[1], r, 0] = list(prompt_ids)
            self.pending.append((RolloutKey(*key), r, 0))

    def resume(
        self, attempt: Attempt, suffix_ids: list[int], params: SamplingParams, *, kept_tokens: int
    ) -> None:
        self.pinned.remove(attempt)
        rollout = (attempt.key.question, attempt.rollout_idx)
        context = self.contexts[(*rollout, attempt.attempt_idx)]
        assert suffix_ids
        assert 1 <= kept_tokens <= len(context) + attempt.num_tokens
        token_ids = context + attempt.token_ids
        self.contexts[(*rollout, attempt.attempt_idx + 1)] = token_ids[:kept_tokens] + suffix_ids
        self.pending.append((attempt.key, attempt.rollout_idx, attempt.attempt_idx + 1))
        self.steps_at_resume.append(self.num_steps)

    is_ready = True

    def launch(self) -> None:
        """Does nothing: all is done in collect."""

    def collect(self) -> list[Attempt]:
        self.num_steps += bool(self.pending)
        # At most per_step attempts finish in a step, in the order in which they were asked for.
        due = self.pending[: self.per_step]
        self.pending = self.pending[self.per_step :]
        finished = []
        for key, r, k in due:
            ids = self.script[key.question, r][k]
            reason = "stop" if ids[-1] in self.eos_ids else "length"
            ones = torch.ones(len(ids))
            finished.append(Attempt(ids, -ones, ones, reason, key, r, k, 0))
        self.pinned += finished
        return finished

    def release(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            if attempt in self.pinned:
                self.pinned.remove(attempt)

    def cancel(self, key: tuple[int, int]) -> None:
        self.pending = [entry for entry in self.pending if entry[0] != key]
