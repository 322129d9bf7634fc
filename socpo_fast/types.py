"""The nouns that cross module borders, in the order an episode meets them.

Question -> SamplingParams -> Attempt -> GuidanceRequest -> Guidance -> Rollout. Plain data, no behaviour beyond
checks at the door; everything here is on the host, tensors are CPU tensors. Imports nothing of ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Question:
    """One data set item. `messages` is the chat up to the student's turn: ({"role", "content"}, ..)."""

    question_idx: int
    messages: tuple[dict[str, str], ...]
    ground_truth: str
    data_source: str
    reference_solution: str | None = None

    @property
    def text(self) -> str:
        """The last user message: what the teacher sees as the question."""
        return next(message["content"] for message in reversed(self.messages) if message["role"] == "user")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the engine samples one request.

    n rollouts of the same prompt; temperature 0 (greedy) or >= 1e-4; top_p in (0, 1], 1 is off; top_k >= 0, 0 is off;
    min_p in [0, 1), 0 is off; max_new_tokens >= 1 an attempt; an id of eos_ids ends an attempt unless ignore_eos.
    Temperature, length and eos have no default: a wrong value there is silent. The exact bounds are those that fp32 and
    64-bit keys can hold, so that the sampler never has to refuse in the middle of a step.
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
            "temperature": (self.temperature == 0 or 1e-4 <= self.temperature <= 1e6, "0 (greedy) or in [1e-4, 1e6]"),
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
                raise ValueError(f"SamplingParams: {name} must be {rule}, got {getattr(self, name)!r}")


class RolloutKey(NamedTuple):
    """Names a prompt: a token's sampling noise depends on (seed, this, rollout, attempt, position, token id) only."""

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


@dataclass(frozen=True)
class Handle:
    """What was submitted: attempts with this key and attempt_idx, rollout_idx in range(num_rollouts), will finish."""

    key: RolloutKey
    attempt_idx: int
    num_rollouts: int


@dataclass(eq=False)
class Attempt:
    """One answer of the student, exactly as sampled (the end-of-turn token included when finish_reason is "stop")."""

    token_ids: list[int]
    logprobs: Tensor  # [L] fp32, nats: the sampler's, under temperature only, over the full vocabulary
    kept_mass: Tensor  # [L] fp32, probability mass that top-k, top-p and min-p kept; 1 when they are off
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
    duration_s: float = 0.0


EndReason = Literal["correct", "max_attempts", "guidance_failed", "leaked", "overflow"]


@dataclass(eq=False, kw_only=True)
class Rollout:
    """All attempts and guidance of one episode, in order.

    The row a model would see is prompt_ids + attempts[0] + bridges[0] + attempts[1] + ..; bridges[k] stands between
    attempts k and k + 1; cuts[k] is how many tokens of attempt k attempt k + 1 sees, None = all of them; -m = none, and
    the last m tokens of what attempt k had seen are gone too (a template that rewrites the prompt's end), never all.
    """

    question_idx: int
    rollout_idx: int
    prompt_ids: list[int]
    attempts: list[Attempt] = field(default_factory=list)
    bridges: list[list[int]] = field(default_factory=list)
    cuts: list[int | None] = field(default_factory=list)
    guidance: list[str] = field(default_factory=list)  # the texts behind the bridges
    said: list[str] = field(default_factory=list)  # what the teacher said, before on_leak; of a long text the head
    texts: list[str] = field(default_factory=list)  # decoded attempts, for the grader and people
    is_correct: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # per attempt; after decay once the batch is complete
    advantages: list[float] = field(default_factory=list)
    end_reason: EndReason | None = None
    teacher_wait_s: float = 0.0
    data_source: str = ""
