"""Makes a Question of a row of a data set, and refuses a row that could not be meant so.

A row has one of two layouts, which may alternate in a file:

    verl    prompt (messages), reward_model.ground_truth, data_source, extra_info
    flat    question, ground_truth; optional: system, reference_solution, data_source

Text stays as written. A number becomes text with the digits of the file, without an exponent.
Errors do not name the row: data.py knows which one it is.
"""

import json
import re
from decimal import Decimal
from typing import Any

from socpo_fast.types import Question

_ROLES = ("system", "user", "assistant", "developer")
# Longer prompts are not tokenized: that could take minutes.
MAX_PROMPT_CHARS = 10_000_000
# A number written out is at most this long: 1e999999999 would fill the memory with zeros.
_MAX_DIGITS = 1000
# White space, and the characters of no width that some editors leave behind, are no text.
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]")


def to_question(
    row: dict[str, Any], *, question_idx: int, default_source: str, truths_as_json: bool
) -> Question:
    """Returns the question of a row in either layout; a ValueError does not name the row."""
    # A column that only other rows use is None in a parquet file.
    if row.get("prompt") is not None:
        messages = _messages(row["prompt"])
        extra = row.get("extra_info") or {}
        reward_model = row.get("reward_model") or {}
        for key, value in (("extra_info", extra), ("reward_model", reward_model)):
            check_row(isinstance(value, dict), f"{key} must be an object", value)
        truth = reward_model.get("ground_truth")
        ground_truth = _ground_truth("reward_model.ground_truth", truth, truths_as_json)
        # verl's gsm8k keeps its reference solution in extra_info.answer.
        key = "reference_solution" if extra.get("reference_solution") else "answer"
        reference_name = f"extra_info.{key}"
        reference = extra.get(key)
    elif row.get("question") is not None:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = _messages([*system, {"role": "user", "content": row["question"]}])
        ground_truth = _ground_truth("ground_truth", row.get("ground_truth"), truths_as_json)
        reference_name = "reference_solution"
        reference = row.get(reference_name)
    else:
        raise ValueError(
            f"must have prompt or question, got {', '.join(sorted(row)) or 'no fields'}"
        )
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


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    """Returns checked messages of role and content only; developer is system.

    Other fields (tool_calls, reasoning_content, name) may be there if they are empty, as a column
    is that only other rows use. Dropping them would change what a template writes.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    check_row(
        isinstance(messages, list) and len(messages) > 0,
        "prompt must be a non-empty list of messages",
        messages,
    )
    checked = []
    for message in messages:
        check_row(
            isinstance(message, dict) and message.get("role") in _ROLES,
            f"a message must have a role of {', '.join(_ROLES)}",
            message,
        )
        others = sorted(key for key in message.keys() - {"role", "content"} if message[key])
        check_row(not others, "a message must have no other field than role and content", others)
        role = message["role"]
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
    if checked[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, got {checked[-1]['role']}")
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
    if value is None or value == "":
        raise ValueError(f"{name} is missing")
    if isinstance(value, str):
        check_row(_VISIBLE.search(value) is not None, f"{name} must not be blank", value)
        return value
    if as_json and value and isinstance(value, list | dict):
        return _json_text(name, value)
    rule = f"{name} must be text or a number"
    check_row(isinstance(value, int | float | Decimal) and not isinstance(value, bool), rule, value)
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
            f"{json.dumps(key, ensure_ascii=False)}: {_json_text(name, x)}"
            for key, x in value.items()
        )
        return "{" + ", ".join(fields) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_json_text(name, x) for x in value) + "]"
    if value is None or isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return _ground_truth(name, value, False)


def check_row(holds: bool, rule: str, value: object) -> None:
    """Checks a value of a row against a rule. load_questions adds to the error which row it is."""
    if not holds:
        text = str(value) if isinstance(value, Decimal) else repr(value)
        raise ValueError(f"{rule}, got {text:.40}")
