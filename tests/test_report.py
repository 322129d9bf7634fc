"""The HTML report escapes texts of models, loads nothing, and works for runs that stopped early."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from socpo_fast.config import load_config
from socpo_fast.report.accuracy import accuracy_text
from socpo_fast.report.curves import Line, Panel, draw
from socpo_fast.report.evaluations import add_evaluation, read_evaluations
from socpo_fast.report.settings import config_text
from socpo_fast.report.summary import source_metric
from socpo_fast.report.tracker import MetricsWriter, replace_jsonl
from socpo_fast.report.write import write_report

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'\""


class Tags(HTMLParser):
    """Collects start tags with their attributes, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def parse(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    return tags


def turn(text: str, *, is_correct: bool, guidance: str | None) -> dict[str, Any]:
    guidance_row = {"raw_text": guidance, "text": guidance, "was_shown": True, "kept_tokens": 9}
    return {
        "text": text,
        "is_correct": is_correct,
        "raw_reward": float(is_correct),
        "reward": float(is_correct),
        "advantage": None,
        "context_tokens": 6,
        "num_tokens": 5,
        "finish_reason": "length",
        "guidance": None if guidance is None else guidance_row,
    }


def write_rollout_file(folder: Path, batch: int, text: str) -> Path:
    path = folder / "rollouts" / f"batch_{batch:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {
        "batch": batch,
        "question_idx": 0,
        "rollout_idx": 0,
        "data_source": text,
        "question": text,
        "ground_truth": text,
        "end_reason": text,
        "policy_version": 1,
    }
    verdicts = {"rescued": (False, True), "never": (False, False), "alone": (True,)}
    rows = [
        row
        | {
            "turns": [
                turn(f"{outcome} {text}", is_correct=is_correct, guidance=text if k == 0 else None)
                for k, is_correct in enumerate(verdict)
            ]
        }
        for outcome, verdict in verdicts.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_metrics(folder: Path) -> None:
    with MetricsWriter(folder) as writer:
        for batch, accuracy in enumerate((0.1, 0.3, 0.5)):
            metrics = {"success/unassisted": accuracy, "success/assisted": accuracy + 0.2}
            writer.write(metrics, kind="eval", batch=batch, update=2 * batch)
            times = {"time/rollout_s": 3.0, "time/update_s": 2.0, "time/total_s": 5.5}
            writer.write(metrics | times, kind="batch", batch=batch + 1, update=2 * batch + 2)


def test_everything_a_model_wrote_is_escaped(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_rollout_file(tmp_path, 1, EVIL)
    config = load_config(
        None, {"run.name": "demo", "teacher.kind": "retry", "teacher.retry_text": EVIL}
    )
    (tmp_path / "config.toml").write_text(config_text(config), encoding="utf-8")
    page = parse(write_report(tmp_path))
    assert not [
        tag for tag, _ in page.tags if tag in ("script", "iframe", "link", "object", "form")
    ]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) == 3 * 5 + 5 + 1, (
        "3 rollouts with 5 texts each, their 5 attempts, 1 setting; in full"
    )
    assert not {"src", "href", "xlink:href"} & {name for _, a in page.tags for name in a}


def test_half_a_letter_does_not_cost_the_page(tmp_path: Path) -> None:
    """UTF-8 cannot store a lone surrogate; the page spells it out."""
    write_metrics(tmp_path)
    path = write_rollout_file(tmp_path, 1, "half \ud800 \udc80 \u4f60 \U0001f600")
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert row["question"] == "half \ud800 \udc80 \u4f60 \U0001f600", "the file is as hostile"
    page = parse(write_report(tmp_path))
    assert page.text.count(r"half \ud800 \udc80 " + "\u4f60 \U0001f600") >= 3 * 5


def test_page_loads_no_external_resource(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    page = parse(write_report(tmp_path))
    policies = [
        a["content"]
        for t, a in page.tags
        if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert str(policies[0]).startswith("default-src 'none'; style-src")
    assert "http:" not in (text := (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "https:" not in text


def test_headline_is_held_out_unassisted_accuracy(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    text = " ".join(parse(write_report(tmp_path)).text.split())
    for phrase in (
        "unassisted at the start 10.0 %",
        "unassisted at the end 50.0 %",
        "assisted at the end 70.0 %",
        "Measured on held-out questions",
        "the rest 1.5 s",
    ):
        assert phrase in text


def test_curves_are_drawn_to_scale(tmp_path: Path) -> None:
    """As a file of its own, which a browser opens, and in the page; without matplotlib."""
    write_metrics(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    accuracy, *_ = root.iter("{http://www.w3.org/2000/svg}polyline")
    # Updates 0, 2, 4 of an axis of 340 to 6, accuracy 0.1, 0.3, 0.5 of one of 170 to 1; last first.
    assert accuracy.attrib["points"] == "226.7,85.0 113.3,119.0 0.0,153.0"
    assert accuracy.attrib["points"] in page
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Accuracy", "assisted, held out", "seconds a batch", "0.2", "6"} <= set(texts)


def points_of(ys: Sequence[float]) -> list[str]:
    panel = Panel("", "update", "nats", [Line("", range(len(ys)), ys)])
    [line] = draw([panel], columns=1, title="").split("<polyline")[1:]
    return line.split('"')[1].split()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, 0.07, 1.0, 6.3, 1e300])
def test_any_number_can_be_drawn(value: float) -> None:
    last, first = points_of([0.0, value])
    assert first == "0.0,170.0"
    assert 0 <= float(last.split(",")[1]) <= 170 or value < 0


def test_long_lines_are_thinned_to_their_last_point() -> None:
    points = points_of(range(123_457))
    assert len(points) <= 1000
    assert points[0] == "279.8,30.1"  # 123,456 of axes to 150,000


def test_evaluation_table_has_intervals_and_sources(tmp_path: Path) -> None:
    odd = "<b>odd</b>"
    with MetricsWriter(tmp_path) as writer:
        for share in (0.1, 0.5):
            metrics = {
                "success/unassisted": share,
                "success/unassisted_low": 0.3,
                "success/unassisted_high": 0.625,
            }
            metrics |= {
                name.replace("unassisted", "pass_at_16"): value for name, value in metrics.items()
            }
            for source in ("openai/gsm8k", odd):
                for end in ("", "_low", "_high"):
                    metrics[source_metric(f"success/assisted{end}", source)] = 0.25
            writer.write(metrics, kind="eval", batch=0, update=int(share * 10))
    page = parse(write_report(tmp_path))
    text = " ".join(page.text.split())
    assert "unassisted (avg@k) 50.0 % 30.0 % to 62.5 % pass@16, unassisted 50.0 % 30.0 %" in text
    assert "openai/gsm8k: assisted, with the teacher's help 25.0 % 25.0 % to 25.0 %" in text
    assert "_b_odd_/b_-" in text, "a source's name is shown in its safe form"
    assert odd not in text
    assert "upper end of the 95 % interval: share of rollouts correct in any attempt" in text
    assert accuracy_text({}).count("\n") == 0
    lines = accuracy_text(metrics).splitlines()
    assert lines[1].startswith("unassisted (avg@k)")
    assert lines[1].endswith(" 50.0 %   30.0 to 62.5 %")
    assert [line.partition(":")[0] for line in lines[3:]] == [
        "openai/gsm8k",
        source_metric("x", odd)[2:],
    ]


def test_first_middle_and_last_batch_with_each_outcome(tmp_path: Path) -> None:
    for batch in range(1, 8):
        write_rollout_file(tmp_path, batch, "text")
    summaries = re.findall(
        r"Batch (\d), question 0: ([a-z ]+) ", parse(write_report(tmp_path)).text
    )
    outcomes = ("rescued by guidance", "never right", "right alone")
    assert summaries == [(batch, outcome) for batch in "147" for outcome in outcomes]


def test_report_of_a_run_without_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = parse(write_report(tmp_path)).text
    assert "No accuracy has been recorded yet" in text
    assert not (tmp_path / "curves.svg").exists()


def test_training_only_and_unknown_values(tmp_path: Path) -> None:
    """No evaluation, one batch, a NaN metric: the headline falls back to training batches."""
    with MetricsWriter(tmp_path) as writer:
        metrics = {"success/unassisted": 0.4, "decay/f_1": float("nan"), "guidance/rate": 0.0}
        writer.write(metrics, kind="batch", batch=1, update=1)
    text = parse(write_report(tmp_path)).text
    assert "Measured on training batches" in text
    assert "40.0 %" in text


def test_torn_files_leave_the_rest_readable(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    for path in (tmp_path / "metrics.jsonl", write_rollout_file(tmp_path, 1, "text")):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="torn"):
        text = parse(write_report(tmp_path)).text
    assert "rescued by guidance" in text
    assert "right alone" not in text


@pytest.mark.parametrize(
    "content", [b"{}", b'[{"metrics": 3}]', b'[{"checkpoint": "c"', b"[" * 100_000, b'["\xff"]']
)
def test_a_foreign_eval_json_costs_its_part_only(tmp_path: Path, content: bytes) -> None:
    write_metrics(tmp_path)
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.warns(UserWarning, match="report: evaluations are left out .*must be a list of"):
        text = " ".join(parse(write_report(tmp_path)).text.split())
    assert "unassisted at the end 50.0 %" in text
    with pytest.raises(ValueError, match="must be a list of evaluations, got something else"):
        add_evaluation(tmp_path, {}, checkpoint="c", data="d", measured_by="m")
    assert (tmp_path / "eval.json").read_bytes() == content


def test_evaluations_at_once_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socpo_fast.report.tracker.find_spec", lambda name: None)

    def add(number: int) -> None:
        metrics = {"success/unassisted": number / 100}
        add_evaluation(tmp_path, metrics, checkpoint="c", data="d", measured_by="m")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    shares = [row["metrics"]["success/unassisted"] for row in read_evaluations(tmp_path)]
    assert sorted(shares) == [number / 100 for number in range(40)]


@pytest.mark.parametrize(
    ("checkpoint", "update"), [("run/checkpoints/update_000012", 12), ("builtin", 0)]
)
def test_tensorboard_shows_evaluations(tmp_path: Path, checkpoint: str, update: int) -> None:
    metrics = {"success/unassisted": 0.25, "success/assisted": math.nan}
    add_evaluation(tmp_path, metrics, checkpoint=checkpoint, data="d", measured_by="m")
    assert list((tmp_path / "tb").iterdir()) == [tmp_path / "tb" / "eval"]
    events = EventAccumulator(str(tmp_path / "tb" / "eval")).Reload()
    assert events.Tags()["scalars"] == ["eval/success/unassisted"]
    [event] = events.Scalars("eval/success/unassisted")
    assert (event.step, event.value) == (update, 0.25)


def test_rollouts_without_updates_are_over_batches(tmp_path: Path) -> None:
    rows = [
        {"kind": "batch", "batch": batch, "update": 0, "success/unassisted": 0.5}
        for batch in (1, 2)
    ]
    replace_jsonl(tmp_path / "metrics.jsonl", rows)
    write_report(tmp_path)
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    [line] = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert line.attrib["points"] == "340.0,85.0 170.0,85.0"
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "batch" in texts and "update" not in texts


def test_the_report_is_the_same_when_written_again(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_missing_run_folder_raises_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="report: .* must be a run folder"):
        write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="report: .* must be a run folder"):
        write_report(tmp_path)  # it is there, but no run is in it
    assert list(tmp_path.iterdir()) == []


def test_cut_into_the_prompt_shows_0_tokens_as_sampled(tmp_path: Path) -> None:
    """A template that rewrites the prompt's end keeps less than the prompt."""
    path = write_rollout_file(tmp_path, 1, "text")
    assert "of which the next attempt saw 3 as sampled" in parse(write_report(tmp_path)).text
    path.write_text(path.read_text().replace('"kept_tokens": 9', '"kept_tokens": 2'))
    assert "of which the next attempt saw 0 as sampled" in parse(write_report(tmp_path)).text
    path.write_text(path.read_text().replace('"was_shown": true', '"was_shown": false'))
    text = parse(write_report(tmp_path)).text
    assert "the student did not see it" in text and "as sampled" not in text
