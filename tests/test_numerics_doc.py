"""docs/numerics.md: the tests that it names exist, and its tolerances are the ones in use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch

from tests.helpers.error_rule import TOLERANCE

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "numerics.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    references = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)
    assert len(references) >= 40
    assert len(references) == TEXT.count("::")
    for file, function in references:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in names and function.startswith("test_"), f"{file}::{function}"


def test_every_promise_names_its_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("|") and line.count("|") == 4]
    promises = [row for row in rows if not re.fullmatch(r"\|[-|]+\||\| promise .*", row)]
    assert len(promises) >= 35
    assert [row for row in promises if "::test_" not in row] == []


def test_tolerances_are_those_in_use() -> None:
    header, _, values = (
        line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.count("|") == 5
    )
    dtypes = {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }
    assert {
        dtypes[name]: float(value) for name, value in zip(header, values, strict=True)
    } == TOLERANCE
