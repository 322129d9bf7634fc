"""The rules of one rollout, as a state machine: no engine, no teacher, no clock, no printing.

    episode.attempted(attempt)   -> the next request to the teacher, or None: the rollout has ended
    episode.guided(guidance)     -> the next context to sample behind, or None: the rollout has
    ended

Read Episode top-down. Who samples and who asks is a driver's business: rollout.py drives it with
the paged engine, integrations/episode.py with anybody's generator. Every rule stands here and
nowhere
else: when a rollout ends, what the teacher sees, how much of an attempt the next one sees, leaks,
overflow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.ops.decay_advantage import MAX_ATTEMPTS
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import Grader, as_grader
from socpo_fast.socratic.history import template_seam
from socpo_fast.socratic.leak import leaks_answer, mask_answer
from socpo_fast.types import (
    Attempt,
    Guidance,
    GuidanceFailed,
    GuidanceRequest,
    Question,
    Rollout,
    ShownGuidance,
    Turn,
)

Context = Literal["tokens", "template"]
OnLeak = Literal["keep", "drop", "mask"]
View = Literal["head_tail", "head"]


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """How episodes are played.

    Args:
        group_size:     rollouts of a question, >= 1.
        max_attempts:   K, in [1, 256]; 1 never asks the teacher.
        attempt_limit:  tokens of a wrong attempt that the next one sees, >= 1; the rest stays in
                        the rollout and is trained.
        guidance_limit: tokens of the teacher's message that the student sees, >= 1.
        context:        "tokens": the next attempt sees what was sampled; "template": what the chat
                        template makes of it once it is history. What was sampled is trained anyway.
        on_leak:        guidance that states the answer (leak.py) is kept, ends the rollout
                        ("drop"), or is shown with [...] in place of the answer ("mask").
        view:           what the teacher sees of an attempt longer than attempt_limit.
        reveal_answer:  the teacher sees ground_truth.
        show_reference: the teacher sees reference_solution.
        guidance_timeout_s: > 0, for one guidance, repeats included, from when it is sent.

    Raises:
        ValueError: a value breaks its rule.
    """

    group_size: int = 8
    max_attempts: int = 2
    attempt_limit: int = 1024
    guidance_limit: int = 2048
    context: Context = "tokens"
    on_leak: OnLeak = "keep"
    view: View = "head_tail"
    reveal_answer: bool = False
    show_reference: bool = False
    guidance_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        rules = {
            "group_size": (self.group_size >= 1, ">= 1"),
            "max_attempts": (1 <= self.max_attempts <= MAX_ATTEMPTS, f"in [1, {MAX_ATTEMPTS}]"),
            "attempt_limit": (self.attempt_limit >= 1, ">= 1"),
            "guidance_limit": (self.guidance_limit >= 1, ">= 1"),
            "guidance_timeout_s": (0 < self.guidance_timeout_s < float("inf"), "finite and > 0"),
        }
        for name, (holds, rule) in rules.items():
            check_rule("RolloutOptions", name, getattr(self, name), holds, rule)
        for name, words in {"context": Context, "on_leak": OnLeak, "view": View}.items():
            check_word("RolloutOptions", name, getattr(self, name), get_args(words))


class Limits(NamedTuple):
    """What an attempt and its whole context may have, in tokens."""

    max_new_tokens: int
    max_tokens: int  # context and new tokens together


class NextContext(NamedTuple):
    """What to sample behind: the first kept_tokens tokens of the row so far, then suffix_ids."""

    kept_tokens: int
    suffix_ids: list[int]


class Episode:
    """One rollout of a question, from its prompt to its end.

    Args:
        question:    what is asked.
        bridge:      the student's chat template; its guidance_limit must be that of the options.
        grader:      text and question -> verdict.
        options:     the rules' numbers; one attempt after the other is added until it has ended.
        limits:      what the student can hold.
        rollout_idx: which of the question's rollouts.
        prompt_ids:  the question's, where the caller has them already.

    Raises:
        ValueError: the bridge cuts guidance at another limit than the options say.
    """

    def __init__(
        self,
        question: Question,
        *,
        bridge: Bridge,
        grader: Grader,
        options: RolloutOptions,
        limits: Limits,
        rollout_idx: int = 0,
        prompt_ids: list[int] | None = None,
    ):
        check_rule(
            "Episode",
            "bridge.guidance_limit",
            bridge.guidance_limit,
            bridge.guidance_limit == options.guidance_limit,
            f"options.guidance_limit {options.guidance_limit}",
            "make both from one number",
        )
        self.question = question
        self.options = options
        self.limits = limits
        self.bridge = bridge
        self.grader = as_grader(grader)
        self.notes: list[str] = []  # what a person should be told
        self.rollout = Rollout(
            question_idx=question.question_idx,
            rollout_idx=rollout_idx,
            prompt_ids=bridge.prompt_ids(question.messages) if prompt_ids is None else prompt_ids,
            data_source=question.data_source,
        )

    def attempted(self, attempt: Attempt) -> GuidanceRequest | None:
        """Adds an attempt and grades it; returns what to ask the teacher, None at the end."""
        turn = Turn(attempt=attempt, text=self.bridge.decode(attempt.token_ids))
        self.rollout.turns.append(turn)  # before the grader, which may raise
        turn.raw_reward, turn.is_correct, turn.reward_parts = self.grader.grade(
            turn.text, self.question
        )
        if turn.is_correct or len(self.rollout.turns) == self.options.max_attempts:
            self.rollout.end_reason = "correct" if turn.is_correct else "max_attempts"
            return None
        return GuidanceRequest(
            question=self.question.text,
            student_answer=self._visible_text(attempt.token_ids),
            ground_truth=self.question.ground_truth if self.options.reveal_answer else None,
            reference_solution=self.question.reference_solution
            if self.options.show_reference
            else None,
            key=attempt.key,
            rollout_idx=attempt.rollout_idx,
            attempt_idx=attempt.attempt_idx,
        )

    def guided(self, guidance: Guidance | GuidanceFailed | None) -> NextContext | None:
        """Takes what the teacher said of the last attempt, or why it said nothing; returns what to
        sample behind next, None at the end."""
        if not isinstance(guidance, Guidance):
            self.rollout.end_reason = "guidance_failed"
            self.rollout.failure = "none" if guidance is None else guidance.kind
            return None
        # Half a surrogate pair is no text.
        raw_text = self.bridge.fit(guidance.text.encode("utf-8", "replace").decode().strip())
        leaks = leaks_answer(raw_text, self.question)
        shown = ShownGuidance(raw_text=raw_text, text=raw_text, leaks=leaks)
        self.rollout.turns[-1].guidance = shown
        if self.options.on_leak == "drop" and leaks:
            self.rollout.end_reason = "leaked"
            # The same words each time, so that Python tells them once.
            self.notes.append(
                "teacher: guidance that states the answer is dropped, and counted in "
                "guidance/leaked"
            )
            return None
        if self.options.on_leak == "mask":
            # Again and again, since a shorter text may state what a longer one did not.
            while leaks_answer(shown.text, self.question):
                shown.text = self.bridge.fit(mask_answer(shown.text, self.question))
        kept_tokens, bridge_ids = self._seam(shown.text)
        if kept_tokens + len(bridge_ids) + self.limits.max_new_tokens > self.limits.max_tokens:
            self.rollout.end_reason = "overflow"
            return None
        shown.kept_tokens = kept_tokens
        shown.bridge_ids = bridge_ids
        return NextContext(kept_tokens, bridge_ids)

    def _seam(self, text: str) -> NextContext:
        """How much of the row stays, and what stands between it and the next attempt."""
        turn_idx = len(self.rollout.turns) - 1
        limit = self.options.attempt_limit
        if self.options.context == "template":
            seam = template_seam(
                self.bridge, self.question.messages, self.rollout, text, attempt_limit=limit
            )
            if seam is not None:
                return NextContext(*seam)
            self.notes.append(
                "chat template: cannot render the history of question "
                f"{self.rollout.question_idx} rollout {self.rollout.rollout_idx}; it stays as "
                "sampled"
            )
        token_ids = self.rollout.turns[-1].attempt.token_ids
        ended = len(token_ids) <= limit and token_ids[-1] == self.bridge.end_of_turn_id
        return NextContext(
            kept_tokens=self.rollout.context_length(turn_idx) + min(len(token_ids), limit),
            suffix_ids=self.bridge.bridge_ids(text, ended=ended),
        )

    def _visible_text(self, token_ids: Sequence[int]) -> str:
        """All of it, or of a long attempt its head (and its tail, where the final answer is)."""
        limit = self.options.attempt_limit
        if len(token_ids) <= limit:
            return self.bridge.decode(token_ids)
        if self.options.view == "head":
            return self.bridge.decode(token_ids[:limit])
        tail = limit // 2
        head_ids = token_ids[: limit - tail]
        tail_ids = token_ids[len(token_ids) - tail :]
        return self.bridge.decode(head_ids) + "\n[...]\n" + self.bridge.decode(tail_ids)
