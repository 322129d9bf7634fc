"""Holds the rules of one rollout, as a state machine: no engine, no teacher, no clock, no printing.

                  prompt
                    |
                    v   attempt       correct, or the last attempt
        +-----> sampling --> add_attempt() ----------------------------> end
        |                      | GuidanceRequest
        |                      v
        |                   teacher --> add_guidance() ----------------> end
        |                                 |    no guidance, it leaks, or overflow
        +---------------------------------+
                     NextContext

Read Episode top-down. A driver samples and asks the teacher: rollout.py with the paged engine,
integrations/episode.py with any generator. Every rule is here and nowhere else: when a rollout
ends, what the teacher sees, how much of an attempt the next one sees, leaks, overflow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from socpo_fast.config.sections import MOST_ROLLOUTS
from socpo_fast.ops._checks import check_rule, check_word
from socpo_fast.ops.decay_advantage import MAX_ATTEMPTS
from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import Grader, as_grader
from socpo_fast.socratic.history import template_seam
from socpo_fast.socratic.leak import leaks_answer, mask_answer
from socpo_fast.socratic.thoughts import opened_thoughts
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
    """The settings of an episode.

    Args:
        group_size:     rollouts of a question, in [1, MOST_ROLLOUTS].
        max_attempts:   K, in [1, 256]; with 1 the teacher is never asked.
        attempt_limit:  most tokens of a wrong attempt that the next one sees, >= 1. The tokens
                        behind them stay in the rollout and are trained.
        guidance_limit: most tokens of the teacher's message that the student sees, >= 1.
        context:        what the next attempt sees of the history. "tokens": what was sampled.
                        "template": what the chat template makes of it. Both train what was sampled.
        on_leak:        what happens to guidance that states the answer (leak.py). "keep": it is
                        shown. "drop": the rollout ends. "mask": it is shown with [...] in place of
                        the answer.
        view:           what the teacher sees of an attempt longer than attempt_limit: its beginning
                        ("head"), or both ends ("head_tail").
        reveal_answer:  whether the teacher sees ground_truth.
        show_reference: whether the teacher sees reference_solution.
        guidance_timeout_s: > 0; time limit of one guidance, from when the request is sent,
                        repeated calls included.

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
            "group_size": (1 <= self.group_size <= MOST_ROLLOUTS, f"in [1, {MOST_ROLLOUTS}]"),
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
    """The most tokens that an attempt, and an attempt with its context, may have."""

    max_new_tokens: int
    max_tokens: int  # context and new tokens together


class NextContext(NamedTuple):
    """The context of the next attempt.

    It is the first kept_tokens tokens of the row so far, then suffix_ids:

        row so far     prompt | attempt 0
                       '-----------'
        next context    kept_tokens  | suffix_ids
    """

    kept_tokens: int
    suffix_ids: list[int]


class Episode:
    """One rollout of a question, from its prompt to its end.

    Args:
        question:    the data set item.
        bridge:      the student's chat template; its guidance_limit must be that of the options.
        grader:      text and question -> verdict.
        options:     the settings of the rules.
        limits:      how many tokens the student can hold.
        rollout_idx: index of this rollout in the question's group.
        prompt_ids:  ids of the question's prompt, if the caller has them already.

    Raises:
        ValueError: the bridge's guidance_limit is not that of the options.
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
        # The grader sees these with the answer, whose thoughts then end where they end.
        self.opened_thoughts = opened_thoughts(bridge.after)
        self.notes: list[str] = []  # sentences for the user; the driver shows them
        self.rollout = Rollout(
            question_idx=question.question_idx,
            rollout_idx=rollout_idx,
            prompt_ids=bridge.prompt_ids(question.messages) if prompt_ids is None else prompt_ids,
            data_source=question.data_source,
        )

    def add_attempt(self, attempt: Attempt) -> GuidanceRequest | None:
        """Adds an attempt and grades it; returns the request to the teacher, None at the end."""
        turn = Turn(attempt=attempt, text=self.bridge.decode(attempt.token_ids))
        self.rollout.turns.append(turn)  # before the grader, which may raise
        turn.raw_reward, turn.is_correct, turn.reward_parts = self.grader.grade(
            self.opened_thoughts + turn.text, self.question
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

    def add_guidance(self, guidance: Guidance | GuidanceFailed | None) -> NextContext | None:
        """Adds guidance after the last attempt; returns the next context, None at the end.

        guidance: the teacher's message, or the reason that there is none.
        """
        if not isinstance(guidance, Guidance):
            self.rollout.end_reason = "guidance_failed"
            self.rollout.failure = "none" if guidance is None else guidance.kind
            return None
        # A teacher's text may hold half of a surrogate pair, which no tokenizer takes.
        raw_text = self.bridge.fit(guidance.text.encode("utf-8", "replace").decode().strip())
        leaks = leaks_answer(raw_text, self.question)
        shown = ShownGuidance(raw_text=raw_text, text=raw_text, leaks=leaks)
        self.rollout.turns[-1].guidance = shown
        if self.options.on_leak == "drop" and leaks:
            self.rollout.end_reason = "leaked"
            # The same words each time, so that Python shows the warning only once.
            self.notes.append(
                "teacher: guidance that states the answer is dropped, and counted in "
                "guidance/leaked"
            )
            return None
        if self.options.on_leak == "mask":
            # fit() may cut the masked text, and a shorter text may state the answer where a longer
            # one did not. So repeat until it does not.
            while leaks_answer(shown.text, self.question):
                shown.text = self.bridge.fit(mask_answer(shown.text, self.question))
        kept_tokens, bridge_ids = self._seam(shown.text)
        # There must be room for a next attempt of full length.
        if kept_tokens + len(bridge_ids) + self.limits.max_new_tokens > self.limits.max_tokens:
            self.rollout.end_reason = "overflow"
            return None
        shown.kept_tokens = kept_tokens
        shown.bridge_ids = bridge_ids
        return NextContext(kept_tokens, bridge_ids)

    def _seam(self, text: str) -> NextContext:
        """Returns how many tokens of the row the next attempt sees, and the bridge behind them."""
        turn_idx = len(self.rollout.turns) - 1
        limit = self.options.attempt_limit
        if self.options.context == "template":
            next_context = template_seam(
                self.bridge, self.question.messages, self.rollout, text, attempt_limit=limit
            )
            if next_context is not None:
                return NextContext(*next_context)
            self.notes.append(
                "chat template: cannot render the history of question "
                f"{self.rollout.question_idx} rollout {self.rollout.rollout_idx}; it stays as "
                "sampled"
            )
        # An attempt that was cut, here or at max_new_tokens, does not end with the end of turn, so
        # the bridge then supplies it.
        token_ids = self.rollout.turns[-1].attempt.token_ids
        ended = len(token_ids) <= limit and token_ids[-1] == self.bridge.end_of_turn_id
        return NextContext(
            kept_tokens=self.rollout.context_length(turn_idx) + min(len(token_ids), limit),
            suffix_ids=self.bridge.bridge_ids(text, ended=ended),
        )

    def _visible_text(self, token_ids: Sequence[int]) -> str:
        """Returns what the teacher sees of an attempt; view selects the part of a long one."""
        limit = self.options.attempt_limit
        if len(token_ids) <= limit:
            return self.bridge.decode(token_ids)
        if self.options.view == "head":
            return self.bridge.decode(token_ids[:limit])
        # The final answer is in the tail.
        tail_length = limit // 2
        head_ids = token_ids[: limit - tail_length]
        tail_ids = token_ids[len(token_ids) - tail_length :]
        return self.bridge.decode(head_ids) + "\n[...]\n" + self.bridge.decode(tail_ids)
