"""Whole runs of the built-in task: they learn, stop anywhere, and resume bitwise."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from socpo_fast import measure, trainer
from socpo_fast.config import Config, load_config
from socpo_fast.model.accumulate import is_accumulating
from socpo_fast.report.tracker import read_metrics
from socpo_fast.training.checkpoint import latest_checkpoint

CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"
SMALL = {
    "run.num_batches": 4,
    "run.checkpoint_every_updates": 0,
    "run.keep_checkpoints": 9,
    "data.builtin_train_questions": 13,  # 3 batches an epoch, so batch 4 is in the second epoch
    "data.builtin_eval_questions": 4,
    "rollout.questions_per_batch": 4,
    "rollout.group_size": 4,
    "train.questions_per_update": 2,
    "engine.kv_cache_gib": 0.05,
    "eval.every_updates": 4,
    "eval.samples": 2,
}
FILES = {"config.toml", "metrics.jsonl", "curves.svg", "report.html"}


def config_of(folder: Path, **changes: object) -> Config:
    """Returns the config of a small run; section__key=value changes section.key."""
    sections = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(CONFIG, SMALL | {"run.dir": str(folder)} | sections)


def rows_of(config: Config) -> list[dict]:
    """Returns the metrics that must repeat: all except for times and speeds."""
    timed = ("time/", "perf/")
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(timed) or name == "perf/tokens_total"
        }
        for row in rows
    ]


def assert_same_end(config: Config, other: Config) -> None:
    """Checks that weights, optimizer, state and metrics of two runs are bitwise equal."""
    checkpoints = [latest_checkpoint(c.folder / "checkpoints") for c in (config, other)]
    assert checkpoints[0] is not None
    assert checkpoints[1] is not None
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = load_file(checkpoints[0] / name)
        other_tensors = load_file(checkpoints[1] / name)
        assert tensors.keys() == other_tensors.keys()
        assert all(torch.equal(tensors[key], other_tensors[key]) for key in tensors), name
    assert (checkpoints[0] / "trainer_state.json").read_text() == (
        checkpoints[1] / "trainer_state.json"
    ).read_text()
    assert rows_of(config) == rows_of(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns a run from start to end without a stop."""
    config = config_of(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train(config)
    return config


def test_run_folder_has_all_files(uninterrupted: Config) -> None:
    names = {path.name for path in uninterrupted.folder.iterdir()}
    assert names == {".lock", *FILES, "tb", "rollouts", "checkpoints"}
    assert (uninterrupted.folder / ".lock").read_text() == ""
    assert load_config(uninterrupted.folder / "config.toml") == uninterrupted
    kinds = [(row["kind"], row["batch"], row["update"]) for row in rows_of(uninterrupted)]
    expected = [("eval", 0, 0)]
    for batch in range(1, 5):
        expected += [
            ("update", batch, 2 * batch - 1),
            ("update", batch, 2 * batch),
            ("batch", batch, 2 * batch),
        ]
        expected += [("eval", batch, 2 * batch)] if batch % 2 == 0 else []
    assert kinds == expected
    lines = (uninterrupted.folder / "rollouts" / "batch_000004.jsonl").read_text().splitlines()
    assert len(lines) == 16
    rollouts = [
        json.loads(line)
        for path in (uninterrupted.folder / "rollouts").iterdir()
        for line in path.read_text().splitlines()
    ]
    num_tokens = sum(turn["num_tokens"] for rollout in rollouts for turn in rollout["turns"])
    (last,) = (
        row for row in rows_of(uninterrupted) if row["kind"] == "batch" and row["batch"] == 4
    )
    assert last["perf/tokens_total"] == num_tokens
    assert all(
        row["policy/sampler_mismatch_nats"] < 1e-4
        for row in rows_of(uninterrupted)
        if row["kind"] == "update"
    )


def test_same_run_again_is_bitwise_equal(uninterrupted: Config, tmp_path: Path) -> None:
    """Tracing two batches changes nothing; the trace shows student, guidance and phases."""
    repeated = config_of(tmp_path, run__trace_batches=2)
    trainer.train(repeated)
    assert_same_end(uninterrupted, repeated)
    traces = sorted(repeated.folder.glob("trace_*.json"))
    assert [path.name for path in traces] == ["trace_000001.json", "trace_000002.json"]
    for path in traces:
        events = json.loads(path.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {"student", "guidance", "trainer"}
        assert [e["name"] for e in events if e["pid"] == "trainer"] == ["rollout", "update"]


@pytest.mark.parametrize("stops", [(1, 3), (2,)])
def test_resume_is_bitwise_equal_to_no_stop(
    uninterrupted: Config, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for num_batches in stops:
        stopped = trainer.Trainer(config_of(tmp_path))
        run_batch = stopped.run_batch

        def stop_after(stopped=stopped, run_batch=run_batch, num_batches=num_batches) -> None:
            run_batch()
            if stopped.state.batch == num_batches:  # as if a signal came during the update
                stopped.signals.received = signal.SIGTERM

        stopped.run_batch = stop_after
        with pytest.raises(SystemExit) as stop:
            stopped.run()
        assert stop.value.code == 128 + signal.SIGTERM
    resumed = config_of(tmp_path)
    trainer.train(resumed)
    assert_same_end(resumed, uninterrupted)


def test_killed_run_resumes_from_last_checkpoint(uninterrupted: Config, tmp_path: Path) -> None:
    """Updates behind the last checkpoint are repeated, and no row is there twice."""
    config = config_of(tmp_path, run__checkpoint_every_updates=2)
    killed = trainer.Trainer(config)
    update = killed.update

    def die_in_batch_3(rollouts, batch: int, advantages_A) -> None:
        update(rollouts, batch, advantages_A)
        if batch == 3:
            raise KeyboardInterrupt

    killed.update = die_in_batch_3
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    with (config.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "batch", "ba')  # a torn line
    with pytest.warns(UserWarning, match="torn"):
        trainer.train(config)
    assert_same_end(config, uninterrupted)


def test_sigterm_saves_at_once(uninterrupted: Config, tmp_path: Path) -> None:
    """A real process gets a real signal while it evaluates or rolls out; the next start resumes."""
    config = config_of(tmp_path)
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "socpo_fast.cli", "train", "--config", str(CONFIG), *options]
    command += ["--run.dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("train batch 1/4"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, output
    assert "stopped and saved after batch" in output
    assert output.count("KV cache 0.05 GiB, weights ") == 1
    assert "Traceback" not in output
    trainer.train(config)
    assert_same_end(config, uninterrupted)


def test_a_run_that_fails_tells_how_far_it_came(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise ValueError("no\nmemory")

    monkeypatch.setattr(trainer.Trainer, "update", fail)
    with pytest.raises(ValueError, match="memory"):
        trainer.train(config := config_of(tmp_path))
    title = f"run {config.run.name}: stopped by an error: no memory\n"
    card = capsys.readouterr().out.partition(title)[2]
    assert "held-out questions, update 0\n" in card
    assert "0 batches, 0 updates, " in card
    assert f"socpo train --config {config.folder / 'config.toml'}\n" in card


def test_an_error_amid_an_update_leaves_nothing_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook keeps the traceback, and with it what the update was amid."""

    def fail(*_args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(trainer.Progress, "work", fail)
    # Without log-probs before them, the first work is a microbatch.
    with pytest.raises(RuntimeError) as kept:
        trainer.train(config := config_of(tmp_path, loss__old_logprobs="sampler"))
    assert kept.tb is not None
    assert not is_accumulating()
    title = f"run {config.run.name}: stopped by an error: RuntimeError\n"
    assert title in capsys.readouterr().out


def test_finished_run_is_not_changed(uninterrupted: Config) -> None:
    old_metrics = (uninterrupted.folder / "metrics.jsonl").read_text()
    trainer.train(uninterrupted)
    assert (uninterrupted.folder / "metrics.jsonl").read_text() == old_metrics


def test_eval_of_a_checkpoint_equals_the_runs_own(uninterrupted: Config) -> None:
    last_eval = [row for row in rows_of(uninterrupted) if row["kind"] == "eval"][-1]
    rates = measure.evaluate(uninterrupted, None)
    assert {name: rates[name] for name in ("success/unassisted", "success/assisted")} == {
        name: last_eval[name] for name in ("success/unassisted", "success/assisted")
    }


@pytest.mark.parametrize(
    "changes", [{"rollout__max_attempts": 1}, {"train__epochs": 2, "loss__kl_coef": 0.1}]
)
def test_other_settings_run(tmp_path: Path, changes: dict[str, object]) -> None:
    config = config_of(tmp_path, run__num_batches=1, data__eval="none", **changes)
    trainer.train(config)
    rows = rows_of(config)
    assert [row["kind"] for row in rows].count("update") == 2 * config.train.epochs
    assert (
        rows[-1]["guidance/rate"] == 0
        if "rollout__max_attempts" in changes
        else rows[-1]["guidance/rate"] > 0
    )


def test_rollout_only_changes_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, run__num_batches=1)
    measure.rollout_only(config)
    assert sorted(path.name for path in config.folder.iterdir()) == [".lock", "rollouts"]
    row = json.loads(
        (config.folder / "rollouts" / "batch_000001.jsonl").read_text().splitlines()[0]
    )
    assert isinstance(row["turns"][0]["advantage"], float)  # the advantage that an update would use


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__dir": "{folder}/file"}, "must be a writable folder"),
        ({"student__path": "{folder}/nowhere"}, "nowhere"),
        (
            {"data__train": "{folder}/none.jsonl", "data__eval": "none", "teacher__kind": "retry"},
            "must be an existing file",
        ),
        (
            {"rollout__questions_per_batch": 14},
            r"questions_per_batch must be in \[1, 13 questions\], got 14",
        ),
        ({"run__resume": "{folder}/nothing"}, "must be a whole checkpoint, got .*manifest"),
    ],
)
def test_bad_input_is_refused_before_a_run_begins(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    (tmp_path / "file").touch()
    changes = {
        k: v.format(folder=tmp_path) if isinstance(v, str) else v for k, v in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        trainer.train(config_of(tmp_path, **changes))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_start_from_another_run_then_resume_own(uninterrupted: Config, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(uninterrupted.folder / "checkpoints")
    config = config_of(tmp_path, run__resume=str(checkpoint), run__num_batches=5)
    trainer.train(config)
    assert [row["batch"] for row in rows_of(config) if row["kind"] == "batch"] == [5]
    resumed = trainer.Trainer(config)
    assert resumed.resumed_from is not None
    assert resumed.resumed_from.parent == config.folder / "checkpoints"
    own_checkpoints = config.folder / "checkpoints"
    run = config.run.model_copy(update={"resume": str(own_checkpoints / "update_000001")})
    with pytest.raises(ValueError, match="must be the run's last checkpoint update_000010"):
        trainer.train(config.model_copy(update={"run": run}))


def test_a_new_run_never_overwrites_an_old_one(uninterrupted: Config) -> None:
    run = uninterrupted.run.model_copy(update={"resume": "never"})
    with pytest.raises(ValueError, match="must be new with run.resume never"):
        trainer.train(uninterrupted.model_copy(update={"run": run}))


@pytest.mark.slow
def test_accuracy_rises(tmp_path: Path) -> None:
    """With the shipped settings unassisted accuracy rises by more than 15 points.

    The questions are held out. For the first twelve batches only assisted accuracy rises.
    """
    config = load_config(CONFIG, {"run.dir": str(tmp_path), "data.builtin_eval_questions": 100})
    trainer.train(config)
    evals = [row["success/unassisted"] for row in rows_of(config) if row["kind"] == "eval"]
    assert evals[-1] > evals[0] + 0.15
