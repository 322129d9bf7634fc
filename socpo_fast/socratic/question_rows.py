"""Makes a Question of a row of a data set, and refuses a row that could not be meant so.

A row has one of two layouts, which may alternate in a file. Columns gives the fields other names.

    verl    prompt (messages), reward_model.ground_truth, data_source, extra_info
    flat    question, ground_truth; optional: system, reference_solution, data_source

Text stays as written. A number becomes text with the digits of the file, without an exponent.
Errors do not name the row: data.py knows which one it is.
"""

import json
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from socpo_fast.config.text import did_you_mean
from socpo_fast.types import Question

_ROLES = ("system", "user", "assistant", "developer")
# Longer prompts are not tokenized: that could take minutes.
MAX_PROMPT_CHARS = 10_000_000
# A number written out is at most this long: 1e999999999 would fill the memory with zeros.
_MAX_DIGITS = 1000
# White space, and the characters of no width that some editors leave behind, are no text.
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]")
_ABSENT = object()
PICTURES = ("image", "images", "video", "videos")  # columns that must be empty


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names the columns of a data set; None = as in the layout of the row.

    A dot reaches into an object, as in reward_model.ground_truth, unless a column has that very
    name. Every row must have a question and a ground truth. The other columns may be absent, but
    one that is named must be in some row.
    """

    question: str | None = None  # its column holds text or messages
    ground_truth: str | None = None
    reference_solution: str | None = None
    system: str | None = None  # a system message in front of the question


_VERL = Columns(
    question="prompt",
    ground_truth="reward_model.ground_truth",
    reference_solution="extra_info.reference_solution",
)
_FLAT = Columns(
    question="question",
    ground_truth="ground_truth",
    reference_solution="reference_solution",
    system="system",
)


def to_question(
    row: Mapping[str, Any],
    columns: Columns,
    *,
    question_idx: int,
    default_source: str,
    truths_as_json: bool,
) -> Question:
    """Returns the question of a row in either layout; a ValueError does not name the row."""
    for key in PICTURES:
        value = row.get(key)
        is_empty = len(value) == 0 if isinstance(value, Sized) else not value
        check_row(is_empty, f"{key} must be empty, as students read text only", value)
    # A column that only other rows use is None in a parquet file.
    is_verl = row.get("reward_model" if columns.question else "prompt") is not None
    names = _names(_VERL if is_verl else _FLAT, columns)
    system = _optional(row, names["system"])
    messages = _messages(names["question"], _required(row, names["question"], "question"), system)
    truth = _required(row, names["ground_truth"], "ground_truth")
    ground_truth = _ground_truth(names["ground_truth"], truth, truths_as_json)
    reference_name = names["reference_solution"]
    reference = _optional(row, reference_name)
    # verl's gsm8k keeps its reference solution in extra_info.answer.
    if not reference and reference_name == _VERL.reference_solution:
        reference_name = "extra_info.answer"
        reference = _optional(row, reference_name)
    source = row.get("data_source")
    for name, value in (
        (reference_name, reference),
        ("data_source", source),
        ("ground_truth", ground_truth),
    ):
        check_row(isinstance(value, str | None), f"{name} must be text", value)
        # JSON can spell half of a surrogate pair, which no tokenizer takes. Encoding refuses it:
        # UnicodeEncodeError is a ValueError.
        (value or "").encode()
    return Question(
        question_idx=question_idx,
        messages=messages,
        ground_truth=ground_truth,
        data_source=source or default_source,
        reference_solution=reference or None,
    )


def to_row(question: Question, columns: Columns) -> dict[str, Any]:
    """Returns a row of which to_question makes this question."""
    names = _names(_FLAT, columns)
    return {
        names["question"]: question.messages,
        names["ground_truth"]: question.ground_truth,
        names["reference_solution"]: question.reference_solution,
        "data_source": question.data_source,
    }


def _names(layout: Columns, columns: Columns) -> dict[str, str]:
    """Returns the names of all columns: those of the layout where none is given."""
    return {key: name or vars(layout)[key] for key, name in vars(columns).items()}


def columns_read(columns: Columns) -> set[str]:
    """Returns the names of all columns that to_question may look at in a row of either layout."""
    layouts = (columns, _VERL, _FLAT)
    names = {name for layout in layouts for name in vars(layout).values() if name is not None}
    return {"data_source", *PICTURES, *names, *(name.partition(".")[0] for name in names)}


def has_column(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column, be it empty."""
    return _field(row, name) is not _ABSENT


def absent_column(row: Mapping[str, Any], name: str, key: str) -> str:
    """Returns what to say of a row without the column that data.<key>_column names."""
    present = sorted(
        f"{outer}.{inner}" if inner else str(outer)
        for outer, value in row.items()
        for inner in (value if isinstance(value, Mapping) and value else [""])
    )
    setting = f"data.{key}_column"
    near = did_you_mean(name, present, prefix=f"{setting}=")
    return (
        f"{name} is missing, the columns are {', '.join(present) or 'none':.200}"
        f"{near or f'; name its column by {setting}'}"
    )


def _required(row: Mapping[str, Any], name: str, key: str) -> Any:
    """Returns the value of a column that every row must have; `key` is its key in Columns."""
    value = _field(row, name)
    if value is _ABSENT:
        raise ValueError(absent_column(row, name, key))
    if value is None or (isinstance(value, str) and not value):
        raise ValueError(f"{name} is {'missing' if value is None else 'blank'}")
    return value


def _optional(row: Mapping[str, Any], name: str | None) -> Any:
    """Returns the value of a column; None if the row lacks it."""
    value = None if name is None else _field(row, name)
    return None if value is _ABSENT else value


def _field(row: Mapping[str, Any], name: str) -> Any:
    """Returns a value by its name, which may reach into objects; _ABSENT if there is none."""
    key, dot, rest = name.partition(".")
    if name in row or not dot:
        return row.get(name, _ABSENT)
    inner = row.get(key, _ABSENT)
    if inner is _ABSENT or not inner:
        return inner or None
    check_row(isinstance(inner, Mapping), f"{key} must be an object", inner)
    return _field(inner, rest)


def _messages(name: str, question: Any, system: Any) -> tuple[dict[str, str], ...]:
    """Returns checked messages of role and content only; developer is system.

    Other fields (tool_calls, reasoning_content, name) may be there if they are empty, as a column
    is that only other rows use. Dropping them would change what a template writes.

    Args:
        name:     the column of the question, for errors.
        question: text or messages.
        system:   text of a system message that comes first; None or "" = there is none.
    """
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    check_row(
        isinstance(messages, list | tuple) and len(messages) > 0,
        f"{name} must be text or a non-empty list of messages",
        messages,
    )
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    checked = []
    for message in messages:
        check_row(
            isinstance(message, dict) and message.get("role") in _ROLES,
            f"a message must have a role of {', '.join(_ROLES)}",
            message,
        )
        role = message["role"]
        others = sorted(key for key in message.keys() - {"role", "content"} if message[key])
        check_row(not others, "a message must have no other field than role and content", others)
        text = _text_of_parts(message.get("content"))
        check_row(
            isinstance(text, str) and _VISIBLE.search(text) is not None,
            f"the {role} message must have text",
            text,
        )
        text.encode()  # refuses half of a surrogate pair, as in to_question
        checked.append({"role": "system" if role == "developer" else role, "content": text})
    num_chars = sum(len(message["content"]) for message in checked)
    if num_chars > MAX_PROMPT_CHARS:
        raise ValueError(f"prompt must have at most {MAX_PROMPT_CHARS} characters, got {num_chars}")
    check_row(
        not system or all(message["role"] != "system" for message in checked[1:]),
        f"{name} must have no system message beside the system column's",
        system,
    )
    if role != "user":
        raise ValueError(f"the last message must be the user's, got {role}")
    return tuple(checked)


def _text_of_parts(content: Any) -> Any:
    """Returns the joined text of a content that is a list of text parts; others as they are."""
    is_text = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
    return "".join(part["text"] for part in content) if is_text else content


def _ground_truth(name: str, value: Any, as_json: bool) -> str:
    """Returns a ground truth as text; `name` is its field, for errors."""
    if isinstance(value, str):
        check_row(_VISIBLE.search(value) is not None, f"{name} must not be blank", value)
        return value
    if as_json and value and isinstance(value, list | dict):
        return _json_text(name, value)
    rule = f"{name} must be text or a number"
    is_number = isinstance(value, int | float | Decimal | np.integer | np.floating)
    check_row(is_number and not isinstance(value, bool), rule, value)
    number = Decimal(str(value))
    check_row(number.is_finite(), rule, value)
    check_row(
        abs(number.adjusted()) < _MAX_DIGITS,
        f"{name} must be a number of at most {_MAX_DIGITS} digits",
        value,
    )
    return f"{number:f}"


def _json_text(name: str, value: Any) -> str:
    """Returns a value as JSON whose numbers have their plain decimal form, as other truths do."""
    if isinstance(value, dict):
        fields = (
            f"{json.dumps(str(key), ensure_ascii=False)}: {_json_text(name, x)}"
            for key, x in value.items()
        )
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_json_text(name, x) for x in value) + "]"
    if value is None or isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return _ground_truth(name, value, False)


def check_row(holds: bool, rule: str, value: object) -> None:
    """Checks a value of a row against a rule. data.py adds to the error which row it is."""
    if not holds:
        text = str(value) if isinstance(value, Decimal) else repr(value)
        raise ValueError(f"{rule}, got {text:.40}")
