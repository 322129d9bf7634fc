"""One scripted episode under any tokenizer, and what the chat template itself makes of the same
dialogue.
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
    """Says texts[k] after attempt k, be it empty."""

    texts: Sequence[str]
    immediate: bool = True

    async def guide_in_time(self, request: GuidanceRequest, timeout_s: float | None) -> Guidance:
        return Guidance(text=self.texts[request.attempt_idx])


@dataclass
class Episode:
    """What happened: contexts[k] is what attempt k was sampled behind."""

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
    """Every answer is wrong; answer k is followed by guidance[k], the last one by nothing."""
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
    """Of each attempt that was followed by another: how many of its tokens the next one saw.

    None: all of them; -m: none, and the last m tokens of what stood before it were gone too.
    """
    found: list[int | None] = []
    for k, attempt in enumerate(rollout.attempts[:-1]):
        cut = rollout.seam(k)[0] - rollout.context_length(k)
        found.append(None if cut == attempt.num_tokens else cut)
    return found


def bridges(rollout: Rollout) -> list[list[int]]:
    return [rollout.seam(k)[1] for k in range(len(rollout.turns) - 1)]


def shown(rollout: Rollout) -> list[str]:
    """The guidance that the student saw."""
    given = [turn.guidance for turn in rollout.turns if turn.guidance is not None]
    return [guidance.text for guidance in given if guidance.bridge_ids is not None]


def rendering(
    bridge: Bridge,
    texts: Sequence[str],
    guidance: Sequence[str],
    messages: Sequence[dict[str, str]] = PROMPT,
) -> str:
    """The chat template's own text of the dialogue up to the next answer."""
    dialogue = list(messages)
    for text, told in zip(texts, guidance, strict=True):
        dialogue += [{"role": "assistant", "content": text}, {"role": "user", "content": told}]
    return bridge.render(dialogue)


def text_of(bridge: Bridge, token_ids: Sequence[int]) -> str:
    return str(
        bridge.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    )


def answer_ids(bridge: Bridge, text: str, *, ended: bool = True) -> list[int]:
    """An answer as a student would sample it: behind the generation prompt, the end of turn
    included when ended.
    """
    first_word = bridge.exact_text(bridge.untrusted_ids("x"))
    space = (
        " " if bridge.before.endswith(" ") and first_word == "x" else ""
    )  # the template's, before sentencepiece's
    return bridge.untrusted_ids(space + text) + ([bridge.end_of_turn_id] if ended else [])
