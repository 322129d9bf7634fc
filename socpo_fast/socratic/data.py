"""Loads questions from files and picks those of each batch.

Read load_questions, then batch_questions. question_rows.py makes a Question of a row.

The `datasets` library finds and streams the files, so nothing is copied to its cache. A file is
read as a folder that holds it, so both give the same rows. JSON goes through the library's line
reader, since its JSON reader casts whole columns and cannot say which row was bad.
"""

import json
import logging
import os
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
from socpo_fast.socratic.question_rows import check_row, to_question
from socpo_fast.types import Question

_SHOWN_ERRORS = 5
# Longer lines are not parsed: that could take minutes.
MAX_LINE_CHARS = 100_000_000


def load_questions(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    grader: str = "exact",
    bridge: Bridge | None = None,
    max_prompt_tokens: int | None = None,
    truths_as_json: bool = False,
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
        truths_as_json:    takes a list or object as ground truth, as its JSON text; else such a row
                           is bad. Only a grader of the user's own can read it.

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
            question = to_question(
                _parse_line(row) if isinstance(row, str) else row,
                question_idx=len(questions),
                default_source=Path(path).stem,
                truths_as_json=truths_as_json,
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
        check_row(all(isinstance(row, dict) for row in rows), f"{file} must list objects", rows)
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
