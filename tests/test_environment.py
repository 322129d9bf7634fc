"""Tests need a Triton and a numpy that work together, and must import our own `tests` package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.interpreter import incompatible_pair

ROOT = Path(__file__).resolve().parent.parent


def run_python(*args: str, python_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in the root of the repository with python_path first on sys.path."""
    env = {**os.environ, "PYTHONPATH": str(python_path), "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("triton", "numpy"),
    [
        ("3.7.1", "2.4.6"),
        ("4.0", "2.5.2"),
        ("3.6.0", "2.3.5"),
        ("3.5.1", "1.26.4"),
        (None, "2.4.6"),
    ],
)
def test_compatible_pairs_pass(triton: str | None, numpy: str) -> None:
    assert incompatible_pair(triton, numpy) is None


@pytest.mark.parametrize("numpy", ["2.4.0rc1", "2.4.6", "2.10.0", "3.0"])
def test_incompatible_pairs_are_refused(numpy: str) -> None:
    expected = f"numpy must be < 2.4 beside triton 3.6, got {numpy}; pip install 'numpy<2.4'"
    assert incompatible_pair("3.6.0+git1234", numpy) == f"tests: {expected}"


def test_incompatible_pair_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """Python reads the versions from the first metadata on its path, so these are planted there."""
    for package, version in (("triton", "3.6.0"), ("numpy", "2.4.6")):
        folder = tmp_path / f"{package}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text, encoding="utf-8")
    arguments = ("-m", "pytest", "--collect-only", "-q", "tests/test_error_rule.py")
    result = run_python(*arguments, python_path=tmp_path)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "tests: numpy must be < 2.4 beside triton 3.6, got 2.4.6" in result.stderr
    assert "test_error_rule" not in result.stdout and "Traceback" not in result.stderr


def test_another_package_named_tests_cannot_hide_ours(tmp_path: Path) -> None:
    """Some wheels install a package named tests; ours stands in the root and must win."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    code = "from tests.helpers.error_rule import assert_error_rule"
    result = run_python("-c", code, python_path=tmp_path)
    assert result.returncode == 0, result.stderr
    arguments = ("-m", "pytest", "--collect-only", "-q", "tests/test_error_rule.py")
    result = run_python(*arguments, python_path=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_error_rule_names_the_worst_element" in result.stdout
