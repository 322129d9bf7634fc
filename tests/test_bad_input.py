"""Settings, data and folders that cannot work are refused in one line, with exit code 2.

The files of an existing run stay bitwise as they were. CASES has a case for each mistake: a
function that writes the files and returns the arguments, and a pattern for the line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet_file
import pytest
from pyarrow import Table

from socpo_fast.cli import main
from tests.helpers.bad_input import (
    Words,
    assert_refused,
    assert_train_refuses,
    finished_run,
    run_dir,
    snapshot,
    words_of,
)

__all__ = ["finished_run", "run_dir"]  # fixtures

GOOD = {"question": "1 + 1?", "ground_truth": "2"}
OPTIONS = "Which?\nA: 1\nB: 2\nC: 3\nD: 4"


def data(*rows: Any, name: str = "rows.jsonl", **settings: Any) -> Callable[[Path], Words]:
    """Returns a case whose data.train is a file of these rows; bytes are written as they are."""

    def make(folder: Path) -> Words:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / name).write_bytes(b"".join(line + b"\n" for line in lines))
        return {
            "data.train": folder / name,
            "data.eval": "none",
            "teacher.kind": "retry",
            **settings,
        }

    return make


def parquet(*rows: Any) -> Callable[[Path], Words]:
    """Returns a case whose data.train is a parquet file of these rows."""

    def make(folder: Path) -> Words:
        parquet_file.write_table(Table.from_pylist(list(rows)), folder / "rows.parquet")
        return {"data.train": folder / "rows.parquet", "data.eval": "none", "teacher.kind": "retry"}

    return make


def folder_named(name: str) -> Callable[[Path], Words]:
    """Returns a case whose data.train is an empty folder."""

    def make(folder: Path) -> Words:
        (folder / name).mkdir()
        return {"data.train": folder / name, "data.eval": "none", "teacher.kind": "retry"}

    return make


def settings(**words: Any) -> Callable[[Path], Words]:
    """Returns a case of these settings: section__key is section.key, {folder} a new folder."""
    return lambda folder: {
        name.replace("__", "."): str(value).format(folder=folder) for name, value in words.items()
    }


def bare(*words: str) -> Callable[[Path], Words]:
    """Returns a case of arguments without a value."""
    return lambda _folder: dict.fromkeys(words)


def toml(text: str) -> Callable[[Path], Words]:
    """Returns a case whose --config is a file with this text."""

    def make(folder: Path) -> Words:
        (folder / "bad.toml").write_text(text, encoding="utf-8")
        return {"config": folder / "bad.toml"}

    return make


def as_file(name: str, **words: Any) -> Callable[[Path], Words]:
    """Returns a case of these settings in which {folder}/name is a file."""

    def make(folder: Path) -> Words:
        (folder / name).write_text("not a run", encoding="utf-8")
        return settings(**words)(folder)

    return make


CASES: dict[str, tuple[Callable[[Path], Words], str]] = {
    # data
    "missing data file": (
        settings(data__train="{folder}/no.jsonl", data__eval="none", teacher__kind="retry"),
        "data: path must be an existing file, got '.*no.jsonl'",
    ),
    "missing evaluation file": (
        settings(data__eval="{folder}/no.parquet", teacher__kind="retry"),
        "data: path must be an existing file, got '.*no.parquet'",
    ),
    "empty data file": (data(), "data: rows.jsonl must hold at least one question, got none"),
    "blank lines only": (
        data(b"", b" "),
        "data: rows.jsonl must hold at least one question, got none",
    ),
    "empty parquet file": (
        data(name="rows.parquet"),
        "data: .*rows.parquet must be readable as parquet ",
    ),
    "a directory named like a file": (
        folder_named("rows.jsonl"),
        "data: .*rows.jsonl must be readable as a data set with a split",
    ),
    "a directory without data": (
        folder_named("rows"),
        "data: .*rows must be readable as a data set with a split",
    ),
    "wrong column": (
        data(GOOD, {"query": "?", "ground_truth": "2"}),
        "data: rows.jsonl row 2: question is missing, the columns are ground_truth, query; name ",
    ),
    "wrong column in parquet": (
        parquet({"text": "?"}),
        "data: rows.parquet row 1: question is missing, the columns are ",
    ),
    "content that is no text": (
        data(GOOD, {"question": 3, "ground_truth": "2"}),
        "data: rows.jsonl row 2: question must be text or a non-empty list of messages, got 3",
    ),
    "message content that is no text": (
        data(
            {"prompt": [{"role": "user", "content": ["?"]}], "reward_model": {"ground_truth": "2"}}
        ),
        r"data: rows.jsonl row 1: the user message must have text, got \['\?'\]",
    ),
    "ground truth outside the options": (
        data({"question": OPTIONS, "ground_truth": "E"}, **{"data.grader": "mcq"}),
        "data: rows.jsonl row 1: ground_truth must be one of A, B, C, D for grader mcq, got 'E'",
    ),
    "all prompts too long": (
        data(GOOD, GOOD, **{"data.max_prompt_tokens": 3}),
        "data: rows.jsonl: every prompt is longer than 3 tokens; raise data.max_prompt_tokens",
    ),
    "a line that is not UTF-8": (
        data(GOOD, b'{"question": "\xff"}'),
        "data: rows.jsonl row 2: must be UTF-8, got byte 0xff after 14 others",
    ),
    "a line that is not JSON": (
        data(GOOD, b"{bad"),
        "data: rows.jsonl row 2: must be a JSON object, got '{bad'",
    ),
    "half a surrogate pair": (
        data({"question": "?", "ground_truth": "\ud800"}),
        "data: rows.jsonl row 1: .*surrogates not allowed",
    ),
    "NaN in JSON": (
        data(b'{"question": "?", "ground_truth": NaN}'),
        "data: rows.jsonl row 1: ground_truth must be text or a number, got nan",
    ),
    "NaN in parquet": (
        parquet({"question": "?", "ground_truth": float("nan")}),
        "data: rows.parquet row 1: ground_truth must be text or a number, got nan",
    ),
    "more questions a batch than there are": (
        data(GOOD),
        r"data: rollout.questions_per_batch must be in \[1, 1 questions\], got 2; lower it",
    ),
    "unknown grader": (
        settings(data__grader="regex"),
        "config: data.grader must be one of sciknoweval, mcq",
    ),
    "grader of no module": (
        settings(data__grader="no_such:thing"),
        "data.grader must name a module that can be",
    ),
    # settings
    "K of 0": (
        settings(rollout__max_attempts=0),
        "config: rollout.max_attempts must be an integer >= 1 and <= 256, got 0",
    ),
    "unknown key": (
        settings(train__lr_rate=3),
        "config: unknown key train.lr_rate; did you mean train.lr?",
    ),
    "unknown key in TOML": (
        toml("[train]\nlr_rate = 3\n"),
        "config: unknown key train.lr_rate; did you mean train.lr?",
    ),
    "unknown table in TOML": (
        toml("[trian]\nlr = 3\n"),
        "config: unknown key trian.lr; did you mean train.lr?",
    ),
    "value out of range": (
        settings(train__lr=7),
        "config: train.lr must be a number > 0 and <= 1, got 7.0",
    ),
    "value of another kind": (
        settings(run__num_batches="two"),
        "config: run.num_batches must be an integer >= 1 and <= 1000000000, got",
    ),
    "value of another kind in TOML": (
        toml('[train]\nepochs = "2"\n'),
        "config: train.epochs must be an integer >= 1 and <= 100, got '2'",
    ),
    "NaN in TOML": (
        toml("[train]\nlr = nan\n"),
        "config: train.lr must be a number > 0 and <= 1, got nan",
    ),
    "infinity": (
        settings(loss__kl_coef="inf"),
        "config: loss.kl_coef must be a number >= 0, got inf",
    ),
    "TOML that is none": (toml("[train\n"), "config: .*bad.toml must be TOML: "),
    "a flag without its value": (
        bare("--train.lr"),
        "socpo train: --train.lr must be followed by its value",
    ),
    "a stray word": (bare("fast"), "socpo train: unexpected 'fast'"),
    "attempts longer than the model": (
        settings(rollout__max_new_tokens=512),
        "rollout: rollout.max_new_tokens must be below the model's 512 positions, got 512",
    ),
    "a KV cache too small": (
        settings(engine__kv_cache_gib=0.0005),
        "engine: engine.kv_cache_gib must hold the longest context, 512 tokens, got room for",
    ),
    "a KV cache of no page": (
        settings(engine__kv_cache_gib=1e-9),
        "Engine: kv_cache_gib must hold at least one page",
    ),
    # folders
    "a run folder that is a file": (
        as_file("taken", run__dir="{folder}", run__name="taken"),
        "run: .*taken must be a writable folder, got (File exists|Not a dir.*): .*taken.*; set run",
    ),
    "a run folder below a file": (
        as_file("taken", run__dir="{folder}/taken"),
        "run: .*taken/run must be a writable folder, got Not a directory: .*; set run.dir",
    ),
    "a run folder where nothing can be written": (
        settings(run__dir="/proc/self"),
        "run: /proc/self/run must be a writable folder, got ",
    ),
    "an old run under run.resume never": (
        settings(run__resume="never"),
        "run: .*run must be new with run.resume never",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_train_refuses(
    case: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_train_refuses(CASES[case], run_dir, tmp_path, capsys)


@pytest.mark.parametrize(
    "case", ["missing evaluation file", "unknown key", "value out of range", "a KV cache too small"]
)
def test_eval_and_rollout_refuse(
    case: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = CASES[case]
    words = make(tmp_path)
    old_files = snapshot(run_dir)
    assert main(words_of("eval", run_dir, words)) == 2
    assert_refused(capsys.readouterr().err, message)
    if case != "missing evaluation file":  # rollout reads no evaluation data
        assert main(words_of("rollout", run_dir, words | {"run.name": "fresh"})) == 2
        assert_refused(capsys.readouterr().err, message)
    assert snapshot(run_dir) == old_files


def test_eval_without_questions_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_of("eval", run_dir, {"data.eval": "none"})) == 2
    assert_refused(
        capsys.readouterr().err, "eval: data.eval must name held-out questions, got none"
    )


def test_rollout_does_not_overwrite_a_training_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old_files = snapshot(run_dir)
    assert main(words_of("rollout", run_dir, {})) == 2
    assert_refused(capsys.readouterr().err, "run: .*run must hold no training run")
    assert snapshot(run_dir) == old_files


def test_a_group_of_one_is_allowed_and_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(
        UserWarning,
        match="rollout.group_size 1 leaves reinforce_plus_plus_baseline little to compare",
    ):
        assert (
            main(words_of("train", tmp_path, {"rollout.group_size": 1, "data.eval": "none"})) == 0
        )
    assert "report: " in capsys.readouterr().out


@pytest.mark.parametrize("case", ["missing data file", "unknown key", "a flag without its value"])
def test_refusal_of_a_process_is_one_line(case: str, run_dir: Path, tmp_path: Path) -> None:
    """A shell sees exit code 2 and one line on stderr; stdout says at most what was loaded."""
    make, message = CASES[case]
    command = [sys.executable, "-m", "socpo_fast.cli", *words_of("train", run_dir, make(tmp_path))]
    old_files = snapshot(run_dir)
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert all(line.startswith("loading ") for line in result.stdout.splitlines())
    assert_refused(result.stderr, message)
    assert snapshot(run_dir) == old_files
