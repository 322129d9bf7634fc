"""Finds the thoughts that a model writes before its answer or message.

Read without_thoughts, for answers of the student. The teacher's messages are cleaned by
teachers/base.py, which knows more marks and is stricter.
"""

import re
from collections.abc import Iterable


def _tags(*names: str) -> dict[str, str]:
    """Returns patterns of tags like XML's: opening -> closing."""
    return {rf"(?i:<\s*{x}(?:\s[^<>]*)?>)": rf"(?i:<\s*/\s*{x}\s*>)" for x in names}


# How models mark their thoughts: patterns of the opening and of the closing mark.
MARKS = {
    **_tags("think", "thinking", "thought", "seed:think"),
    r"\[THINK\]": r"\[/THINK\]",
    r"\u25c1think\u25b7": r"\u25c1/think\u25b7",
}
# Marks of a teacher's thoughts only: prompts ask students for <reasoning> and the like beside
# <answer>.
TEACHER_MARKS = {
    **MARKS,
    **_tags("thoughts", "reasoning", "analysis", "scratchpad"),
    r"<\|START_THINKING\|>": r"<\|END_THINKING\|>",
    r"<\|begin_of_thought\|>": r"<\|end_of_thought\|>",
    r"<\|channel\|>analysis": r"<\|channel\|>final<\|message\|>",
}
_OPENING = re.compile("|".join(MARKS))
_CLOSING = re.compile("|".join(MARKS.values()))


def without_thoughts(text: str) -> str:
    """Returns the text without its thoughts, and "" if it ends inside of them.

    A closing mark without an opening one closes thoughts that the prompt has opened.
    """
    *closed, rest = _CLOSING.split(text)
    before = [part[: mark.start()] for part in closed if (mark := _OPENING.search(part))]
    return "" if _OPENING.search(rest) else "".join(before) + rest


def opened_thoughts(generation_prompt: str, marks: Iterable[str] = MARKS) -> str:
    """Returns the mark of thoughts that a prompt ends with, "" if it does not open any.

    An answer to such a prompt begins inside its thoughts without a mark of its own.
    """
    mark = re.search(rf"(?:{'|'.join(marks)})\s*\Z", generation_prompt)
    return mark[0] if mark else ""
