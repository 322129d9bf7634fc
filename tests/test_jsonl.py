"""Rows of a JSON lines file: they are read as written, and torn lines are left out and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from socpo_fast.report.tracker import append_row, read_jsonl, replace_jsonl


def test_rows_come_back_in_order_and_unescaped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    rows = [{"text": "tés"}, {"number": 0.1}]
    replace_jsonl(path, rows[:1])
    with path.open("a", encoding="utf-8") as file:
        append_row(file, rows[1])
        assert read_jsonl(path) == rows, "a row is on the disk before close"
    assert path.read_text(encoding="utf-8") == '{"text": "tés"}\n{"number": 0.1}\n'


def test_a_torn_line_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ', encoding="utf-8")
    with pytest.warns(UserWarning, match="rows.jsonl: 1 torn lines left out"):
        assert read_jsonl(path) == [{"a": 1}]


def test_line_separators_inside_text_do_not_tear_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = "a\u2028b\x85c\nd"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [{"text": text}]


def test_deeply_nested_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{"[" * 100_000}\n3\n')
    with pytest.warns(UserWarning, match="rows.jsonl: 2 torn lines left out"):
        assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}]
