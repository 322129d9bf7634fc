"""The built-in task's comparison: a run beside the recorded curves at equal tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.config import load_config
from socpo_fast.files import read_json
from socpo_fast.report.comparison import RECORDED, card, compare
from socpo_fast.report.settings import config_text, read_settings
from socpo_fast.report.tracker import MetricsWriter, read_metrics
from socpo_fast.report.write import report_note, write_report
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR

EVALS = (0.4, 0.5, 0.9)


def write_run(folder: Path, *, tokens: float = 5000.0, **changes: Any) -> None:
    """Writes a run of three evaluations, with two batches of `tokens` each between them."""
    overrides: dict[str, Any] = {
        "run.name": folder.name,
        "eval.temperature": 1.0,
        "eval.top_p": 1.0,
    }
    overrides |= {key.replace("__", "."): value for key, value in changes.items()}
    (folder / "config.toml").write_text(config_text(load_config(None, overrides)), encoding="utf-8")
    with MetricsWriter(folder) as writer:
        for i, accuracy in enumerate(EVALS):
            writer.write({"success/unassisted": accuracy}, kind="eval", batch=2 * i, update=4 * i)
            for batch in (2 * i + 1, 2 * i + 2)[: 2 if i < 2 else 0]:
                rates = {"success/unassisted": 0.1 * batch, "success/assisted": 0.2 * batch}
                speed = {"perf/rollout_tok_s": tokens / 2, "time/rollout_s": 2.0}
                writer.write(rates | speed, kind="batch", batch=batch, update=2 * batch)


def curves_of(folder: Path) -> list[Any]:
    return compare(read_settings(folder), read_metrics(folder / "metrics.jsonl"))


def test_own_curve_is_over_sampled_tokens(tmp_path: Path) -> None:
    write_run(tmp_path)
    this_run, *recorded = curves_of(tmp_path)
    assert (this_run.title, this_run.tokens, this_run.accuracy) == (
        "this run",
        (0, 10_000, 20_000),
        EVALS,
    )
    assert [curve.title for curve in recorded] == [
        curve["title"] for curve in read_json(RECORDED)["curves"]
    ]


def test_counted_tokens_go_before_speed_times_time(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for row in rows:
        if row["kind"] == "batch":
            row["perf/tokens_total"] = 700.0 * row["batch"]
    [this_run, *_] = compare(read_settings(tmp_path), rows)
    assert this_run.tokens == (0, 1400, 2800)


@pytest.mark.parametrize(
    "changes",
    [
        {"student__path": "elsewhere"},
        {"data__train": "own.jsonl", "teacher__kind": "retry"},
        {"tokens": 0.0},
    ],
)
def test_other_runs_have_no_comparison(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_run(tmp_path, **changes)
    assert curves_of(tmp_path) == []
    assert "What the teacher bought" not in write_report(tmp_path).read_text(encoding="utf-8")
    assert report_note(tmp_path).startswith("report: ")


def test_card_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card interpolates accuracy at equal tokens, and shows - behind a curve's end."""
    recorded = tmp_path / "recorded.json"
    no_teacher = {"title": "no teacher", "tokens": [0, 14_000], "accuracy": [0.4, 0.54]}
    recorded.write_text(json.dumps({"settings": {}, "curves": [no_teacher]}), encoding="utf-8")
    monkeypatch.setattr("socpo_fast.report.comparison.RECORDED", recorded)
    run = tmp_path / "run"
    run.mkdir()
    write_run(run)
    lines = card(curves_of(run), read_metrics(run / "metrics.jsonl")).splitlines()
    assert lines[1].split() == ["0k", "7k", "13k", "20k"]
    assert lines[2].split() == ["this", "run", "40", "%", "47", "%", "63", "%", "90", "%"]
    assert lines[3].split() == ["no", "teacher", "40", "%", "47", "%", "53", "%", "-"]
    assert lines[5].split() == ["assisted", "▂▄▅▇"] and lines[6].split() == ["unassisted", "▁▂▃▄"]
    assert report_note(run).splitlines() == [*lines, f"report: {run / 'report.html'}"]


def test_page_shows_both_pictures(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "What the teacher bought" in page and page.count("<svg ") == 2


def test_recorded_curves_are_of_the_shipped_student() -> None:
    """All recorded curves begin at the same accuracy, and tokens increase along each of them."""
    recorded = read_json(RECORDED)
    weights = (STUDENT_DIR / "model.safetensors").read_bytes()
    assert recorded["student"] == hashlib.sha256(weights).hexdigest()[:16]
    starts = {curve["accuracy"][0] for curve in recorded["curves"]}
    assert len(recorded["curves"]) == 2 and len(starts) == 1
    for curve in recorded["curves"]:
        assert len(curve["tokens"]) == len(curve["accuracy"]) and curve["tokens"][0] == 0
        assert curve["tokens"] == sorted(set(curve["tokens"])) and curve["tokens"][-1] >= 200_000
