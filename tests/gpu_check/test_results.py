"""Checks the results of gpu_check: its lines of JSON, verdicts, and the text and page from them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tools.gpu_check.expectations import EXPECTATIONS, make_figure
from tools.gpu_check.report import figure_line, number, to_markdown, to_text
from tools.gpu_check.results import Figure, append, append_figure, read_results
from tools.gpu_check.stages import NAMES


def figure(value: float, **changes: object) -> Figure:
    fields = {"key": "decode.step_ms", "of": "64 x 800", "value": value, "unit": "ms"}
    return Figure(**fields | changes)


@pytest.mark.parametrize(
    ("better", "value", "share"), [("less", 4.0, 0.5), ("more", 4.0, 2.0), ("less", 1.0, 2.0)]
)
def test_share_of_the_limit(better: str, value: float, share: float) -> None:
    assert figure(value, better=better, limit=2.0).share == share
    assert figure(value, better=better).share is None


@pytest.mark.parametrize(
    ("value", "changes", "verdict"),
    [
        (3.0, {}, ""),
        (3.0, {"goal": 4.0}, "ok"),
        (5.0, {"goal": 4.0}, "missed"),
        (5.0, {"goal": 4.0, "better": "more"}, "ok"),
        (3.0, {"goal": 4.0, "better": "more"}, "missed"),
        (3.0, {"predicted": 4.0}, "ok"),
        (9.0, {"predicted": 4.0}, "surprise"),
        (2.0, {"predicted": 4.0, "goal": 4.0}, "surprise"),  # much better is a surprise as well
        (0.0, {"predicted": 0.0, "goal": 0.0}, "ok"),
        (2.0, {"predicted": 0.0}, "surprise"),
        (math.nan, {"goal": 4.0}, "missed"),
        (math.inf, {}, "missed"),
        (5.0, {"goal": 4.0, "is_rehearsed": True}, "rehearsed"),
    ],
)
def test_verdicts(value: float, changes: dict[str, object], verdict: str) -> None:
    assert figure(value, **changes).verdict == verdict


def test_goals_are_shares_of_the_measured_limit() -> None:
    """A goal given as a share of the limit becomes a number; a special case has its own numbers."""
    made = make_figure("decode.step_ms", 9.0, of="64 x 800", limit=6.0)
    assert made.goal == pytest.approx(6.0 / 0.6) and made.verdict == "ok"
    made = make_figure("rates.sample_gb_s", 1000.0, of="64 rows", limit=3000.0)
    assert made.goal == pytest.approx(1800.0) and made.verdict == "missed"
    assert made.share == pytest.approx(1 / 3)
    general = make_figure(
        "training.peak_gib", 25.0, of="Qwen3-0.6B in bfloat16, 2 groups", limit=None
    )
    special = make_figure(
        "training.peak_gib", 25.0, of="Qwen3-1.7B in bfloat16, 2 groups", limit=None
    )
    assert general.verdict == "ok" and special.predicted != general.predicted
    with pytest.raises(AssertionError, match="write one before it is measured"):
        make_figure("decode.something", 1.0, of="", limit=None)


def test_every_expectation_gives_a_reason_and_a_number() -> None:
    for key, expectation in EXPECTATIONS.items():
        assert key.split(".")[0] in NAMES, key
        assert expectation.reason and (expectation.share, expectation.value) != (None, None), key


def write_run(path: Path, device: str) -> None:
    """Writes a run of one stage with a figure and a failed case."""
    append(path, {"kind": "run", "device": device, "plan": ["rates", "decode"]})
    append(path, {"kind": "begin", "stage": "rates", "revision": "abc123"})
    append_figure(path, "rates", figure(3.0, key="rates.decode_gb_s", limit=6.0))
    append(
        path,
        {"kind": "case", "stage": "rates", "case": "a|b", "status": "failed", "message": "x < y"},
    )
    append(
        path,
        {
            "kind": "stage",
            "stage": "rates",
            "status": "failed",
            "message": "1 failed",
            "seconds": 3.0,
        },
    )


def test_the_latest_outcome_of_a_stage_counts(tmp_path: Path) -> None:
    """A stage that begins again drops its earlier figures; one that never ended was cut short."""
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    results = read_results(path, NAMES)
    assert results.failed() == ["rates"] and results.value_of("rates.decode_gb_s") == 3.0
    assert set(results.unfinished()) == set(NAMES)
    append(path, {"kind": "begin", "stage": "rates"})
    assert read_results(path, NAMES).stages["rates"].status == "cut short"
    append(
        path, {"kind": "stage", "stage": "rates", "status": "passed", "message": "", "seconds": 1.0}
    )
    results = read_results(path, NAMES)
    assert results.failed() == [] and results.stages["rates"].figures == []
    assert "rates" not in results.unfinished()


def test_results_of_another_card_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    append(path, {"kind": "run", "device": "card", "plan": []})
    assert read_results(path, NAMES).stages["rates"].figures
    append(path, {"kind": "run", "device": "another", "plan": []})
    assert read_results(path, NAMES).stages["rates"].status == "not run"


def test_a_record_of_another_version_is_skipped(tmp_path: Path) -> None:
    """Records that lack a field are skipped, and all others are read."""
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    append(path, {"kind": "figure", "stage": "rates", "key": "rates.decode_gb_s", "value": 1.0})
    append(path, {"kind": "note", "stage": "rates"})
    assert len(read_results(path, NAMES).stages["rates"].figures) == 1


def test_a_figure_that_is_no_number_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    for value in (math.nan, math.inf):
        append_figure(path, "rates", figure(value, key="rates.decode_gb_s", goal=1.0))
    results = read_results(path, NAMES)
    assert "nan ms" in to_text(results) and "inf ms" in to_markdown(results)


def test_a_full_disk_tears_one_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of which only ten bytes were written is lost; those after it are read."""
    path = tmp_path / "results.jsonl"
    write = os.write
    limits = [10]

    def short_write(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[: limits.pop()] if limits else data)

    monkeypatch.setattr(os, "write", short_write)
    append(path, {"kind": "run", "device": "lost"})
    write_run(path, "card")
    assert read_results(path, NAMES).stages["rates"].status == "failed"


def test_a_line_that_was_cut_is_skipped(tmp_path: Path) -> None:
    """A file that ends anywhere can be read, and only its last line is lost."""
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        read_results(path, NAMES)
    path.write_bytes(content + b'{"kind": "fig')
    assert read_results(path, NAMES).stages["rates"].status == "failed"


def test_text_and_page_hold_every_figure_and_failure(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_run(path, "card")
    append(path, {"kind": "note", "stage": "rates", "text": "kernel 1 ms\nkernel 2 ms"})
    results = read_results(path, NAMES)
    text = to_text(results)
    page = to_markdown(results)
    assert "rates: failed in 3 s: 1 failed" in text and "FAILED a|b: x < y" in text
    assert "rates.decode_gb_s: 64 x 800" in text and "200 %" in text
    assert "| rates | failed | 3 | abc123 | 1 failed |" in page and "    kernel 2 ms" in page
    assert "| rates.decode_gb_s: 64 x 800 | 3 ms | 6 | 200 % |" in page
    assert "- device: card" in page and "decode: not run" not in text


def test_a_line_of_a_figure() -> None:
    line = figure_line(figure(12.345, limit=6.0, predicted=10.0, goal=11.0))
    assert (
        line == "decode.step_ms: 64 x 800: 12.3 ms, limit 6 (49 %), predicted 10, goal 11  missed"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (3.0, "3"),
        (0.123456, "0.123"),
        (123456.7, "123457"),
        (2.147e9, "2.15e+09"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_records_are_whole_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write_run(path, "card\nof two lines")
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "run", "begin", "figure", "case", "stage",
    ]  # fmt: skip
