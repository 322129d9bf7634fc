"""Makes questions of rows and picks those of each batch.

Read questions_from_rows, then load_questions and batch_questions. data_files.py reads the rows of
files and hub data sets, and question_rows.py makes a Question of a row.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from socpo_fast.socratic.bridge import Bridge
from socpo_fast.socratic.data_files import read_rows
from socpo_fast.socratic.graders import check_ground_truth
from socpo_fast.socratic.question_rows import (
    Columns,
    absent_column,
    check_row,
    columns_read,
    has_column,
    to_question,
    to_row,
)
from socpo_fast.types import Question

_SHOWN_ERRORS = 5
_OF_LAYOUT = Columns()


class Questions(list[Question]):
    """The questions of a data set, and how many were left out since their prompt is too long."""

    num_left_out = 0


def questions_from_rows(
    rows: Iterable[Any],
    *,
    name: str,
    grader: str = "exact",
    bridge: Bridge | None = None,
    max_prompt_tokens: int | None = None,
    truths_as_json: bool = False,
    columns: Columns = _OF_LAYOUT,
) -> Questions:
    """Returns the questions of rows from Python; `questions[i].question_idx` is i.

    Args:
        rows: dicts in the layouts of question_rows.py, and Question objects, in any mixture. A
              Question is checked like a row and numbered anew.
        name: stands for a file in errors, and is the data_source of rows that have none.

    The others are those of load_questions, and so are the errors, but rows are counted from 0.
    """
    numbered = ((f"{name} row {number}", row) for number, row in enumerate(rows))
    questions, wheres = _check_rows(numbered, name, name, columns, grader, truths_as_json)
    return _drop_overlong(questions, wheres, name, bridge, max_prompt_tokens)


def load_questions(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    grader: str = "exact",
    bridge: Bridge | None = None,
    max_prompt_tokens: int | None = None,
    truths_as_json: bool = False,
    columns: Columns = _OF_LAYOUT,
) -> Questions:
    """Returns all questions of a data set; `questions[i].question_idx` is i.

    Args:
        path:              a .jsonl, .json or .parquet file, a folder of them, or the name of a hub
                           data set. Brackets and stars are ordinary characters of a path.
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
        columns:           names of the columns, where they are not those of the layouts.

    Raises:
        ValueError: the file is missing or unreadable, rows are bad (the first few are listed as
            file, row counted from 1, and reason), or no question is left.
    """
    name = Path(path).name
    rows = read_rows(path, split=split, subset=subset, columns=columns_read(columns))
    source = Path(path).stem
    questions, wheres = _check_rows(rows, name, source, columns, grader, truths_as_json)
    return _drop_overlong(questions, wheres, name, bridge, max_prompt_tokens)


def _check_rows(
    rows: Iterable[tuple[str, Any]],
    name: str,
    source: str,
    columns: Columns,
    grader: str,
    truths_as_json: bool,
) -> tuple[list[Question], list[str]]:
    """Returns the questions of all rows, and where each one stands; refuses bad rows together."""
    questions: list[Question] = []
    wheres: list[str] = []
    bad_rows: dict[str, list[str]] = {}  # by what is wrong with them
    # Optional columns that have a name but were in no row yet.
    optional = {"reference_solution": columns.reference_solution, "system": columns.system}
    unseen = {key: column for key, column in optional.items() if column is not None}
    row: Any = {}
    for where, item in rows:
        try:
            if isinstance(item, ValueError):
                raise item
            row = to_row(item, columns) if isinstance(item, Question) else item
            check_row(isinstance(row, Mapping), "must be a dict or a Question", row)
            question = to_question(
                row,
                columns,
                question_idx=len(questions),
                default_source=source,
                truths_as_json=truths_as_json,
            )
            check_ground_truth(grader, question)
            unseen = {key: x for key, x in unseen.items() if not has_column(row, x)}
        except ValueError as error:
            bad_rows.setdefault(str(error), []).append(where)
        else:
            questions.append(question)
            wheres.append(where)
    if bad_rows:
        lines = [
            f"data: {first}{f' and {len(more)} more rows' if more else ''}: {reason}"
            for reason, (first, *more) in bad_rows.items()
        ]
        num_more = sum(map(len, [*bad_rows.values()][_SHOWN_ERRORS:]))
        more_text = f"\n.. and {num_more} more bad rows" if num_more else ""
        raise ValueError("\n".join(lines[:_SHOWN_ERRORS]) + more_text)
    if not questions:
        raise ValueError(f"data: {name} must hold at least one question, got none")
    if unseen:
        key, column = unseen.popitem()
        raise ValueError(f"data: {name}: in every row {absent_column(row, column, key)}")
    return questions, wheres


def _drop_overlong(
    questions: list[Question],
    wheres: list[str],
    name: str,
    bridge: Bridge | None,
    limit: int | None,
) -> Questions:
    """Returns the questions whose prompt has at most `limit` tokens, numbered anew from 0."""
    if limit is None:
        return Questions(questions)
    if bridge is None:
        raise ValueError("load_questions: max_prompt_tokens needs bridge, got None")
    kept = Questions()
    for where, question in zip(wheres, questions, strict=True):
        try:
            if not bridge.takes_system and any(m["role"] == "system" for m in question.messages):
                raise ValueError("must have no system message, the chat template drops it")
            if len(bridge.prompt_ids(question.messages)) <= limit:
                kept.append(replace(question, question_idx=len(kept)))
        # Some chat templates refuse system messages.
        except ValueError as error:
            raise ValueError(f"data: {where}: {error}") from error
    if not kept:
        raise ValueError(
            f"data: {name}: every prompt is longer than {limit} tokens; raise "
            "data.max_prompt_tokens"
        )
    kept.num_left_out = len(questions) - len(kept)
    if kept.num_left_out:
        warnings.warn(
            f"data: {name}: left out {kept.num_left_out} of {len(questions)} prompts "
            f"over {limit} tokens",
            stacklevel=3,
        )
    return kept


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
