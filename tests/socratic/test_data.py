"""Data sets: good rows in both layouts, bad rows named by file and row, the order of questions."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from datasets import Dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from socpo_fast.socratic.data import batch_questions, load_questions, question_order
from socpo_fast.types import Question

VERL_ROW: dict[str, Any] = {
    "prompt": [{"content": "Be exact.", "role": "system"}, {"content": "1 + 1?", "role": "user"}],
    "data_source": "sums",
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"answer": "", "index": 0},
}


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def test_verl_parquet(tmp_path: Path) -> None:
    solved = {**VERL_ROW, "extra_info": {"answer": "1 + 1 = 2", "index": 1}}
    path = tmp_path / "train.parquet"
    Dataset.from_list([VERL_ROW, solved]).to_parquet(path)
    first, second = load_questions(str(path))
    assert first.messages == (
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "1 + 1?"},
    )
    assert (first.question_idx, first.text, first.ground_truth, first.data_source) == (
        0,
        "1 + 1?",
        "2",
        "sums",
    )
    assert (first.reference_solution, second.reference_solution, second.question_idx) == (
        None,
        "1 + 1 = 2",
        1,
    )
    assert [question.text for question in load_questions(str(tmp_path), split="train")] == [
        "1 + 1?"
    ] * 2


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"question": "2 + 2?", "ground_truth": "4", "reference_solution": "four"},
        "",
        {"question": "3\u20284?", "ground_truth": 7, "system": "Add.", "data_source": "mine"},
        VERL_ROW,
    ]
    questions = load_questions(write_jsonl(tmp_path / "mixed.jsonl", rows))
    assert [question.ground_truth for question in questions] == ["4", "7", "2"]
    assert [question.data_source for question in questions] == ["mixed", "mine", "sums"]
    assert questions[0].reference_solution == "four"
    assert questions[1].messages[0] == {"role": "system", "content": "Add."}
    assert questions[1].text == "3\u20284?"
    assert [question.question_idx for question in questions] == [0, 1, 2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{bad", "must be a JSON object, got '{bad'"),
        ("[1]", "must be a JSON object, got '[1]'"),
        ({"text": "?"}, "question is missing, the columns are text; name its column by data."),
        ({"question": "?"}, "ground_truth is missing"),
        ({"question": "?", "ground_truth": ""}, "ground_truth is blank"),
        (
            '{"question": "?", "ground_truth": NaN}',
            "ground_truth must be text or a number, got nan",
        ),
        ('{"question": "?", "ground_truth": ' + "1" * 5000 + "}", "must be a JSON object, got"),
        ("[" * 100_000, "must be a JSON object, got"),
        (
            {"question": "?", "ground_truth": "1", "data_source": 3},
            "data_source must be text, got 3",
        ),
        (
            {"question": 3, "ground_truth": "1"},
            "question must be text or a non-empty list of messages, got 3",
        ),
        ({"question": "\ud800", "ground_truth": "1"}, "surrogates not allowed"),
        (
            {"question": "?", "ground_truth": True},
            "ground_truth must be text or a number, got True",
        ),
        ({"question": " ", "ground_truth": "1"}, "the user message must have text, got ' '"),
        (
            {"question": "?", "ground_truth": "1", "reference_solution": 3},
            "reference_solution must be text, got 3",
        ),
        ({**VERL_ROW, "prompt": 3}, "prompt must be text or a non-empty list of messages, got 3"),
        ({**VERL_ROW, "prompt": []}, "prompt must be text or a non-empty list of messages, got []"),
        (
            {**VERL_ROW, "prompt": [{"role": "tool", "content": "x"}]},
            "a message must have a role of system, user, assi",
        ),
        (
            {**VERL_ROW, "prompt": VERL_ROW["prompt"][:1]},
            "the last message must be the user's, got system",
        ),
        ({**VERL_ROW, "reward_model": {"style": "rule"}}, "reward_model.ground_truth is missing"),
        ({**VERL_ROW, "reward_model": None}, "reward_model.ground_truth is missing"),
        ({**VERL_ROW, "reward_model": "rule"}, "reward_model must be an object, got 'rule'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, reason: str) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [VERL_ROW, "", row])
    with pytest.raises(ValueError, match="data: train.jsonl row 3: ") as error:
        load_questions(path)
    assert reason in str(error.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)row 1: .*row 5: .*and 3 more bad rows"):
        load_questions(write_jsonl(tmp_path / "train.jsonl", [f"{{{n}" for n in range(8)]))
    with pytest.raises(ValueError, match=r"^data: train.jsonl row 1 and 7 more rows: must be"):
        load_questions(write_jsonl(tmp_path / "train.jsonl", ["{"] * 8))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    for name, content, reason in [
        ("empty.jsonl", b"\n\n", "must hold at least one question, got none"),
        (
            "latin.jsonl",
            b'{"question": "\xe9"}\n',
            "row 1: must be UTF-8, got byte 0xe9 after 14 others",
        ),
        ("junk.parquet", b"junk", "must be readable as parquet"),
        ("rows.csv", b"a,b\n", "path must be a .jsonl, .json, .parquet file"),
        ("rows.json.gz", b"", "path must be a .jsonl, .json, .parquet file"),
        ("rows.txt", b"?\n", "a folder of them, or owner/name of the hub, got "),
        ("list.json", b'[{"question": "?"', "must be readable as JSON (Expecting "),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="data: ") as error:
            load_questions(str(tmp_path / name))
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="path must be an existing file"):
        load_questions(str(tmp_path / "absent.parquet"))


OPTIONS = "Which?\n\nA: 1\nB: 2\nC: 3\n"


@pytest.mark.parametrize(
    ("grader", "text", "truth", "rule"),
    [
        ("sciknoweval", "Which?", "E", "one of A, B, C, D for grader sciknoweval, got 'E'"),
        ("sciknoweval", "Which?", "b", "one of A, B, C, D for grader sciknoweval, got 'b'"),
        ("sciknoweval", "Which?", "AB", "one of A, B, C, D for grader sciknoweval, got 'AB'"),
        ("sciknoweval", OPTIONS, "D", "one of A, B, C for grader sciknoweval, got 'D'"),
        ("mcq", "Which?", "K", "one of A, B, C, D, E, F, G, H, I, J for grader mcq, got 'K'"),
        ("mcq", OPTIONS, "d", "one of A, B, C for grader mcq, got 'd'"),
        ("mcq", "Which?", 2, "one of A, B, C, D, E, F, G, H, I, J for grader mcq, got '2'"),
        ("mcq", OPTIONS, "c", None),
        # "A." and "C." are no list of options here.
        ("sciknoweval", "By\nA. Smith and\nC. Jones", "D", None),
        ("exact", OPTIONS, "D", None),
    ],
)
def test_ground_truth_must_be_an_option(
    tmp_path: Path, grader: str, text: str, truth: Any, rule: str
) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl", [VERL_ROW | {"reward_model": {"ground_truth": "A"}}]
    )
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": text, "ground_truth": truth}) + "\n")
    if rule is None:
        assert len(load_questions(path, grader=grader)) == 2
        return
    with pytest.raises(
        ValueError, match=r"data: train.jsonl row 2: ground_truth must be "
    ) as error:
        load_questions(path, grader=grader)
    assert rule in str(error.value)


def test_folder_data_set_has_splits_and_subsets(tmp_path: Path) -> None:
    """A folder may be laid out as the repository of a data set on the Hugging Face hub."""
    for name, truth in (("train", "1"), ("validation", "2"), ("hard", "3")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "?", "ground_truth": truth}])
    assert load_questions(str(tmp_path), split="validation")[0].ground_truth == "2"
    with pytest.raises(
        ValueError, match=r"with a split 'test' \(Bad split: test. Available splits: .*validation"
    ):
        load_questions(str(tmp_path), split="test")
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("train", "hard")]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    assert load_questions(str(tmp_path), subset="hard")[0].ground_truth == "3"
    for subset, reason in ((None, "Config name is missing"), ("soft", "'soft' not found")):
        with pytest.raises(ValueError, match=f"data: .*{reason}"):
            load_questions(str(tmp_path), subset=subset)


def test_code_in_a_data_set_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        ValueError, match="data: .*scripted must be readable as a data set with a split 'train'"
    ):
        load_questions(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is loaded by name, split and subset, and streamed; errors of the hub become one line."""
    calls: list[Any] = []
    builder = load_dataset_builder
    folders = {"main": tmp_path / "main", "bad": tmp_path / "bad"}
    for name, rows in (("main", [VERL_ROW]), ("bad", [VERL_ROW, {"question": "?"}])):
        folders[name].mkdir()
        write_jsonl(folders[name] / "test.jsonl", rows)

    def hub(name: str, subset: str, **options: Any) -> Any:
        calls.append((name, subset))
        return builder(str(folders[subset]), **options)

    monkeypatch.setattr("datasets.load_dataset_builder", hub)
    assert load_questions("owner/name", split="test", subset="main")[0].text == "1 + 1?"
    assert calls == [("owner/name", "main")]
    with pytest.raises(ValueError, match=r"test.jsonl row 2: ground_truth is missing"):
        load_questions("owner/name", split="test", subset="bad")
    for error in (
        DatasetNotFoundError("no such data set"),
        ConnectionError("offline"),
        DatasetGenerationError("x"),
    ):
        monkeypatch.setattr("datasets.load_dataset_builder", Mock(side_effect=error))
        with pytest.raises(
            ValueError, match="data: owner/name must be readable as a data set with a split 'train'"
        ):
            load_questions("owner/name")


class WordBridge:
    """A bridge that counts words as tokens."""

    takes_system = True

    def prompt_ids(self, messages: tuple[dict[str, str], ...]) -> list[int]:
        return [0] * sum(len(message["content"].split()) for message in messages)


def test_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": "w " * n, "ground_truth": str(n)} for n in (5, 50, 6)]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.warns(UserWarning, match="left out 1 of 3 prompts over 6 tokens"):
        questions = load_questions(path, bridge=WordBridge(), max_prompt_tokens=6)  # type: ignore[arg-type]
    assert [(question.question_idx, question.ground_truth) for question in questions] == [
        (0, "5"),
        (1, "6"),
    ]
    with pytest.raises(ValueError, match="every prompt is longer than 4 tokens"):
        load_questions(path, bridge=WordBridge(), max_prompt_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs bridge"):
        load_questions(path, max_prompt_tokens=4)


def make_questions(n: int) -> list[Question]:
    return [
        Question(
            question_idx=i,
            messages=({"role": "user", "content": str(i)},),
            ground_truth="",
            data_source="",
        )
        for i in range(n)
    ]


def test_question_order_is_frozen() -> None:
    assert question_order(0, 0, 8) == [0, 2, 1, 5, 4, 3, 6, 7]
    assert question_order(0, 0, 8) != question_order(0, 1, 8)
    assert question_order(0, 0, 8) != question_order(1, 0, 8)
    assert sorted(question_order(7, 3, 100)) == list(range(100))


@given(n=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_questions_once_an_epoch_never_twice_a_batch(
    n: int, data: st.DataObject, seed: int
) -> None:
    size = data.draw(st.integers(1, n))
    questions = make_questions(n)
    epochs = 4
    num_batches = -(-epochs * n // size)
    batches = [
        [q.question_idx for q in batch_questions(questions, seed, b, size)]
        for b in range(num_batches)
    ]
    assert all(len(set(batch)) == size for batch in batches)
    question_idxs = [idx for batch in batches for idx in batch]
    for epoch in range(epochs):
        assert sorted(question_idxs[epoch * n : (epoch + 1) * n]) == list(range(n))
    # A resumed run may ask for any batch first.
    batch_idx = data.draw(st.integers(0, num_batches - 1))
    batch = batch_questions(questions, seed, batch_idx, size)
    assert [question.question_idx for question in batch] == batches[batch_idx]


def test_each_epoch_has_its_own_permutation() -> None:
    questions = make_questions(10)
    batches = [[q.question_idx for q in batch_questions(questions, 5, b, 5)] for b in range(4)]
    assert batches[0] + batches[1] == question_order(5, 0, 10)
    assert batches[2] + batches[3] == question_order(5, 1, 10) != question_order(5, 0, 10)
    with pytest.raises(
        ValueError, match=r"questions_per_batch must be in \[1, 10 questions\], got 11"
    ):
        batch_questions(questions, 5, 0, 11)


@pytest.mark.skipif(
    "SOCPO_SCIKNOWEVAL" not in os.environ, reason="SOCPO_SCIKNOWEVAL names no folder"
)
def test_real_sciknoweval() -> None:
    files = sorted(Path(os.environ["SOCPO_SCIKNOWEVAL"]).glob("*/*.parquet"))
    assert files
    for path in files:
        questions = load_questions(str(path), grader="sciknoweval")
        assert {question.ground_truth for question in questions} == set("ABCD")
        assert {question.data_source for question in questions} == {
            f"sciknoweval/{path.parent.name}"
        }
