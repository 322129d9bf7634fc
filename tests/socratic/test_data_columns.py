"""Data sets whose columns have other names, and rows from Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from socpo_fast.config import load_config
from socpo_fast.session import Session
from socpo_fast.socratic.data import load_questions, questions_from_rows
from socpo_fast.socratic.question_rows import Columns
from socpo_fast.types import Question

ROW = {"problem": "1 + 1?", "answer": 2, "meta": {"proof": "1, 2", "a.b": "x"}, "tone": "Be kind."}


def write(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(rows: list[Any], **columns: str) -> str:
    with pytest.raises(ValueError, match="data: ") as error:
        questions_from_rows(rows, name="train", columns=Columns(**columns))
    return str(error.value)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_may_have_other_names(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, ROW)
    else:
        pq.write_table(pa.Table.from_pylist([ROW]), path)
    columns = Columns(
        question="problem", ground_truth="answer", reference_solution="meta.proof", system="tone"
    )
    assert load_questions(str(path), columns=columns) == [
        Question(
            question_idx=0,
            messages=(
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "1 + 1?"},
            ),
            ground_truth="2",
            data_source="rows",
            reference_solution="1, 2",
        )
    ]


def test_named_columns_beside_those_of_a_layout() -> None:
    """One name leaves the others as they are; a column that has a dot in its name is found."""
    verl = {
        "chat": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"ground_truth": "2"},
        "extra_info": {"answer": "1, 2"},
    }
    flat = {"chat": "1 + 1?", "ground_truth": "2", "reference_solution": "1, 2"}
    for row in (verl, flat):
        (question,) = questions_from_rows([row], name="train", columns=Columns(question="chat"))
        assert (question.text, question.ground_truth) == ("1 + 1?", "2")
        assert question.reference_solution == "1, 2"
    row = {"prompt": "?", "x.y": "1", "x": {"y": "2"}, "meta": {"a.b": "3"}}
    for name, truth in (("x.y", "1"), ("meta.a.b", "3")):
        (question,) = questions_from_rows([row], name="train", columns=Columns(ground_truth=name))
        assert question.ground_truth == truth


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {},
            "train row 0: question is missing, the columns are answer, meta.a.b, meta.proof, "
            "problem, tone; name its column by data.question_column",
        ),
        (
            {"question": "problm"},
            "train row 0: problm is missing, the columns are answer, meta.a.b, meta.proof, "
            "problem, tone; did you mean data.question_column=problem?",
        ),
        (
            {"question": "problem", "ground_truth": "meta.prof"},
            "train row 0: meta.prof is missing, the columns are answer, meta.a.b, meta.proof, "
            "problem, tone; did you mean data.ground_truth_column=meta.proof?",
        ),
        (
            {"question": "problem", "ground_truth": "answer.text"},
            "train row 0: answer must be an object, got 2",
        ),
        (
            {"question": "problem", "ground_truth": "answer", "system": "tones"},
            "train: in every row tones is missing, the columns are answer, meta.a.b, meta.proof, "
            "problem, tone; did you mean data.system_column=tone?",
        ),
    ],
)
def test_absent_columns_are_told(columns: dict[str, str], message: str) -> None:
    assert refusal([ROW], **columns) == f"data: {message}"


def test_optional_columns_may_be_in_some_rows() -> None:
    rows = [
        {"question": "?", "ground_truth": "1"},
        {"question": "?", "ground_truth": "1", "s": "Hi"},
    ]
    questions = questions_from_rows(rows, name="train", columns=Columns(system="s"))
    assert [len(question.messages) for question in questions] == [1, 2]
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "?"}]
    assert refusal([{"question": chat, "ground_truth": "1", "s": "Hi"}], system="s") == (
        "data: train row 0: question must have no system message beside the system column's, "
        "got 'Hi'"
    )


def test_rows_from_python() -> None:
    """Questions and dicts in any mixture are checked alike and numbered by position."""
    question = Question(
        question_idx=7,
        messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}),
        ground_truth="2",
        data_source="sums",
        reference_solution="1, 2",
    )
    row = {"meta": {"q": "?"}, "truth": 0.1, "solution": None}
    columns = Columns(question="meta.q", ground_truth="truth", reference_solution="solution")
    first, second = questions_from_rows(iter([row, question]), name="train", columns=columns)
    assert (first.ground_truth, first.data_source) == ("0.1", "train")
    assert (second.question_idx, vars(second) | {"question_idx": 7}) == (1, vars(question))
    bad = Question(question_idx=0, messages=(), ground_truth="2", data_source="")
    assert refusal([question, bad, "1 + 1?"]).splitlines() == [
        "data: train row 1: question must be text or a non-empty list of messages, got ()",
        "data: train row 2: must be a dict or a Question, got '1 + 1?'",
    ]
    assert refusal([]) == "data: train must hold at least one question, got none"


def test_numpy_values_of_rows_from_python() -> None:
    row = {"question": "?", "ground_truth": "1"}
    truths = [np.int64(42), np.float32(0.1), np.float64(1e-7)]
    rows = [row | {"ground_truth": truth, "images": np.array([])} for truth in truths]
    questions = questions_from_rows(rows, name="train")
    assert [question.ground_truth for question in questions] == ["42", "0.1", "0.0000001"]
    assert "ground_truth must be text or a number" in refusal([row | {"ground_truth": np.True_}])
    picture = refusal([row | {"images": np.zeros((2, 2))}])
    assert picture.startswith("data: train row 0: images must be empty, as students read text only")


@pytest.mark.parametrize("name", ["image", "images", "videos"])
def test_pictures_are_refused(name: str) -> None:
    row = {"question": "Which animal?", "ground_truth": "cat"}
    assert len(questions_from_rows([row | {name: None}, row | {name: []}], name="train")) == 2
    assert refusal([row | {name: [{"bytes": b"x"}]}]) == (
        f"data: train row 0: {name} must be empty, as students read text only, "
        "got [{'bytes': b'x'}]"
    )


def test_settings_name_columns_of_a_session(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, ROW | {"problem": "long " * 99})
    settings = {
        "data.train": path,
        "data.question_column": "problem",
        "data.ground_truth_column": "answer",
        "data.reference_solution_column": "meta.proof",
        "data.max_prompt_tokens": 90,
        "rollout.max_new_tokens": 16,
        "rollout.attempt_limit": 16,
        "rollout.guidance_limit": 16,
        "teacher.kind": "retry",
    }
    session = Session(load_config(None, settings))
    with pytest.warns(UserWarning, match="left out 1 of 2 prompts"):
        (question,) = session.train_questions()
    assert (question.text, question.reference_solution) == ("1 + 1?", "1, 2")
    assert session.num_left_out == {"train": 1}
