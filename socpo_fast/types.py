"""The nouns that cross module borders, in the order an episode meets them.

Question -> SamplingParams -> Attempt -> GuidanceRequest -> Guidance -> Rollout. Plain data, no
behaviour beyond checks at the door; everything here is on the host, tensors are CPU tensors.
Imports nothing of ours.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Question:
    """One data set item. `messages` is the chat up to the student's turn: ({"role", "content"},
    ..).
    """

    question_idx: int
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    data_source: str
    reference_solution: str | None = None

    @property
    def text(self) -> str:
        """The last user message: what the teacher sees as the question."""
        return next(
            message["content"] for message in reversed(self.messages) if message["role"] == "user"
        )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the engine samples one request.

    n rollouts of the same prompt; temperature 0 (greedy) or >= 1e-4; top_p in (0, 1], 1 is off;
    top_k >= 0, 0 is off; min_p in [0, 1), 0 is off; max_new_tokens >= 1 an attempt; an id of
    eos_ids ends an attempt unless ignore_eos. Temperature, length and eos have no default: a wrong
    value there is silent. The exact bounds are those that fp32 and 64-bit keys can hold, so that
    the sampler never has to refuse in the middle of a step.
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
    """Names a prompt: a token's sampling noise depends on (seed, this, rollout, attempt, position,
    token id) only.
    """

    batch: int
    question: int


@dataclass
class EngineStats:
    """Counts since the engine was made, except pages_*, which are of now."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    pages_free: int = 0
    pages_total: int = 0


@dataclass(eq=False)
class Attempt:
    """One answer of the student, exactly as sampled (the end-of-turn token included when
    finish_reason is "stop").
    """

    token_ids: list[int]
    logprobs: (
        Tensor  # [L] fp32, nats: the sampler's, under temperature only, over the full vocabulary
    )
    kept_mass: (
        Tensor  # [L] fp32, probability mass that top-k, top-p and min-p kept; 1 when they are off
    )
    finish_reason: Literal["stop", "length"]
    key: RolloutKey
    rollout_idx: int
    attempt_idx: int
    policy_version: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class GuidanceRequest:
    """What a teacher may see of one wrong attempt. None = withheld or not known."""

    question: str
    student_answer: str
    ground_truth: str | None
    reference_solution: str | None
    key: RolloutKey
    rollout_idx: int
    attempt_idx: int


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """A teacher's message after a wrong attempt."""

    text: str


class GuidanceFailed(Exception):
    """Why there is no guidance: kind is a word that metrics count by, the text a reason for a
    person.

    Kinds: timeout, connection, status_NNN, redirect, too_large, not_json, circuit_open (a
    server's); cut (it ended inside the teacher's thoughts), none (nothing was said), exception (a
    function's, or a teacher's own), too_long (for a local teacher's context).
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = re.sub(r"\W+", "_", kind.lower(), flags=re.ASCII)  # part of a metric's name


@dataclass(eq=False, kw_only=True)
class ShownGuidance:
    """What the teacher said after an attempt, and how it leads to the next one.

    raw_text is what the teacher said, as much of it as fits, and leaks says whether that states the
    answer, by socratic/leak.py; text is what the student saw. The next
    attempt was sampled behind the first kept_tokens tokens of the row so far and bridge_ids; both
    are None where the guidance was not shown (it leaked the answer, or the context would overflow).
    """

    raw_text: str
    text: str
    leaks: bool = False
    kept_tokens: int | None = None
    bridge_ids: list[int] | None = None


@dataclass(eq=False, kw_only=True)
class Turn:
    """One attempt and all known of it. reward is after credit and decay; None = not yet."""

    attempt: Attempt
    text: str = ""  # decoded, for the grader and people
    is_correct: bool = False
    raw_reward: float = 0.0  # what the grader says, in [0, 1]
    reward_parts: dict[str, float] = field(default_factory=dict)  # of a grader that names parts
    reward: float | None = None
    advantage: float | None = None
    guidance: ShownGuidance | None = (
        None  # what led to the next turn; None: the teacher said nothing
    )


@dataclass(eq=False, kw_only=True)
class Rollout:
    """One episode, turn by turn.

    Its row is the prompt, the first attempt, the bridge around the guidance, the second attempt and
    so on. How much of the row the next attempt sees is one absolute number, kept_tokens: an attempt
    may be cut, and a template that rewrites history may drop tokens from before it too.
    """

    question_idx: int
    rollout_idx: int
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    end_reason: (
        Literal["correct", "max_attempts", "guidance_failed", "leaked", "overflow"] | None
    ) = None
    failure: str = ""  # where end_reason is guidance_failed: the kind, from GuidanceFailed
    teacher_wait_s: float = 0.0
    data_source: str = ""

    @property
    def attempts(self) -> list[Attempt]:
        return [turn.attempt for turn in self.turns]

    @property
    def num_sampled(self) -> int:
        """Tokens of all attempts."""
        return sum(attempt.num_tokens for attempt in self.attempts)

    def context_ids(self, turn_idx: int) -> list[int]:
        """Token ids that attempt turn_idx was sampled behind; for the number of turns, that the
        next will be.

        Raises:
            ValueError: there is no such context: no such turn, or the guidance before it was not
                        shown.
        """
        context = list(self.prompt_ids)
        for idx in range(turn_idx):
            kept_tokens, bridge_ids = self.seam(idx)
            context = (context + self.turns[idx].attempt.token_ids)[:kept_tokens] + bridge_ids
        return context

    def context_length(self, turn_idx: int) -> int:
        """Returns len(context_ids(turn_idx)), without making them."""
        if turn_idx == 0:
            return len(self.prompt_ids)
        kept_tokens, bridge_ids = self.seam(turn_idx - 1)
        return kept_tokens + len(bridge_ids)

    def seam(self, turn_idx: int) -> tuple[int, list[int]]:
        """(kept_tokens, bridge_ids) between an attempt and the next one.

        Raises:
            ValueError: no such turn, or no guidance was shown after it.
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
