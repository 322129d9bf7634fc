"""A run that resumes with changed settings or data lists them, needs consent, and records them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from socpo_fast.cli import main
from socpo_fast.config import Config, load_config
from socpo_fast.config.text import fields_of
from socpo_fast.report.settings import FREE
from socpo_fast.report.tracker import read_metrics
from tests.helpers.bad_input import assert_refused, finished_run, run_dir, snapshot, words_of
from tests.helpers.faulty_server import Server
from tests.socratic.conftest import server

__all__ = ["finished_run", "run_dir", "server"]  # fixtures
Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent
MUST = "run: .*/run must go on as it began, got "


def history_of(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the entries of earlier settings in config.toml, which must load as a config."""
    path = run_dir / "run" / "config.toml"
    load_config(path)
    return tomllib.loads(path.read_text()).get("history", [])


def test_changed_settings_need_consent(run_dir: Path, capsys: Capture) -> None:
    words = {"run.num_batches": 2, "train.lr": 1.5e-4, "rollout.temperature": 0.9}
    old_files = snapshot(run_dir)
    old_config = load_config(run_dir / "run" / "config.toml")
    assert main(words_of("train", run_dir, words)) == 2
    listed = f"rollout.temperature: 1.0 -> 0.9; train.lr: {old_config.train.lr} -> 0.00015"
    message = f"{MUST}{listed}; set them back, or set run.accept_changes true"
    assert_refused(capsys.readouterr().err, message)
    assert snapshot(run_dir) == old_files
    consent = words | {"run.accept_changes": "true"}
    with pytest.warns(UserWarning, match=f"run: changed from update 1 on: {listed}$"):
        assert main(words_of("train", run_dir, consent)) == 0
    [entry] = history_of(run_dir)
    assert (entry["from_update"], entry["until_update"]) == (0, 1)
    assert entry["changes"] == listed.split("; ")
    assert entry["train"]["lr"] == old_config.train.lr
    new_config = load_config(run_dir / "run" / "config.toml")
    assert (new_config.train.lr, new_config.run.accept_changes) == (1.5e-4, False)
    # The change is recorded now, so the same settings need no consent again. Another change needs
    # consent, and is another entry.
    assert main(words_of("train", run_dir, words | {"run.num_batches": 3})) == 0
    assert history_of(run_dir) == [entry]
    second_change = consent | {"run.num_batches": 4, "train.lr": 3e-4}
    with pytest.warns(UserWarning, match=r"changed from update 3 on: train.lr: 0.00015 -> 0.0003$"):
        assert main(words_of("train", run_dir, second_change)) == 0
    spans = [(entry["from_update"], entry["until_update"]) for entry in history_of(run_dir)]
    assert spans == [(0, 1), (1, 3)]
    assert history_of(run_dir)[1]["rollout"]["temperature"] == 0.9


def test_lost_updates_leave_the_history(run_dir: Path) -> None:
    """A run that resumes from a checkpoint before a change has no record of that change."""
    words = {"run.num_batches": 2, "train.lr": 1.5e-4, "run.accept_changes": "true"}
    with pytest.warns(UserWarning, match="changed from update 1 on"):
        assert main(words_of("train", run_dir, words)) == 0
    shutil.rmtree(run_dir / "run" / "checkpoints" / "update_000002")
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0  # as it began
    assert history_of(run_dir) == []


def test_a_finished_run_says_so(run_dir: Path, capsys: Capture) -> None:
    # run_dir is a copy, so this first start rewrites the paths in config.toml.
    assert main(words_of("train", run_dir, {})) == 0
    old_files = snapshot(run_dir / "run")
    assert main(words_of("train", run_dir, {})) == 0
    folder = run_dir / "run"
    card = capsys.readouterr().out.partition(
        "run run: already finished at batch 1, nothing was done\n"
    )[2]
    assert "  done          1 batch, 1 update, " in card
    assert f"  last weights  {folder / 'checkpoints' / 'update_000001'}\n" in card
    assert f" socpo report {folder}\n" in card
    assert f" socpo train --config {folder / 'config.toml'} --run.num_batches 2\n" in card
    new_files = snapshot(run_dir / "run")
    names = [name for name in old_files if not name.startswith(("tb/", "report"))]
    assert {name: new_files[name] for name in names} == {name: old_files[name] for name in names}


def test_free_settings_need_no_consent(run_dir: Path) -> None:
    words = {"run.num_batches": 2, "run.keep_checkpoints": 7, "run.threads": 1}
    words |= {"run.checkpoint_every_updates": 3, "eval.every_updates": 1}
    words |= {"engine.kv_cache_gib": 0.03, "engine.max_running": 3}
    assert main(words_of("train", run_dir, words)) == 0
    assert history_of(run_dir) == []
    assert load_config(run_dir / "run" / "config.toml").engine.max_running == 3


def test_value_chosen_for_auto_is_recorded(run_dir: Path, capsys: Capture) -> None:
    """auto chose microbatches of 8192 tokens: naming that number is no change, another one is."""
    assert load_config(run_dir / "run" / "config.toml").train.token_budget == "auto"
    words = {"run.num_batches": 2, "train.token_budget": 8192, "train.checkpointing": "true"}
    assert main(words_of("train", run_dir, words)) == 0
    assert history_of(run_dir) == []
    assert load_config(run_dir / "run" / "config.toml").train.token_budget == 8192
    smaller = {"run.num_batches": 3, "train.token_budget": 4096}
    assert main(words_of("train", run_dir, smaller)) == 2
    assert_refused(capsys.readouterr().err, f"{MUST}train.token_budget: 8192 -> 4096; ")


def test_more_batches_need_consent_if_the_rate_falls(tmp_path: Path, capsys: Capture) -> None:
    """With a falling learning rate the number of batches decides its end, so it is a change."""
    linear = {"train.lr_schedule": "linear", "train.warmup_updates": 0}
    assert main(words_of("train", tmp_path, linear | {"run.num_batches": 1})) == 0
    capsys.readouterr()
    longer = linear | {"run.num_batches": 2}
    assert main(words_of("train", tmp_path, longer)) == 2
    assert_refused(capsys.readouterr().err, f"{MUST}run.num_batches: 1 -> 2; set them back")
    with pytest.warns(UserWarning, match="changed from update 1 on: run.num_batches: 1 -> 2$"):
        assert main(words_of("train", tmp_path, longer | {"run.accept_changes": "true"})) == 0
    assert "run run: finished\n" in (printed := capsys.readouterr().out)
    assert f"socpo report {tmp_path / 'run'}" in printed
    assert "socpo train --config" not in printed, "no command that would be refused"
    rates = [
        row["policy/lr"]
        for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "policy/lr" in row
    ]
    lr = load_config(tmp_path / "run" / "config.toml").train.lr
    assert rates == [lr, pytest.approx(lr / 2)]
    capsys.readouterr()
    constant = {"train.warmup_updates": 0, "run.num_batches": 3}
    assert main(words_of("train", tmp_path, constant)) == 2
    assert_refused(
        capsys.readouterr().err, f"{MUST}train.lr_schedule: linear -> constant; set them back"
    )


def test_free_settings_are_settings() -> None:
    assert set(FREE) <= set(fields_of(Config))


def test_a_lost_config_toml_needs_consent(run_dir: Path, capsys: Capture) -> None:
    (run_dir / "run" / "config.toml").unlink()
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 2
    message = f"{MUST}.*config.toml: the history -> missing"
    assert_refused(capsys.readouterr().err, message)


def test_other_questions_need_consent(tmp_path: Path, capsys: Capture) -> None:
    """Other questions in the same file need consent, the same ones in another folder do not."""

    def write(name: str, text: str) -> Path:
        rows = ({"question": f"{text} {i}", "ground_truth": "1"} for i in range(8))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    def train(path: Path, **settings: object) -> int:
        words = {"data.train": path, "data.eval": "none", "teacher.kind": "retry"}
        words |= {f"run.{name}": value for name, value in settings.items()}
        return main(words_of("train", tmp_path / "runs", words))

    assert train(write("a/rows.jsonl", "first")) == 0
    assert train(write("b/rows.jsonl", "first"), num_batches=2) == 0
    capsys.readouterr()
    assert train(write("b/rows.jsonl", "other"), num_batches=3) == 2
    questions_hash = "8 with hash [0-9a-f]{12}"
    message = f"{MUST}questions of data.train: {questions_hash} -> {questions_hash}; set them back"
    assert_refused(capsys.readouterr().err, message)
    with pytest.warns(UserWarning, match="changed from update 2 on: questions of data.train: 8"):
        assert train(tmp_path / "b/rows.jsonl", num_batches=3, accept_changes="true") == 0
    [entry] = history_of(tmp_path / "runs")
    assert entry["until_update"] == 2


def test_consent_to_other_data_is_given_once(tmp_path: Path) -> None:
    def train(text: str, **settings: object) -> int:
        rows = ({"question": f"{text} {i}", "ground_truth": "1"} for i in range(8))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = {
            "data.train": tmp_path / "rows.jsonl",
            "data.eval": "none",
            "teacher.kind": "retry",
        }
        return main(
            words_of(
                "train", tmp_path, words | {f"run.{key}": value for key, value in settings.items()}
            )
        )

    assert train("first") == 0
    with pytest.warns(UserWarning, match="changed from update 1 on: questions"):
        assert train("other", accept_changes="true") == 0
    with pytest.warns(UserWarning, match="changed from update 1 on: questions"):
        assert train("other", num_batches=2) == 0
    assert train("first", num_batches=3) == 2


def test_naming_another_checkpoint_is_consent(run_dir: Path) -> None:
    """Differences are told in a warning, and the old settings are recorded."""
    checkpoint = run_dir / "run" / "checkpoints" / "update_000001"
    words = {"run.dir": run_dir / "other", "run.resume": checkpoint}
    words |= {"run.num_batches": 2, "train.lr": 1.5e-4}
    with pytest.warns(UserWarning, match="changed from update 1 on: train.lr: .* -> 0.00015"):
        assert main(words_of("train", run_dir, words)) == 0
    [entry] = history_of(run_dir / "other")
    assert (entry["from_update"], entry["until_update"]) == (0, 1)
    shutil.rmtree(run_dir / "other" / "run" / "checkpoints" / "update_000002")
    assert main(words_of("train", run_dir, words | {"run.resume": "auto"})) == 0
    assert history_of(run_dir / "other") == [entry]


def test_consent_is_given_once(run_dir: Path, capsys: Capture) -> None:
    """Consent counts even if the run stops before its next checkpoint."""
    words = {"run.num_batches": 2, "train.lr": 1.5e-4}
    with pytest.warns(UserWarning, match="changed from update 1 on"):
        assert (
            main(
                words_of(
                    "train", run_dir, words | {"run.num_batches": 1, "run.accept_changes": "true"}
                )
            )
            == 0
        )
    assert [path.name for path in (run_dir / "run" / "checkpoints").iterdir()] == ["update_000001"]
    with pytest.warns(UserWarning, match="changed from update 1 on"):
        assert main(words_of("train", run_dir, words)) == 0
    assert [entry["until_update"] for entry in history_of(run_dir)] == [1]
    capsys.readouterr()
    assert main(words_of("train", run_dir, words | {"run.num_batches": 3, "train.lr": 3e-4})) == 2
    assert_refused(capsys.readouterr().err, f"{MUST}train.lr: 0.00015 -> 0.0003")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text.replace("[train]", "[treiben]"),
        lambda text: "student = 5\n" + text.replace("[student]", "[was_student]"),
        lambda text: re.sub("lr = .*", "lr = 0.00015", text),  # edited by hand
    ],
)
def test_checkpoint_records_the_settings(
    damage: Callable[[str], str], run_dir: Path, capsys: Capture
) -> None:
    """People edit or damage config.toml, so changes are found by the checkpoint's own settings."""
    path = run_dir / "run" / "config.toml"
    old_config = load_config(path)
    path.write_text(damage(path.read_text()))
    old_files = snapshot(run_dir)
    words = {"run.num_batches": 2, "train.lr": 1.5e-4}
    assert main(words_of("train", run_dir, words)) == 2
    assert_refused(capsys.readouterr().err, f"{MUST}train.lr: {old_config.train.lr} -> 0.00015; ")
    assert snapshot(run_dir) == old_files
    with pytest.warns(UserWarning, match="changed from update 1 on: train.lr"):
        assert main(words_of("train", run_dir, words | {"run.accept_changes": "true"})) == 0
    [entry] = history_of(run_dir)
    assert entry["train"]["lr"] == old_config.train.lr


def test_unchanged_extra_body_needs_no_consent(tmp_path: Path, server: Server) -> None:
    """None (which TOML lacks), nested lists and characters beyond 16 bits survive config.toml."""
    extra_body = {
        "seed": None,
        "stop": ["\U0001f600", None, True],
        "deep": {"l": [{"c": 1}], "n": None},
    }
    words = {"teacher.kind": "endpoint", "teacher.url": server.url, "teacher.model": "m"}
    words |= {"data.eval": "none", "teacher.extra_body": json.dumps(extra_body)}
    assert main(words_of("train", tmp_path, words)) == 0
    assert main(words_of("train", tmp_path, words | {"run.num_batches": 2})) == 0
    assert history_of(tmp_path) == []
    assert (tmp_path / "run" / "report.html").is_file()


def test_start_from_a_checkpoint_saves_its_own_at_once(run_dir: Path, capsys: Capture) -> None:
    """The next start needs no run.resume, even if this one is killed before its first batch."""
    program = """
import os, sys
from socpo_fast import trainer
from socpo_fast.cli import main
trainer.Trainer.run_batches = lambda self: os._exit(9)
sys.exit(main())
"""
    checkpoint = run_dir / "run" / "checkpoints" / "update_000001"
    words = {"run.name": "run2", "run.num_batches": 2}
    command = [
        sys.executable,
        "-c",
        program,
        *words_of("train", run_dir, words | {"run.resume": checkpoint}),
    ]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert [path.name for path in (run_dir / "run2" / "checkpoints").iterdir()] == ["update_000001"]
    capsys.readouterr()
    assert main(words_of("train", run_dir, words)) == 0
    assert "run run2 from update_000001: " in capsys.readouterr().out


def test_rollout_files_of_later_batches_are_removed(run_dir: Path) -> None:
    """A run that restarts or resumes earlier removes rollout files of later batches."""
    rollouts = run_dir / "run" / "rollouts"
    for name in ("batch_000002.jsonl", "batch_1000000.jsonl", "notes.txt"):
        (rollouts / name).write_text("")
    assert main(words_of("train", run_dir, {})) == 0
    assert sorted(path.name for path in rollouts.iterdir()) == ["batch_000001.jsonl", "notes.txt"]


def test_no_checkpoint_marker_is_removed(run_dir: Path) -> None:
    """A kill may come between the first checkpoint and the removal of the marker."""
    marker = run_dir / "run" / "checkpoints" / "none_yet"
    assert not marker.exists()
    marker.write_text("")
    assert main(words_of("train", run_dir, {})) == 0
    assert not marker.exists()
