"""An output that is closed or takes only ASCII does not end a run or change its exit code."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bad_input import words_of

ROOT = Path(__file__).parent.parent
WORDS = {"run.num_batches": 1, "data.eval": "none"}


@pytest.mark.parametrize(
    "prefix",
    [
        ["bash", "-c", 'exec "$@" >&-', "bash"],
        ["env", "PYTHONIOENCODING=ascii"],
    ],
    ids=["closed", "ascii"],
)
def test_an_output_that_takes_nothing(prefix: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "\u00fc"
    words = words_of("train", folder, WORDS | {"run.num_batches": 1})
    result = subprocess.run(
        [*prefix, sys.executable, "-m", "socpo_fast.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr
    assert (folder / "run" / "report.html").is_file()


def test_a_function_that_closes_the_output(tmp_path: Path) -> None:
    words = WORDS | {"run.num_batches": 2, "teacher.rule": f"{__name__}:close_output"}
    result = subprocess.run(
        [sys.executable, "-m", "socpo_fast.cli", *words_of("train", tmp_path, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


def close_output(_request: Any) -> str:
    """Plays a teacher that closes stdout."""
    sys.stdout.close()
    return "Look again."
