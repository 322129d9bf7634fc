"""Which library reads which kind of file, and what the readers make of odd ones."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError

from socpo_fast.socratic import data_files
from socpo_fast.socratic.data import load_questions
from socpo_fast.socratic.question_rows import Columns
from tests.socratic.test_data_columns import write

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


@pytest.mark.parametrize("blank", [" ", "\n", "\ufeff\r\n\n \t"])
def test_blanks_before_the_rows_of_json(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "rows.json"
    row = '{"question": "?", "ground_truth": 2}'
    for text in (f"[{row}, {row}]", f"{row}\n{row}\n"):
        path.write_text(blank + text, encoding="utf-8")
        assert len(load_questions(str(path))) == 2
    path.write_text(f"{blank}{row}\n?", encoding="utf-8")
    number = 2 + blank.count("\n")
    with pytest.raises(ValueError, match=f"rows.json row {number}: must be a JSON object"):
        load_questions(str(path))


def test_unused_columns_of_parquet_are_not_read(tmp_path: Path) -> None:
    """They may hold what Python has no type for; an error still lists them."""
    late = pa.array([2**62, 1], pa.timestamp("us"))
    zone = pa.array([1, 1], pa.timestamp("us", tz="Mars/Base"))
    inner = pa.StructArray.from_arrays([late, zone], ["seen", "sold"])
    table = pa.table({"problem": ["?", "!"], "truth": [1, 2], "late": late, "when": inner})
    path = tmp_path / "train.parquet"
    pq.write_table(table, path)
    for name in (path, tmp_path):
        columns = Columns(question="problem", ground_truth="truth")
        questions = load_questions(str(name), columns=columns)
        assert [question.ground_truth for question in questions] == ["1", "2"]
        message = (
            "the columns are late, problem, truth, when.seen, when.sold; did you mean .*=truth"
        )
        with pytest.raises(ValueError, match=message):
            load_questions(str(name), columns=Columns(question="problem", ground_truth="trut"))
    pq.write_table(table.append_column("images", [[[], ["x"]]]), path)
    with pytest.raises(ValueError, match=r"train.parquet row 2: images must be empty, .* \['x'\]"):
        load_questions(str(path), columns=columns)


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
