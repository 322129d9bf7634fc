"""The history as the chat template renders it, for rollout.context = "template". Read
rewritten_ids, then _turn.

Templates may change what is no longer the last answer: drop its <think> block, trim it, leave out
what the generation prompt opened. The row is then the template's, with two departures that its text
does not show: the student's tokens stay as sampled wherever their text stays, and what students and
teachers spelled out never becomes a special token. Where the template only appends, the ids are
those of Bridge.bridge_ids. Guidance is a placeholder while the template renders, so one that reads
its user messages (Qwen3 looks for <tool_response>) takes nothing from a teacher.
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
    """(kept_tokens, bridge_ids) that lead from the rollout's last attempt into the template's
    rendering so far.

    None where rewritten_ids is, or where the rendering has no token in common with the row.
    """
    answers = []
    shown = [turn.guidance.text for turn in rollout.turns[:-1] if turn.guidance is not None]
    for attempt in rollout.attempts:
        ended = (
            attempt.num_tokens <= attempt_limit and attempt.token_ids[-1] == bridge.end_of_turn_id
        )
        answers.append(attempt.token_ids[:-1] if ended else attempt.token_ids[:attempt_limit])
    row = rewritten_ids(bridge, messages, answers, [*shown, guidance])
    if row is None:
        return None
    seen = (
        rollout.context_ids(len(rollout.turns) - 1) + rollout.attempts[-1].token_ids[:attempt_limit]
    )
    same = next(
        (i for i, (one, other) in enumerate(zip(seen, row[:-1], strict=False)) if one != other),
        min(len(seen), len(row) - 1),
    )
    return None if same == 0 else (same, row[same:])


def rewritten_ids(
    bridge: Bridge,
    messages: Sequence[dict[str, str]],
    answers: Sequence[Sequence[int]],
    guidance: Sequence[str],
) -> list[int] | None:
    """Ids of a dialogue whose answers are all history, up to where the next answer begins.

    Args:
        messages: the prompt's.
        answers:  ids of every answer so far, as far as the next one may see them, without the end
                  of turn.
        guidance: what followed each answer, as it is shown.

    Returns:
        ids; None when the template refuses these texts, or renders them so that student's and
        template's text cannot be told apart.
    """
    texts = [
        str(bridge.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        for ids in answers
    ]
    try:
        prompt = bridge.render(messages)
        frames = bridge.render(dialogue(messages, *[ANSWER] * len(answers))).split(GUIDANCE)
        parts = bridge.render(dialogue(messages, *texts)).split(GUIDANCE)
    except ValueError:
        return None
    if not len(frames) == len(parts) == len(answers) + 1:
        return None
    leads = [prompt, *[bridge.after] * (len(answers) - 1)]  # what the answers were sampled behind
    turns = [
        turn
        for pieces in zip(leads, answers, frames, parts, strict=False)
        if (turn := _turn(bridge, *pieces)) is not None
    ]
    if len(turns) < len(answers):
        return None
    behind = [*[turn.lead for turn in turns[1:]], frames[-1]]
    row = bridge.trusted_ids(turns[0].lead)
    for turn, shown, after in zip(turns, guidance, behind, strict=True):
        row += turn.answer_ids + bridge.frame(turn.close, shown, after)
    return row


class _Turn(NamedTuple):
    lead: str  # the template's text before an answer, from the guidance or the beginning
    answer_ids: list[int]
    close: str  # the template's text between an answer and the guidance


def _turn(
    bridge: Bridge, sampled_lead: str, ids: Sequence[int], frame: str, part: str
) -> _Turn | None:
    """Find an answer in its part of the rendering; the frame is that part around an answer that
    says ANSWER.
    """
    lead, marker, close = frame.partition(ANSWER)
    if not (
        marker
        and close.startswith(bridge.end_of_turn)
        and part.startswith(lead)
        and part[len(lead) :].endswith(close)
    ):
        return None
    kept = part[len(lead) : len(part) - len(close)]
    text = bridge.exact_text(ids)
    if (sampled_lead + text).startswith(lead + kept) and len(lead + kept) >= len(sampled_lead):
        return _Turn(
            sampled_lead, _slice(bridge, ids, text, 0, len(lead + kept) - len(sampled_lead)), close
        )
    start = text.rfind(kept)
    if start < 0:
        return _Turn(lead, bridge.untrusted_ids(kept), close)
    return _Turn(lead, _slice(bridge, ids, text, start, start + len(kept)), close)


def _slice(bridge: Bridge, ids: Sequence[int], text: str, start: int, end: int) -> list[int]:
    """Ids of text[start:end], where text is that of ids: the sampled ones, but for tokens that
    reach over an end.
    """

    def size(count: int) -> int:
        return len(bridge.exact_text(ids[:count]))

    if (start, end) == (0, len(text)):
        return list(ids)
    first = bisect_left(range(len(ids) + 1), start, key=size)
    last = bisect_right(range(len(ids) + 1), end, key=size) - 1
    before = bridge.exact_text(ids[:first])
    until = bridge.exact_text(ids[: max(first, last)])
    if last < first or not (
        text.startswith(before) and text.startswith(until)
    ):  # within a token, or half a character
        return bridge.untrusted_ids(text[start:end])
    head = text[start : len(before)]
    tail = text[len(until) : end]
    return bridge.untrusted_ids(head) + list(ids[first:last]) + bridge.untrusted_ids(tail)
