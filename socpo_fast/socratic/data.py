"""Loads questions from files and picks those of each batch.

Read load_questions, _to_question, then batch_questions.

A row has one of two layouts, which may alternate in a file:

    verl    prompt (messages), reward_model.ground_truth, data_source, extra_info
    flat    question, ground_truth; optional: system, reference_solution, data_source

The `datasets` library streams the files, so nothing is copied to its cache. JSONL goes through its
line reader, since its JSON reader casts whole columns and cannot say which row was bad.
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
    """Returns all questions of a data set; `questions[i].question_idx` is i.

    Args:
        path:              a .parquet or .jsonl file, a folder of them, or the name of a hub data
                           set.
        split:             split of a folder or hub data set; a file is its own split.
        subset:            subset ("config") of a folder or hub data set; None if it has only one.
        grader:            name of the grader. A row is bad if no answer could be right under this
                           grader.
        bridge:            the student's bridge, which counts prompt tokens; needed for
                           max_prompt_tokens.
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
        # Empty lines are skipped but counted, so that row numbers are line numbers.
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
    """Returns the questions whose prompt has at most `limit` tokens, numbered anew from 0."""
    if bridge is None:
        raise ValueError("load_questions: max_prompt_tokens needs bridge, got None")
    kept = []
    for question in questions:
        try:
            if len(bridge.prompt_ids(question.messages)) <= limit:
                kept.append(question)
        # Some chat templates refuse system messages.
        except ValueError as error:
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
    """Yields the rows in order: dicts of fields, or the lines of a JSONL file, empty ones too."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    # The library also logs the errors that it raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    local_path = Path(path).expanduser()
    kind = {".parquet": "parquet", ".jsonl": "text"}.get(local_path.suffix)
    if kind and not local_path.is_file():
        raise ValueError(f"data: path must be an existing file, got '{path}'")
    if kind is None and (
        local_path.is_file() or (path.count("/") != 1 and not local_path.is_dir())
    ):
        raise ValueError(
            "data: path must be a .parquet or .jsonl file, a folder, or owner/name of the hub, "
            f"got '{path}'"
        )
    # While it streams, the library writes nothing but lock files to its cache folder.
    with tempfile.TemporaryDirectory(prefix="socpo_data_") as cache_dir:
        try:
            if kind:
                rows = load_dataset(
                    kind,
                    data_files=str(local_path),
                    split="train",
                    streaming=True,
                    cache_dir=cache_dir,
                )
            else:
                rows = load_dataset(
                    str(local_path) if local_path.is_dir() else path,
                    subset,
                    split=split,
                    streaming=True,
                    cache_dir=cache_dir,
                )
            yield from (row["text"] for row in rows) if kind == "text" else rows
        # RuntimeError: a data set that comes with code, which is never run.
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            expected = kind or f"a data set with a split {split!r}"
            raise ValueError(f"data: {path} must be readable as {expected} ({error})") from error


def _parse_line(line: str) -> dict[str, Any]:
    """Returns the fields of a JSONL line; ValueError if it is not a JSON object."""
    try:
        row = json.loads(line)
    # ValueError: broken JSON, or a number of thousands of digits. RecursionError: thousands of
    # brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be a JSON object, got {line[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {line[:40]!r}")
    return row


def _to_question(row: dict[str, Any], *, question_idx: int, default_source: str) -> Question:
    """Returns the question of a row in either layout; a ValueError does not name the row."""
    if "prompt" in row:
        messages = _messages(row["prompt"])
        extra = row.get("extra_info") or {}
        reward_model = row.get("reward_model") or {}
        for key, value in (("extra_info", extra), ("reward_model", reward_model)):
            _check(isinstance(value, dict), f"{key} must be an object", value)
        ground_truth = _ground_truth("reward_model.ground_truth", reward_model.get("ground_truth"))
        # verl's gsm8k keeps its reference solution in extra_info.answer.
        reference = extra.get("reference_solution") or extra.get("answer")
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
    """Returns checked messages with no other field than role and content."""
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
        text.encode()  # refuses half of a surrogate pair, as in _to_question
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message must be the user's, got {messages[-1]['role']}")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _ground_truth(name: str, value: Any) -> str:
    """Returns a ground truth as text; `name` is its field, for errors."""
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
    """Checks a value of a row against a rule. load_questions adds to the error which row it is."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r:.40}")


def question_order(seed: int, epoch: int, n: int) -> list[int]:
    """Returns the order of n questions in an epoch: a permutation of 0 .. n - 1.

    It depends on (seed, epoch, n) only, and is the same on any machine.
    """
    # The raw words of the generator are the same in every numpy version; permutations need not be.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable").tolist()


def batch_questions(
    questions: Sequence[Question], seed: int, batch_idx: int, size: int
) -> list[Question]:
    """Returns the questions of batch `batch_idx`, counted from 0.

    The result depends on the arguments only, so a run resumes from the index of its batch.

    The batches cut a stream of epochs. Each epoch is a permutation, so every question comes once an
    epoch. A batch may reach over the border of two epochs. The new epoch then begins with questions
    that this batch does not have yet, so no question is twice in a batch:

        epoch 0        | epoch 1
        3 0 | 4 1 | 2    0 | 4 3 | 1 2        n = 5, size = 2
                  '-------' one batch: 2 cannot come first in epoch 1

    Raises:
        ValueError: size is not in [1, n].
    """
    n = len(questions)
    if not 1 <= size <= n:
        raise ValueError(
            f"data: rollout.questions_per_batch must be in [1, {n} questions], got {size}; lower it"
        )
    epoch, offset = divmod(batch_idx * size, n)
    order: list[int] = []
    for epoch_idx in range(epoch + 1):
        order = _next_epoch(order, seed, epoch_idx, n, size)
    stream = order[offset:] + _next_epoch(order, seed, epoch + 1, n, size)
    return [questions[i] for i in stream[:size]]


def _next_epoch(previous: list[int], seed: int, epoch: int, n: int, size: int) -> list[int]:
    """Returns the order of an epoch, with no question twice in the batch that the border cuts.

    Args:
        previous: the order of the previous epoch; empty for epoch 0.
    """
    order = question_order(seed, epoch, n)
    # The questions of the previous epoch that are already in the batch at the border.
    in_border_batch = set(previous[n - epoch * n % size :])
    first_new = [i for i in order if i not in in_border_batch][: size - len(in_border_batch)]
    chosen = set(first_new)
    return first_new + [i for i in order if i not in chosen]
