"""Defines the data types that modules exchange, in the order in which an episode uses them.

    Question, SamplingParams -> Attempt -> GuidanceRequest -> Guidance -> Turn -> Rollout

    Rollout
      prompt_ids
      turns[0]   attempt: tokens, logprobs    is_correct, reward    guidance: text, bridge_ids
      turns[1]   attempt: ..                  ..                    None after the last attempt

These are plain data with checks of their values and no other behaviour. Everything is on the host;
tensors are CPU tensors. The module imports nothing of ours.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item of a data set."""

    question_idx: int
    messages: tuple[dict[str, str], ...]  # the chat before the answer: ({"role", "content"}, ..)
    ground_truth: str
    data_source: str
    reference_solution: str | None = None

    @property
    def text(self) -> str:
        """Returns the last user message, which the teacher sees as the question."""
        return next(
            message["content"] for message in reversed(self.messages) if message["role"] == "user"
        )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The sampling parameters of one request.

    Args:
        temperature:    0 (greedy) or >= 1e-4.
        max_new_tokens: >= 1, the longest attempt.
        eos_ids:        any of these token ids ends an attempt, unless ignore_eos.
        n:              >= 1, rollouts of the same prompt.
        top_p:          in (0, 1], 1 is off.
        top_k:          >= 0, 0 is off.
        min_p:          in [0, 1), 0 is off.

    The first three have no defaults: a wrong value gives no error, only wrong results.
    """

    temperature: float
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    @property
    def is_filtered(self) -> bool:
        """Whether top-k, top-p or min-p restricts what is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def __post_init__(self) -> None:
        # The exact bounds are what fp32 and 64-bit keys can hold. So the sampler never has to
        # refuse a value in the middle of an engine step.
        rules = {
            "temperature": (
                self.temperature == 0 or 1e-4 <= self.temperature <= 1e6,
                "0 (greedy) or in [1e-4, 1e6]",
            ),
            "max_new_tokens": (self.max_new_tokens >= 1, ">= 1"),
            "n": (self.n >= 1, ">= 1"),
            "top_p": (1e-6 <= self.top_p <= 1.0, "in [1e-6, 1]"),
            "top_k": (0 <= self.top_k < 2**31, "in [0, 2^31)"),
            "min_p": (0.0 <= self.min_p <= 1.0 - 1e-6, "in [0, 1 - 1e-6]"),
            "seed": (-(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            "eos_ids": (self.ignore_eos or len(self.eos_ids) > 0, "non-empty unless ignore_eos"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(
                    f"SamplingParams: {name} must be {rule}, got {getattr(self, name)!r}"
                )


class RolloutKey(NamedTuple):
    """Identifies the prompt of a group for the sampling noise.

    The noise of a token is a function of (seed, key, rollout, attempt, position, token id) only, so
    that it does not depend on what else is sampled at the same time.
    """

    batch: int
    question: int


@dataclass
class EngineStats:
    """Counts since the engine was made; pages_free and pages_total describe the present."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    pages_free: int = 0
    pages_total: int = 0


@dataclass(eq=False)
class Attempt:
    """One answer of the student, exactly as sampled.

    It includes the end-of-turn token if finish_reason is "stop".
    """

    token_ids: list[int]
    # [L] fp32, nats. From the sampler, at its temperature but without top-k, top-p and min-p: a
    # log-softmax over the full vocabulary, which the trainer can reproduce.
    logprobs: Tensor
    kept_mass: Tensor  # [L] fp32, probability that top-k, top-p and min-p left; 1 if they are off
    finish_reason: Literal["stop", "length"]
    key: RolloutKey
    rollout_idx: int
    attempt_idx: int
    policy_version: int

    @property
    def num_tokens(self) -> int:
        """Returns the number of sampled tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class GuidanceRequest:
    """Everything that a teacher may see of one wrong attempt.

    Fields:
        question:           the last user message.
        student_answer:     the attempt as text. Of one longer than rollout.attempt_limit its
                            beginning and end, or only the beginning (teacher.view).
        ground_truth:       None, unless teacher.reveal_answer is true.
        reference_solution: None, unless teacher.show_reference is true and the question has one.
        key:                which batch and question it is; rollout_idx and attempt_idx count from
                            0 within the question and the rollout.
    """

    question: str
    student_answer: str
    ground_truth: str | None
    reference_solution: str | None
    key: RolloutKey
    rollout_idx: int
    attempt_idx: int


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A teacher's message after a wrong attempt. A teacher may as well return the text alone."""

    text: str


class GuidanceFailed(Exception):
    """Raised or returned if there is no guidance. Metrics count by `kind`; the text is for people.

    Kinds: timeout, connection, status_NNN, redirect, too_large, not_json, circuit_open (of a
    server); cut (the message ended inside the teacher's thoughts); none (nothing was said);
    exception (in a teacher's code or a user's function); too_long (for a local teacher's context).
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = re.sub(r"\W+", "_", kind.lower(), flags=re.ASCII)  # part of a metric's name


@dataclass(eq=False, kw_only=True)
class ShownGuidance:
    """The guidance after an attempt, and the context of the next attempt that it leads to.

        context of the next attempt = (context + attempt)[:kept_tokens] + bridge_ids

    Fields:
        raw_text:    what the teacher said, as much of it as fits.
        text:        what the student saw.
        leaks:       whether raw_text states the answer, by socratic/leak.py.
        kept_tokens, bridge_ids: as above. Both are None if the guidance was not shown, because it
                     leaked the answer or the context would have become too long.
    """

    raw_text: str
    text: str
    leaks: bool = False
    kept_tokens: int | None = None
    bridge_ids: list[int] | None = None


@dataclass(eq=False, kw_only=True)
class Turn:
    """One attempt with its text, verdict, reward, advantage and the guidance that followed it."""

    attempt: Attempt
    text: str = ""  # decoded, for the grader and people
    is_correct: bool = False
    raw_reward: float = 0.0  # the grader's, in [0, 1]
    reward_parts: dict[str, float] = field(default_factory=dict)  # if the grader names its parts
    reward: float | None = None  # after credit and decay; None: not computed yet
    advantage: float | None = None
    guidance: ShownGuidance | None = None  # None: no guidance was asked for, or it failed


@dataclass(eq=False, kw_only=True)
class Rollout:
    """One episode, turn by turn.

    Its row of tokens is the prompt, the first attempt, the bridge (guidance within the chat
    template), the second attempt and so on. kept_tokens is the number of tokens of the row, counted
    from its start, that the next attempt sees:

        prompt | attempt 0 . . . . | bridge | attempt 1
        <---- kept_tokens ---->  (cut)

    An attempt may be cut, as here. A chat template that rewrites the history may also drop tokens
    before the attempt.
    """

    question_idx: int
    rollout_idx: int
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    end_reason: (
        Literal["correct", "max_attempts", "guidance_failed", "leaked", "overflow"] | None
    ) = None
    failure: str = ""  # the kind of GuidanceFailed, if end_reason is guidance_failed
    teacher_wait_s: float = 0.0
    data_source: str = ""

    @property
    def attempts(self) -> list[Attempt]:
        """Returns the attempts of all turns."""
        return [turn.attempt for turn in self.turns]

    @property
    def num_sampled(self) -> int:
        """Returns the number of tokens of all attempts."""
        return sum(attempt.num_tokens for attempt in self.attempts)

    def context_ids(self, turn_idx: int) -> list[int]:
        """Returns the context of attempt turn_idx: the token ids before its first one.

        turn_idx = len(turns) gives the context of the next attempt.

        Raises:
            ValueError: there is no such turn, or the guidance before it was not shown.
        """
        context = list(self.prompt_ids)
        for idx in range(turn_idx):
            kept_tokens, bridge_ids = self.next_context(idx)
            context = (context + self.turns[idx].attempt.token_ids)[:kept_tokens] + bridge_ids
        return context

    def context_length(self, turn_idx: int) -> int:
        """Returns len(context_ids(turn_idx)), without building the list."""
        if turn_idx == 0:
            return len(self.prompt_ids)
        kept_tokens, bridge_ids = self.next_context(turn_idx - 1)
        return kept_tokens + len(bridge_ids)

    def next_context(self, turn_idx: int) -> tuple[int, list[int]]:
        """Returns (kept_tokens, bridge_ids) between attempt turn_idx and the next one.

        Raises:
            ValueError: there is no such turn, or no guidance was shown after it.
        """
        where = f"rollout {self.rollout_idx} of question {self.question_idx}"
        if not 0 <= turn_idx < len(self.turns):
            raise ValueError(
                f"{where}: turn must be in [0, {len(self.turns)}), got {turn_idx}; there is no more"
            )
        guidance = self.turns[turn_idx].guidance
        if guidance is None or guidance.kept_tokens is None or guidance.bridge_ids is None:
            raise ValueError(
                f"{where}: turns[{turn_idx}].guidance must have been shown, got {guidance}; "
                "set kept_tokens and bridge_ids"
            )
        return guidance.kept_tokens, guidance.bridge_ids
