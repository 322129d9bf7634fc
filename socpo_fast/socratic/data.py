"""Questions from files, and which of them make up batch b. Read load_questions, _to_question,
batch_questions.

Two layouts, told apart row by row: verl's (`prompt` messages, `reward_model.ground_truth`,
`data_source`, `extra_info`) and a flat one (`question`, `ground_truth`, optional `system`,
`reference_solution`, `data_source`). Files are streamed by the `datasets` library, so nothing is
copied to its cache; JSONL goes through its line reader, since its JSON reader casts whole columns
and cannot say which row was bad.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import check_ground_truth
from socpo_fast.types import Question

_ROLES = ("system", "user", "assistant")
_SHOWN_ERRORS = 5


def load_questions(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    grader: str = "exact",
    bridge: Bridge | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Question]:
    """All questions of a data set; `questions[i].question_idx` is i.

    Args:
        path:              a .parquet or .jsonl file, a folder of them, or the name of a hub data
                           set.
        split:             of a folder or hub data set; a file is its own split.
        subset:            of a folder or hub data set that has several (its "config"); None: it has
                           one.
        grader:            name of the grader; a ground_truth under which no answer could be right
                           is a bad row.
        bridge:            the student's, to count prompt tokens.
        max_prompt_tokens: questions with longer prompts are left out, with a warning that counts
                           them; None keeps all.

    Raises:
        ValueError: the file is missing or unreadable, rows are bad (the first few are listed as
            file, row counted from 1, and reason), or no question is left.
    """
    name = Path(path).name
    questions: list[Question] = []
    errors: list[str] = []
    for row_number, row in enumerate(_rows(path, split, subset), start=1):
        if isinstance(row, str) and not row.strip():
            continue
        try:
            question = _to_question(
                _parse_line(row) if isinstance(row, str) else row,
                question_idx=len(questions),
                default_source=Path(path).stem,
            )
            check_ground_truth(grader, question)
            questions.append(question)
        except ValueError as error:
            errors.append(f"data: {name} row {row_number}: {error}")
    if errors:
        more = (
            f"\n.. and {len(errors) - _SHOWN_ERRORS} more bad rows"
            if len(errors) > _SHOWN_ERRORS
            else ""
        )
        raise ValueError("\n".join(errors[:_SHOWN_ERRORS]) + more)
    if not questions:
        raise ValueError(f"data: {name} must hold at least one question, got none")
    return (
        questions
        if max_prompt_tokens is None
        else _drop_overlong(questions, name, bridge, max_prompt_tokens)
    )


def _drop_overlong(
    questions: list[Question], name: str, bridge: Bridge | None, limit: int
) -> list[Question]:
    if bridge is None:
        raise ValueError("load_questions: max_prompt_tokens needs bridge, got None")
    kept = []
    for question in questions:
        try:
            if len(bridge.prompt_ids(question.messages)) <= limit:
                kept.append(question)
        except ValueError as error:  # some chat templates know no system message
            raise ValueError(
                f"data: {name} question {question.question_idx + 1}: {error}"
            ) from error
    if not kept:
        raise ValueError(
            f"data: {name}: every prompt is longer than {limit} tokens; raise "
            "data.max_prompt_tokens"
        )
    if len(kept) < len(questions):
        warnings.warn(
            f"data: {name}: left out {len(questions) - len(kept)} of {len(questions)} prompts "
            f"over {limit} tokens",
            stacklevel=3,
        )
    return [replace(question, question_idx=idx) for idx, question in enumerate(kept)]


def _rows(path: str, split: str, subset: str | None) -> Iterator[dict[str, Any] | str]:
    """The rows in order: fields, or of a JSONL file lines, empty ones among them."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    logging.getLogger("datasets.packaged_modules").setLevel(
        logging.CRITICAL
    )  # it logs the errors that it raises
    place = Path(path).expanduser()
    kind = {".parquet": "parquet", ".jsonl": "text"}.get(place.suffix)
    if kind and not place.is_file():
        raise ValueError(f"data: path must be an existing file, got '{path}'")
    if kind is None and (place.is_file() or (path.count("/") != 1 and not place.is_dir())):
        raise ValueError(
            "data: path must be a .parquet or .jsonl file, a folder, or owner/name of the hub, "
            f"got '{path}'"
        )
    with tempfile.TemporaryDirectory(
        prefix="socpo_data_"
    ) as cache:  # streaming leaves nothing but lock files there
        try:
            if kind:
                rows = load_dataset(
                    kind, data_files=str(place), split="train", streaming=True, cache_dir=cache
                )
            else:
                rows = load_dataset(
                    str(place) if place.is_dir() else path,
                    subset,
                    split=split,
                    streaming=True,
                    cache_dir=cache,
                )
            yield from (row["text"] for row in rows) if kind == "text" else rows
        except (
            OSError,
            ValueError,
            RuntimeError,
            DatasetsError,
        ) as error:  # RuntimeError: its code, which never runs
            what = kind or f"a data set with a split {split!r}"
            raise ValueError(f"data: {path} must be readable as {what} ({error})") from error


def _parse_line(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (
        ValueError,
        RecursionError,
    ) as error:  # broken, a number of thousands of digits, thousands of brackets
        raise ValueError(f"must be a JSON object, got {line[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {line[:40]!r}")
    return row


def _to_question(row: dict[str, Any], *, question_idx: int, default_source: str) -> Question:
    """One row in either layout; ValueError with the reason alone."""
    if "prompt" in row:
        messages = _messages(row["prompt"])
        extra = row.get("extra_info") or {}
        reward_model = row.get("reward_model") or {}
        for key, value in (("extra_info", extra), ("reward_model", reward_model)):
            _check(isinstance(value, dict), f"{key} must be an object", value)
        ground_truth = _ground_truth("reward_model.ground_truth", reward_model.get("ground_truth"))
        reference = extra.get("reference_solution") or extra.get(
            "answer"
        )  # verl's gsm8k keeps its solution in answer
    elif "question" in row:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = _messages([*system, {"role": "user", "content": row["question"]}])
        ground_truth = _ground_truth("ground_truth", row.get("ground_truth"))
        reference = row.get("reference_solution")
    else:
        raise ValueError(
            f"must have prompt or question, got {', '.join(sorted(row)) or 'no fields'}"
        )
    source = row.get("data_source")
    for name, value in (
        ("reference_solution", reference),
        ("data_source", source),
        ("ground_truth", ground_truth),
    ):
        _check(isinstance(value, str | None), f"{name} must be text", value)
        (
            value or ""
        ).encode()  # half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
    return Question(
        question_idx=question_idx,
        messages=messages,
        ground_truth=ground_truth,
        data_source=source or default_source,
        reference_solution=reference or None,
    )


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    _check(
        isinstance(messages, list) and len(messages) > 0,
        "prompt must be a non-empty list of messages",
        messages,
    )
    for message in messages:
        _check(
            isinstance(message, dict) and message.get("role") in _ROLES,
            f"a message must have a role of {', '.join(_ROLES)}",
            message,
        )
        text = message.get("content")
        _check(
            isinstance(text, str) and text.strip() != "",
            f"the {message['role']} message must have text",
            text,
        )
        text.encode()  # as above
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, got {messages[-1]['role']}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _ground_truth(name: str, value: Any) -> str:
    if value is None or value == "":
        raise ValueError(f"{name} is missing")
    _check(
        isinstance(value, str | int | float)
        and not isinstance(value, bool)
        and (not isinstance(value, float) or isfinite(value)),
        f"{name} must be text or a number",
        value,
    )
    return str(value)


def _check(holds: bool, rule: str, value: object) -> None:
    """One value of a row against its rule; the caller of the caller says which row it is."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r:.40}")


def question_order(seed: int, epoch: int, n: int) -> list[int]:
    """The order of n questions in an epoch: a permutation that depends on (seed, epoch, n) alone,
    on any machine.
    """
    # Raw words: their stream is fixed across numpy versions.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable").tolist()


def batch_questions(
    questions: Sequence[Question], seed: int, batch_idx: int, size: int
) -> list[Question]:
    """The questions of batch `batch_idx` (from 0), a function of its arguments alone, so a run
    resumes from the index.

    Batches cut a stream of epochs, each a permutation, so every question comes once an epoch. A
    batch across the border of two epochs takes from the new one the first questions that it does
    not have yet: none is twice in a batch.

    Raises:
        ValueError: size is not in [1, n].
    """
    n = len(questions)
    if not 1 <= size <= n:
        raise ValueError(
            f"data: rollout.questions_per_batch must be in [1, {n} questions], got {size}; lower it"
        )
    epoch, place = divmod(batch_idx * size, n)
    order: list[int] = []
    for e in range(epoch + 1):
        order = _next_epoch(order, seed, e, n, size)
    stream = order[place:] + _next_epoch(order, seed, epoch + 1, n, size)
    return [questions[i] for i in stream[:size]]


def _next_epoch(before: list[int], seed: int, epoch: int, n: int, size: int) -> list[int]:
    """The epoch's permutation; those that stand in a batch with the end of the one before are new
    to that batch.
    """
    order = question_order(seed, epoch, n)
    begun = set(before[n - epoch * n % size :])
    first = [i for i in order if i not in begun][: size - len(begun)]
    chosen = set(first)
    return first + [i for i in order if i not in chosen]
