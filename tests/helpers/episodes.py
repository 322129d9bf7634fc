"""Plays one scripted episode under any tokenizer.

Read play first. rendering is the chat template's own text of the same dialogue, to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.episode import RolloutOptions
from socpo_fast.socratic.rollout import socratic_rollouts
from socpo_fast.socratic.teachers.base import Teacher
from socpo_fast.types import Guidance, GuidanceRequest, Question, Rollout, SamplingParams
from tests.helpers.scripted import ScriptedEngine

PROMPT = ({"role": "user", "content": "1 + 1?"},)
WITH_SYSTEM = ({"role": "system", "content": "Be exact."}, *PROMPT)


@dataclass
class ScriptedTeacher(Teacher):
    """A teacher that says texts[k] after attempt k, even if that is an empty text."""

    texts: Sequence[str]
    immediate: bool = True

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        return Guidance(text=self.texts[request.attempt_idx])


@dataclass
class Episode:
    """A played episode; contexts[k] are the token ids that attempt k was sampled behind."""

    bridge: Bridge
    rollout: Rollout
    contexts: list[list[int]]


def play(
    bridge: Bridge,
    answers: Sequence[Sequence[int]],
    guidance: Sequence[str],
    *,
    messages: Sequence[dict[str, str]] = PROMPT,
    max_tokens: int = 100_000,
    **options,
) -> Episode:
    """Plays an episode in which every answer is wrong.

    Answer k is followed by guidance[k], the last answer by nothing.
    """
    script = {(0, 0): [list(ids) for ids in answers]}
    engine = ScriptedEngine(script, max_tokens=max_tokens, eos_ids=bridge.eos_ids)
    question = Question(
        question_idx=0, messages=tuple(messages), ground_truth="two", data_source="test"
    )
    (rollout,) = socratic_rollouts(
        engine,
        bridge.tokenizer,
        [question],
        teacher=ScriptedTeacher(guidance),
        grader=lambda _text, _question: False,
        params=SamplingParams(temperature=1.0, max_new_tokens=20, eos_ids=bridge.eos_ids),
        bridge=bridge,
        options=RolloutOptions(
            group_size=1,
            max_attempts=len(answers),
            guidance_limit=bridge.guidance_limit,
            **options,
        ),
    )
    assert not engine.pinned
    return Episode(
        bridge, rollout, [engine.contexts[0, 0, k] for k in range(len(rollout.attempts))]
    )


def cuts(rollout: Rollout) -> list[int | None]:
    """Returns, for each attempt but the last, how many of its tokens the next attempt saw.

    None: all of them. -m: none of them, and the last m tokens before the attempt were dropped as
    well.
    """
    tokens_seen: list[int | None] = []
    for k, attempt in enumerate(rollout.attempts[:-1]):
        cut = rollout.next_context(k)[0] - rollout.context_length(k)
        tokens_seen.append(None if cut == attempt.num_tokens else cut)
    return tokens_seen


def bridges(rollout: Rollout) -> list[list[int]]:
    """Returns the bridge token ids between each two attempts."""
    return [rollout.next_context(k)[1] for k in range(len(rollout.turns) - 1)]


def shown(rollout: Rollout) -> list[str]:
    """Returns the texts of guidance that the student saw."""
    guidances = [turn.guidance for turn in rollout.turns if turn.guidance is not None]
    return [guidance.text for guidance in guidances if guidance.bridge_ids is not None]


def rendering(
    bridge: Bridge,
    texts: Sequence[str],
    guidance: Sequence[str],
    messages: Sequence[dict[str, str]] = PROMPT,
) -> str:
    """Renders the dialogue up to the next answer with the chat template itself."""
    dialogue = list(messages)
    for text, guidance_text in zip(texts, guidance, strict=True):
        dialogue += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": guidance_text},
        ]
    return bridge.render(dialogue)


def text_of(bridge: Bridge, token_ids: Sequence[int]) -> str:
    """Decodes token ids, special tokens included."""
    return str(
        bridge.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def answer_ids(bridge: Bridge, text: str, *, ended: bool = True) -> list[int]:
    """Returns the token ids of an answer as a student would sample it.

    The answer stands behind the generation prompt; with `ended` it includes the end of turn.
    """
    first_word = bridge.exact_text(bridge.untrusted_ids("x"))
    # The template ends with a space, and sentencepiece adds one of its own before a word.
    space = " " if bridge.before.endswith(" ") and first_word == "x" else ""
    return bridge.untrusted_ids(space + text) + ([bridge.end_of_turn_id] if ended else [])
