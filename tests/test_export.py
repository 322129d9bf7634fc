"""`socpo export`: a run's rollouts as parquet, which our reader and `datasets` load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from socpo_fast.cli import main
from socpo_fast.report.rollouts import read_rollouts, write_rollouts
from socpo_fast.socratic.data import load_questions
from socpo_fast.types import Question, Rollout
from tests.helpers.bad_input import assert_refused, finished_run
from tests.helpers.made_rollouts import make_rollout

__all__ = ["finished_run"]  # a fixture

QUESTION = Question(
    question_idx=3,
    messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}),
    ground_truth="2.50",
    data_source="sums",
    reference_solution="1 + 1 = 2.50",
)


def rollouts(number: int) -> list[Rollout]:
    """Returns rollouts of 1, 2, .. attempts."""
    return [make_rollout(3, i, [1, 2], [4] * (i + 1), [2] * i) for i in range(number)]


def read(path: Path, cache: Path) -> Dataset:
    return load_dataset("parquet", data_files=str(path), cache_dir=str(cache))["train"]


def test_questions_and_turns_are_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = tmp_path / "rollouts.parquet"
    for batch in (999_999, 1_000_000, 2):
        write_rollouts(run, rollouts(2), {3: QUESTION}, batch=batch)
    assert main(["export", str(run), str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 6 rollouts\n"
    assert load_questions(str(path)) == [replace(QUESTION, question_idx=idx) for idx in range(6)]
    extras = [row["extra_info"] for row in read(path, tmp_path / "cache")]
    assert [(extra["batch"], extra["index"], extra["rollout_idx"]) for extra in extras] == [
        (batch, 3, idx) for batch in (2, 999_999, 1_000_000) for idx in (0, 1)
    ]
    for extra, rollout in zip(extras[:2], rollouts(2), strict=True):
        assert [turn["text"] for turn in extra["turns"]] == [turn.text for turn in rollout.turns]
        assert [turn["guidance"] for turn in extra["turns"]] == [
            turn.guidance and turn.guidance.text for turn in rollout.turns
        ]


def test_a_finished_run(finished_run: Path, tmp_path: Path) -> None:
    """Two questions with two rollouts each; the file of one run can be that of another one."""
    run = finished_run / "run"
    path = tmp_path / "rollouts.parquet"
    path.write_bytes(b"an older one")
    assert main(["export", str(run), str(path)]) == 0
    (rows,) = map(read_rollouts, run.glob("rollouts/*.jsonl"))
    exported = read(path, tmp_path / "cache").to_list()
    assert [[turn["text"] for turn in row["extra_info"]["turns"]] for row in exported] == [
        [turn["text"] for turn in row["turns"]] for row in rows
    ]
    assert [question.ground_truth for question in load_questions(str(path))] == [
        row["ground_truth"] for row in rows
    ]


def test_columns_have_types_without_values(tmp_path: Path) -> None:
    """So that the files of two runs are one data set, although one has no guidance."""
    (tmp_path / "data").mkdir()
    for number, question in ((1, replace(QUESTION, reference_solution=None)), (2, QUESTION)):
        run = tmp_path / f"run{number}"
        write_rollouts(run, rollouts(number), {3: question}, batch=1)
        assert main(["export", str(run), str(tmp_path / "data" / f"train-{number}.parquet")]) == 0
    paths = sorted((tmp_path / "data").glob("*.parquet"))
    one, other = (read(path, tmp_path / "cache").features for path in paths)
    assert one == other
    questions = load_questions(str(tmp_path / "data"))
    references = [question.reference_solution for question in questions]
    assert references == [None, QUESTION.reference_solution, QUESTION.reference_solution]


def test_damaged_and_older_rows_are_told(tmp_path: Path) -> None:
    file = write_rollouts(tmp_path / "run", rollouts(2), {3: QUESTION}, batch=1)
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    del first["prompt"]
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n", encoding="utf-8")
    path = tmp_path / "rollouts.parquet"
    with pytest.warns(UserWarning, match=f"{file}: 1 damaged rows left out"):
        assert main(["export", str(tmp_path / "run"), str(path)]) == 0
    assert len(load_questions(str(path))) == 1


EXAMPLE = "; for example socpo export runs/run rollouts.parquet"
REFUSED = {
    "nothing": ([], r"export: arguments must be a run folder and a file, got \[\]" + EXAMPLE),
    "no file": (["FOLDER"], "export: arguments must be a run folder and a file, got "),
    "a setting": (["FOLDER", "--run.seed"], "export: arguments must be a run folder and a file"),
    "no such folder": (["FOLDER/none", "a.parquet"], "export: the run folder must be one with "),
    "no rollouts": (["FOLDER", "a.parquet"], "export: the run folder must be one with rollouts, "),
    "another kind": (
        ["FOLDER", "a.csv"],
        "export: the file must be named FILE.parquet, got ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    assert main(["export", *(word.replace("FOLDER", str(tmp_path)) for word in words)]) == 2
    assert_refused(capsys.readouterr().err, message)
    assert not list(tmp_path.iterdir())
