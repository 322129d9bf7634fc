"""Holds what the tables of bad input share.

That is a finished run, which a refused command must leave as it is, and damaged copies of its
student.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from socpo_fast.cli import main
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR

CONFIG = Path(__file__).parents[2] / "configs" / "molar_mass.toml"
SMALL = {
    "config": CONFIG,
    "run.name": "run",
    "run.num_batches": 1,
    "run.live": "false",
    "data.builtin_train_questions": 8,
    "data.builtin_eval_questions": 2,
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "train.questions_per_update": 2,
    "engine.kv_cache_gib": 0.02,
    "eval.samples": 1,
}
Words = dict[str, Any]


def words_of(command: str, run_dir: Path, words: Words) -> list[str]:
    """Returns the command line: small settings first, then the settings of the case.

    A key whose value is None is a bare word.
    """
    settings = {**SMALL, "run.dir": run_dir, **words}
    pairs = [
        [f"--{name}", str(value)] if value is not None else [name]
        for name, value in settings.items()
    ]
    return [command, *(word for pair in pairs for word in pair)]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns run.dir with a finished run of one batch; tests work on copies of it."""
    run_dir = tmp_path_factory.mktemp("runs")
    assert main(words_of("train", run_dir, {})) == 0
    return run_dir


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    """Returns a copy of the finished run that the test may change."""
    shutil.copytree(finished_run, tmp_path / "runs")
    return tmp_path / "runs"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Reads all files below the folder, as bytes by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_refused(shown: str, message: str) -> None:
    """Asserts that the output is one line that starts with the pattern `message`.

    Warnings are not counted. A traceback fails the test.
    """
    lines = [line for line in shown.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, shown
    assert re.match(message, lines[0]), lines[0]
    assert "Traceback" not in shown


def assert_train_refuses(
    case: tuple[Callable[[Path], Words], str],
    run_dir: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Asserts that `socpo train` refuses the case and leaves the finished run as it was.

    The exit code must be 2, and the message that of the case.
    """
    make_words, message = case
    words = make_words(folder)
    files_before = snapshot(run_dir)
    assert main(words_of("train", run_dir, words)) == 2
    assert_refused(capsys.readouterr().err, message)
    assert snapshot(run_dir) == files_before


def damaged_student(damage: Callable[[Path], object]) -> Callable[[Path], Words]:
    """Returns a case whose student.path is the built-in student after `damage`."""

    def make(folder: Path) -> Words:
        shutil.copytree(STUDENT_DIR, folder / "student")
        damage(folder / "student")
        return {"student.path": folder / "student"}

    return make


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Returns a function that sets fields of a JSON file in a folder; None removes a field."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8")) | changes
        fields = {key: value for key, value in content.items() if value is not None}
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")

    return edit


def edit_tensors(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Returns a function that applies `edit` to the tensors of a folder's model.safetensors."""

    def edited(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edited


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Returns a function that writes a file into a folder."""

    def written(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return written
