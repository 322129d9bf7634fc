"""Renders the history as the chat template does, for rollout.context = "template".

Read template_seam, then rewritten_ids, then _locate_answer.

A template may change an answer that is no longer the last one: it drops the <think> block, trims
white space, or leaves out what the generation prompt opened. Then the next attempt does not simply
follow the sampled row:

    sampled row      prompt | <think> .. </think> answer
    rewritten row    prompt | answer | end of turn, guidance, generation prompt
                     '------' '------------------------------------------------'
                  kept_tokens   bridge_ids: everything behind the common prefix

The rewritten row departs from the template's text in two ways. The student's tokens stay as sampled
wherever their text stays. A special token that a student or teacher spelled out stays ordinary
text. Where the template only appends, the ids are those of Bridge.bridge_ids.

Some templates read user messages (Qwen3 looks for <tool_response>). So guidance is a placeholder
while the template renders, and a teacher cannot change how the rest is rendered.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from socpo_fast.socratic.bridge import ANSWER, GUIDANCE, Bridge, dialogue
from socpo_fast.types import Rollout


def template_seam(
    bridge: Bridge,
    messages: Sequence[dict[str, str]],
    rollout: Rollout,
    guidance: str,
    *,
    attempt_limit: int,
) -> tuple[int, list[int]] | None:
    """Returns (kept_tokens, bridge_ids) from the rollout's last attempt to the next one.

    kept_tokens is the length of the prefix that the sampled row and the rewritten one share, and
    bridge_ids is the rest of the rewritten row.

    Returns None if rewritten_ids does, or if the two rows do not share their first token.
    """
    answers = []
    shown_texts = [turn.guidance.text for turn in rollout.turns[:-1] if turn.guidance is not None]
    for attempt in rollout.attempts:
        ended = (
            attempt.num_tokens <= attempt_limit and attempt.token_ids[-1] == bridge.end_of_turn_id
        )
        # The template writes the end of turn itself.
        answers.append(attempt.token_ids[:-1] if ended else attempt.token_ids[:attempt_limit])
    rewritten_row = rewritten_ids(bridge, messages, answers, [*shown_texts, guidance])
    if rewritten_row is None:
        return None
    sampled_row = (
        rollout.context_ids(len(rollout.turns) - 1) + rollout.attempts[-1].token_ids[:attempt_limit]
    )
    # The last token is left out, so that the bridge has at least one token: the next attempt is
    # sampled behind it.
    num_shared = next(
        (
            idx
            for idx, (sampled_id, new_id) in enumerate(
                zip(sampled_row, rewritten_row[:-1], strict=False)
            )
            if sampled_id != new_id
        ),
        min(len(sampled_row), len(rewritten_row) - 1),
    )
    return None if num_shared == 0 else (num_shared, rewritten_row[num_shared:])


def rewritten_ids(
    bridge: Bridge,
    messages: Sequence[dict[str, str]],
    answers: Sequence[Sequence[int]],
    guidance: Sequence[str],
) -> list[int] | None:
    """Returns the ids of a dialogue whose answers are all history, up to the next answer.

    Args:
        messages: those of the prompt.
        answers:  ids of every answer so far, as far as the next one may see them, without the end
                  of turn.
        guidance: the text that was shown after each answer.

    Returns:
        The ids. None if the template refuses these texts, or renders them so that the student's
        text cannot be told from the template's.
    """
    texts = [
        str(bridge.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        for ids in answers
    ]
    # The template renders the dialogue twice, once with the word ANSWER for each answer and once
    # with the real texts. The first shows what the template puts around an answer; the second is
    # searched for it. In both the word GUIDANCE stands for all guidance. Splitting there gives one
    # part for each answer, and at the end the generation prompt.
    try:
        prompt = bridge.render(messages)
        marked_parts = bridge.render(dialogue(messages, *[ANSWER] * len(answers))).split(GUIDANCE)
        rendered_parts = bridge.render(dialogue(messages, *texts)).split(GUIDANCE)
    except ValueError:
        return None
    if not len(marked_parts) == len(rendered_parts) == len(answers) + 1:
        return None
    # What each answer was sampled behind: the prompt, or the text after the guidance.
    sampled_leads = [prompt, *[bridge.after] * (len(answers) - 1)]
    turns = [
        turn
        for pieces in zip(sampled_leads, answers, marked_parts, rendered_parts, strict=False)
        if (turn := _locate_answer(bridge, *pieces)) is not None
    ]
    if len(turns) < len(answers):
        return None
    texts_behind = [*[turn.lead for turn in turns[1:]], marked_parts[-1]]
    row = bridge.trusted_ids(turns[0].lead)
    for turn, shown_text, text_behind in zip(turns, guidance, texts_behind, strict=True):
        row += turn.answer_ids + bridge.frame(turn.close, shown_text, text_behind)
    return row


class _Turn(NamedTuple):
    """An answer in the rendering, between two texts of the template."""

    lead: str  # from the beginning or the last guidance up to the answer
    answer_ids: list[int]
    close: str  # from the answer up to the next guidance


def _locate_answer(
    bridge: Bridge,
    sampled_lead: str,
    token_ids: Sequence[int],
    marked_part: str,
    rendered_part: str,
) -> _Turn | None:
    """Locates an answer in its part of the rendering; None if the template moved things around.

    Args:
        sampled_lead:  the template's text that the answer was sampled behind.
        token_ids:     the answer as sampled.
        marked_part:   its part of the rendering in which each answer is the word ANSWER.
        rendered_part: the same part of the rendering with the real texts.
    """
    lead, marker, close = marked_part.partition(ANSWER)
    if not (
        marker
        and close.startswith(bridge.end_of_turn)
        and rendered_part.startswith(lead)
        and rendered_part[len(lead) :].endswith(close)
    ):
        return None
    kept = rendered_part[len(lead) : len(rendered_part) - len(close)]
    text = bridge.exact_text(token_ids)
    # First case: lead and kept text are a prefix of what the engine saw, though their border need
    # not be where the generation prompt ended. The answer keeps the lead it was sampled behind.
    if (sampled_lead + text).startswith(lead + kept) and len(lead + kept) >= len(sampled_lead):
        return _Turn(
            sampled_lead,
            _ids_of_span(bridge, token_ids, text, 0, len(lead + kept) - len(sampled_lead)),
            close,
        )
    # Second case: the template kept some run of the answer, such as all behind the <think> block.
    start = text.rfind(kept)
    # Third case: the template changed the text, so no sampled token stands for it.
    if start < 0:
        return _Turn(lead, bridge.untrusted_ids(kept), close)
    return _Turn(lead, _ids_of_span(bridge, token_ids, text, start, start + len(kept)), close)


def _ids_of_span(bridge: Bridge, ids: Sequence[int], text: str, start: int, end: int) -> list[int]:
    """Returns the ids of text[start:end], where text is the exact text of ids.

    The ids are the sampled ones. A token that reaches over start or end is replaced by the ids of
    its part inside.

        text     | token 0 | token 1 | token 2 | token 3 |
                      ^ start                       ^ end
        result        |head| token 1 | token 2 |tail|
    """

    def text_length(num_tokens: int) -> int:
        return len(bridge.exact_text(ids[:num_tokens]))

    if (start, end) == (0, len(text)):
        return list(ids)
    first = bisect_left(range(len(ids) + 1), start, key=text_length)
    stop = bisect_right(range(len(ids) + 1), end, key=text_length) - 1
    text_before = bridge.exact_text(ids[:first])
    text_until = bridge.exact_text(ids[: max(first, stop)])
    # Either the span lies inside one token, or a token border is inside a character of several
    # bytes, which the text of the tokens before it shows as a replacement character.
    if stop < first or not (text.startswith(text_before) and text.startswith(text_until)):
        return bridge.untrusted_ids(text[start:end])
    head_text = text[start : len(text_before)]
    tail_text = text[len(text_until) : end]
    return bridge.untrusted_ids(head_text) + list(ids[first:stop]) + bridge.untrusted_ids(tail_text)
