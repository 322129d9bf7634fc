"""Loads questions from files and picks those of each batch.

Read load_questions, _to_question, then batch_questions.

A row has one of two layouts, which may alternate in a file:

    verl    prompt (messages), reward_model.ground_truth, data_source, extra_info
    flat    question, ground_truth; optional: system, reference_solution, data_source

The `datasets` library finds and streams the files, so nothing is copied to its cache. A file is
read as a folder that holds it, so both give the same rows. JSON goes through the library's line
reader, since its JSON reader casts whole columns and cannot say which row was bad.

Text stays as written. A number becomes text with the digits of the file, without an exponent.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.graders import check_ground_truth
from socpo_fast.types import Question

_ROLES = ("system", "user", "assistant", "developer")
_SHOWN_ERRORS = 5
# Longer lines are not parsed and longer prompts not tokenized: that could take minutes.
MAX_LINE_CHARS = 100_000_000
MAX_PROMPT_CHARS = 10_000_000
# A number written out is at most this long: 1e999999999 would fill the memory with zeros.
_MAX_DIGITS = 1000
# White space, and the characters of no width that some editors leave behind, are no text.
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]")


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
                           set. Brackets and stars are ordinary characters of a path.
        split:             split of a folder or hub data set; a file is its own split.
        subset:            subset ("config") of a folder or hub data set; None if it has only one.
        grader:            name of the grader. A row is bad if no answer could be right under this
                           grader.
        bridge:            the student's bridge, which counts prompt tokens and knows whether its
                           template takes system messages; needed for max_prompt_tokens.
        max_prompt_tokens: questions with longer prompts are left out, with a warning that counts
                           them; None keeps all.

    Raises:
        ValueError: the file is missing or unreadable, rows are bad (the first few are listed as
            file, row counted from 1, and reason), or no question is left.
    """
    name = Path(path).name
    questions: list[Question] = []
    errors: list[str] = []
    for where, row in _rows(path, split, subset):
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
            errors.append(f"data: {where}: {error}")
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
            if not bridge.takes_system and any(m["role"] == "system" for m in question.messages):
                raise ValueError("must have no system message, the chat template drops it")
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


def _rows(path: str, split: str, subset: str | None) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yields (file and row number, row) in order; a row is fields, or a line, empty ones too."""
    from datasets.exceptions import DatasetsError

    # The library also logs the errors that it raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    local_path = Path(path).expanduser()
    kind = {".parquet": "parquet", ".jsonl": "text"}.get(local_path.suffix)
    is_folder = kind is None and local_path.is_dir()
    if kind and not local_path.is_file():
        raise ValueError(f"data: path must be an existing file, got '{path}'")
    if not is_folder and kind is None and (local_path.is_file() or path.count("/") != 1):
        raise ValueError(
            "data: path must be a .parquet or .jsonl file, a folder, or owner/name of the hub, "
            f"got '{path}'"
        )
    # While it streams, the library writes nothing but lock files to its cache folder.
    with tempfile.TemporaryDirectory(prefix="socpo_data_") as folder:
        place = Path(folder, "data")
        link = place / f"train{local_path.suffix}"
        try:
            # The library takes a path for a pattern, so it gets links in a folder of a plain name.
            if is_folder:
                shutil.copytree(local_path.resolve(), place, copy_function=os.symlink)
            elif kind:
                place.mkdir()
                link.symlink_to(local_path.resolve())
            for file, rows in _files(
                str(place) if kind or is_folder else path,
                "train" if kind else split,
                None if kind else subset,
                cache_dir=f"{folder}/cache",
            ):
                name = local_path.name if file == str(link) else file.removeprefix(f"{place}/")
                for row_number, row in enumerate(rows, start=1):
                    yield f"{name} row {row_number}", row
        # RuntimeError: a data set that comes with code, which is never run.
        # ArithmeticError: see _parse_line.
        except (OSError, ValueError, RuntimeError, ArithmeticError, DatasetsError) as error:
            expected = kind or f"a data set with a split {split!r}"
            reason = str(error).replace(str(link if kind else place), path)
            raise ValueError(
                f"data: {path} must be readable as {expected} ({reason:.500})"
            ) from error


def _files(
    place: str, split: str, subset: str | None, *, cache_dir: str
) -> Iterator[tuple[str, Iterable[dict[str, Any] | str]]]:
    """Yields each file of a split with its rows."""
    from datasets import load_dataset_builder
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    builder = load_dataset_builder(place, subset, cache_dir=cache_dir)
    files_of_split = builder.config.data_files
    for name in split.split("+"):
        if name not in files_of_split:
            raise ValueError(
                f"Bad split: {name}. Available splits: {[str(key) for key in files_of_split]}"
            )
        for file in files_of_split[name]:
            # A DataFilesDict is taken as it is; anything else would be a pattern.
            one_file = DataFilesDict({"train": DataFilesList([file], [()])})
            if isinstance(builder, Json):
                lines = Text(cache_dir=cache_dir, data_files=one_file).as_streaming_dataset("train")
                yield file, _lines(file, (row["text"] for row in lines))
            elif isinstance(builder, Parquet):
                builder.config.data_files = one_file
                rows = builder.as_streaming_dataset("train")
                yield file, (_exact(row, rows.features) for row in rows)
            else:
                # Readers of other kinds guess types: a CSV's "007" would become 7.
                raise ValueError(f"must hold parquet or JSON lines, got {file}; convert it")


def _lines(file: str, lines: Iterator[str]) -> Iterator[dict[str, Any] | str]:
    """Yields the lines of a JSONL file, or the rows of a .json file that holds one list of them."""
    # Files of a Windows editor begin with a byte order mark; joined ones have more.
    bare_lines = (line.removeprefix("\ufeff") for line in lines)
    first = next(bare_lines, "")
    if file.endswith(".json") and first.lstrip().startswith("["):
        rows = json.loads("\n".join([first, *bare_lines]), parse_float=Decimal)
        _check(all(isinstance(row, dict) for row in rows), f"{file} must list objects", rows)
        yield from rows
    else:
        yield first
        yield from bare_lines


def _exact(value: Any, feature: Any) -> Any:
    """Returns a value of a parquet column as its author saw it.

    Python widens float32 0.1 to 0.10000000149011612, and labels are stored as numbers.
    """
    from datasets import ClassLabel

    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _exact(field, feature[key]) for key, field in value.items()}
    if isinstance(value, float) and np.isfinite(value) and feature.dtype.startswith("float"):
        narrow = np.dtype(feature.dtype).type(value)
        return Decimal(np.format_float_positional(narrow, trim="0"))
    if isinstance(value, int) and isinstance(feature, ClassLabel):
        return feature.int2str(value)
    return value


def _parse_line(line: str) -> dict[str, Any]:
    """Returns the fields of a JSONL line; ValueError if it is not a JSON object."""
    if len(line) > MAX_LINE_CHARS:
        raise ValueError(f"must have at most {MAX_LINE_CHARS} characters, got {len(line)}")
    try:
        row = json.loads(line, parse_float=Decimal)
    # ValueError: broken JSON, or a number of thousands of digits. RecursionError: thousands of
    # brackets. ArithmeticError: an exponent of many digits.
    except (ValueError, RecursionError, ArithmeticError) as error:
        raise ValueError(f"must be a JSON object, got {line[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {line[:40]!r}")
    return row


def _to_question(row: dict[str, Any], *, question_idx: int, default_source: str) -> Question:
    """Returns the question of a row in either layout; a ValueError does not name the row."""
    # A column that only other rows use is None in a parquet file.
    if row.get("prompt") is not None:
        messages = _messages(row["prompt"])
        extra = row.get("extra_info") or {}
        reward_model = row.get("reward_model") or {}
        for key, value in (("extra_info", extra), ("reward_model", reward_model)):
            _check(isinstance(value, dict), f"{key} must be an object", value)
        ground_truth = _ground_truth("reward_model.ground_truth", reward_model.get("ground_truth"))
        # verl's gsm8k keeps its reference solution in extra_info.answer.
        key = "reference_solution" if extra.get("reference_solution") else "answer"
        reference_name = f"extra_info.{key}"
        reference = extra.get(key)
    elif row.get("question") is not None:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        messages = _messages([*system, {"role": "user", "content": row["question"]}])
        ground_truth = _ground_truth("ground_truth", row.get("ground_truth"))
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
    """Returns checked messages with no other field than role and content; developer is system."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    _check(
        isinstance(messages, list) and len(messages) > 0,
        "prompt must be a non-empty list of messages",
        messages,
    )
    checked = []
    for message in messages:
        _check(
            isinstance(message, dict) and message.get("role") in _ROLES,
            f"a message must have a role of {', '.join(_ROLES)}",
            message,
        )
        role = message["role"]
        text = _text_of_parts(message.get("content"))
        _check(
            isinstance(text, str) and _VISIBLE.search(text) is not None,
            f"the {role} message must have text",
            text,
        )
        text.encode()  # refuses half of a surrogate pair, as in _to_question
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


def _ground_truth(name: str, value: Any) -> str:
    """Returns a ground truth as text; `name` is its field, for errors."""
    if value is None or value == "":
        raise ValueError(f"{name} is missing")
    if isinstance(value, str):
        _check(_VISIBLE.search(value) is not None, f"{name} must not be blank", value)
        return value
    rule = f"{name} must be text or a number"
    _check(isinstance(value, int | float | Decimal) and not isinstance(value, bool), rule, value)
    number = Decimal(str(value))
    _check(number.is_finite(), rule, value)
    _check(
        abs(number.adjusted()) < _MAX_DIGITS,
        f"{name} must be a number of at most {_MAX_DIGITS} digits",
        value,
    )
    return f"{number:f}"


def _check(holds: bool, rule: str, value: object) -> None:
    """Checks a value of a row against a rule. load_questions adds to the error which row it is."""
    if not holds:
        text = str(value) if isinstance(value, Decimal) else repr(value)
        raise ValueError(f"{rule}, got {text:.40}")


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
