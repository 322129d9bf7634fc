"""Data sets whose columns have other names, rows from Python, and what reads which file."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError

from socpo_fast.config import load_config
from socpo_fast.session import Session
from socpo_fast.socratic import data_files
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


WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from socpo_fast.socratic.data import load_questions
for path in sys.argv[2:]:
    try:
        print(load_questions(path)[0].ground_truth)
    except ValueError as error:
        print(error)
"""


def test_json_needs_no_other_library(tmp_path: Path) -> None:
    """Without pyarrow and datasets, what needs them is refused with the command to install it."""
    row = {"question": "?", "ground_truth": 2.50}
    lines = write(tmp_path / "rows.jsonl", row)
    (tmp_path / "list.json").write_text(json.dumps([row], indent=1), encoding="utf-8")
    parquet = str(tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist([row]), parquet)

    def read(without: str, *paths: str) -> list[str]:
        words = [sys.executable, "-c", WITHOUT, without, *paths]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()

    install = "got none; pip install 'socpo_fast"
    paths = [lines, str(tmp_path / "list.json"), parquet, str(tmp_path), "owner/name"]
    assert read("datasets,pyarrow", *paths) == [
        "2.5",
        "2.5",
        f"data: {parquet} needs the package pyarrow, {install}[parquet]'",
        f"data: {tmp_path} needs the package datasets, {install}[datasets]'",
        "data: owner/name (no file or folder has this name, so it must be on the hub) needs the "
        f"package datasets, {install}[datasets]'",
    ]
    assert read("datasets", parquet) == ["2.5"]


def test_a_list_in_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = '{"question": "?", "ground_truth": 2.50}'
    path.write_text(f"\ufeff[{row},\n {row}]", encoding="utf-8")
    assert [question.ground_truth for question in load_questions(str(path))] == ["2.50"] * 2
    path.write_text(f'[{row}, "?"]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data: rows.json row 2: must be an object, got '\?'"):
        load_questions(str(path))
    path.write_text(f"{row}\n\n{row}\n", encoding="utf-8")
    assert len(load_questions(str(path))) == 2


class Limited(io.BytesIO):
    """A file that refuses to hand out a line of any length."""

    def readline(self, size: int | None = -1) -> bytes:
        assert size is not None and 0 < size <= 22
        return super().readline(size)


def test_long_lines_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused by their length without being read as a whole, and lines stay counted."""
    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 20)
    lengths = [19, 20, 21, 22, 23, 100, 20]
    for end in ("\n", "\r\n"):
        text = end.join(f'{{"a": "{"x" * (length - 9)}"}}' for length in lengths)
        rows = list(data_files.json_rows(Limited(text.encode()), "rows.jsonl"))
        assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
        assert [len(row["a"]) + 9 for _, row in rows if isinstance(row, dict)] == [19, 20, 20]
        assert [str(row) for _, row in rows if isinstance(row, ValueError)] == [
            f"must have at most 20 bytes, got {length}" for length in (21, 22, 23, 100)
        ]


def test_labels_of_a_single_file(tmp_path: Path) -> None:
    """Their names stand in the file; -1 is the label of rows that have none."""
    kinds = {"ground_truth": ClassLabel(names=["A", "B"]), "style": Value("string")}
    features = Features({"prompt": Value("string"), "reward_model": kinds})
    path = tmp_path / "rows.parquet"
    truths = [{"ground_truth": label, "style": "rule"} for label in (1, 0, -1)]
    Dataset.from_dict({"prompt": ["?"] * 3, "reward_model": truths}, features).to_parquet(path)
    with pytest.raises(ValueError, match=r"row 3: reward_model.ground_truth is missing$"):
        load_questions(str(path))
    pq.write_table(pq.read_table(path).slice(0, 2), path)
    assert [question.ground_truth for question in load_questions(str(path))] == ["B", "A"]


CARD = """---
dataset_info:
  features:
  - name: question
    dtype: string
  - name: ground_truth
    dtype:
      class_label:
        names:
          '0': A
          '1': B
  splits:
  - name: train
    num_examples: 2
---
"""


def test_labels_of_a_data_card(tmp_path: Path) -> None:
    """On the hub the names of labels often stand in README.md only."""
    table = pa.table({"question": ["?", "?"], "ground_truth": [1, 0]})
    pq.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "README.md").write_text(CARD)
    assert [question.ground_truth for question in load_questions(str(tmp_path))] == ["B", "A"]


@pytest.mark.parametrize("written", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": []}}'])
def test_damaged_label_names(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"question": ["?"], "ground_truth": [1]})
    pq.write_table(table.replace_schema_metadata({b"huggingface": written}), path)
    if written == b"{":
        with pytest.raises(ValueError, match=r"rows.parquet must be readable as parquet \(Expect"):
            load_questions(str(path))
    else:
        assert load_questions(str(path))[0].ground_truth == "1"


def test_compressed_lines_of_a_folder(tmp_path: Path) -> None:
    row = json.dumps({"question": "?", "ground_truth": 2}) + "\n"
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress((row + "\n" + "{").encode()))
    with pytest.raises(ValueError, match=r"^data: train.jsonl.gz row 3: must be a JSON object"):
        load_questions(str(tmp_path))


def test_a_missing_path_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with one slash may be a missing folder or a data set of the hub."""
    ask = Mock(side_effect=DatasetNotFoundError("not on the hub"))
    monkeypatch.setattr("datasets.load_dataset_builder", ask)
    message = (
        r"data: data/sums must be readable as a data set with a split 'train' \(no file or folder "
        r"has this name, so it must be on the hub: not on the hub\)"
    )
    with pytest.raises(ValueError, match=message):
        load_questions("data/sums")
    for path in ("sums", "/sums", "./sums", "~/sums", "a/b/sums", "../sums"):
        with pytest.raises(ValueError, match="or owner/name of the hub, got .*; there is no such"):
            load_questions(path)
    assert ask.call_count == 1
