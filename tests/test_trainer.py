"""Whole runs of the built-in task: they learn, stop anywhere, and go on bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from socpo_fast import trainer
from socpo_fast.config import Config, load_config
from socpo_fast.report.tracker import read_metrics
from socpo_fast.train.checkpoint import latest_checkpoint

CONFIG = Path(__file__).parent.parent / "configs" / "molar_mass.toml"
SMALL = {
    "run.num_batches": 4,
    "run.checkpoint_every_updates": 0,
    "run.keep_checkpoints": 9,
    "data.builtin_train_questions": 13,  # three batches an epoch: the fourth is in the second
    "data.builtin_eval_questions": 4,
    "rollout.questions_per_batch": 4,
    "rollout.group_size": 4,
    "train.questions_per_update": 2,
    "engine.kv_cache_gib": 0.05,
    "eval.every_updates": 4,
    "eval.samples": 2,
}
FILES = {"config.toml", "metrics.jsonl", "curves.png", "report.html"}


def config_of(folder: Path, **changes: object) -> Config:
    sections = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(CONFIG, SMALL | {"run.dir": str(folder)} | sections)


def rows_of(config: Config) -> list[dict]:
    """The metrics that must repeat: all but clocks and speeds."""
    timed = ("time/", "perf/")
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if not name.startswith(timed)} for row in rows
    ]


def assert_same_end(config: Config, other: Config) -> None:
    paths = [latest_checkpoint(c.folder / "checkpoints") for c in (config, other)]
    assert paths[0] is not None
    assert paths[1] is not None
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours = load_file(paths[0] / name)
        theirs = load_file(paths[1] / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert (paths[0] / "trainer_state.json").read_text() == (
        paths[1] / "trainer_state.json"
    ).read_text()
    assert rows_of(config) == rows_of(other)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run from start to end that nobody disturbed."""
    config = config_of(tmp_path_factory.mktemp("straight"))
    trainer.train(config)
    return config


def test_a_run_leaves_everything(straight: Config) -> None:
    names = {path.name for path in straight.folder.iterdir()}
    assert names == {".lock", *FILES, "tb", "rollouts", "checkpoints"}
    assert (straight.folder / ".lock").read_text() == ""
    assert load_config(straight.folder / "config.toml") == straight
    kinds = [(row["kind"], row["batch"], row["update"]) for row in rows_of(straight)]
    expected = [("eval", 0, 0)]
    for batch in range(1, 5):
        expected += [
            ("update", batch, 2 * batch - 1),
            ("update", batch, 2 * batch),
            ("batch", batch, 2 * batch),
        ]
        expected += [("eval", batch, 2 * batch)] if batch % 2 == 0 else []
    assert kinds == expected
    lines = (straight.folder / "rollouts" / "batch_000004.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert all(
        row["policy/sampler_mismatch_nats"] < 1e-4
        for row in rows_of(straight)
        if row["kind"] == "update"
    )


def test_the_same_run_again_is_bitwise_the_same(straight: Config, tmp_path: Path) -> None:
    """A trace of its first two batches changes nothing, and shows student, guidance and phases."""
    again = config_of(tmp_path, run__trace_batches=2)
    trainer.train(again)
    assert_same_end(straight, again)
    traces = sorted(again.folder.glob("trace_*.json"))
    assert [path.name for path in traces] == ["trace_000001.json", "trace_000002.json"]
    for path in traces:
        events = json.loads(path.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {"student", "guidance", "trainer"}
        assert [e["name"] for e in events if e["pid"] == "trainer"] == ["rollout", "update"]


@pytest.mark.parametrize("stops", [(1, 3), (2,)])
def test_resume_is_bitwise_a_run_without_stop(
    straight: Config, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    for num_batches in stops:
        stopped = trainer.Trainer(config_of(tmp_path))
        run_batch = stopped.run_batch

        def stop_after(stopped=stopped, run_batch=run_batch, num_batches=num_batches) -> None:
            run_batch()
            if stopped.state.batch == num_batches:  # as if a signal had come during the update
                stopped.signals.received = signal.SIGTERM

        stopped.run_batch = stop_after
        with pytest.raises(SystemExit) as stop:
            stopped.run()
        assert stop.value.code == 128 + signal.SIGTERM
    resumed = config_of(tmp_path)
    trainer.train(resumed)
    assert_same_end(resumed, straight)


def test_a_killed_run_goes_on_from_its_last_checkpoint(straight: Config, tmp_path: Path) -> None:
    """SIGKILL in the middle of a batch: what came after the checkpoint is done again, and no row is
    there twice.
    """
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
    assert_same_end(config, straight)


def test_sigterm_saves_at_once(straight: Config, tmp_path: Path) -> None:
    """A real process, a real signal, while it evaluates or rolls out; the next start goes on."""
    config = config_of(tmp_path)
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "socpo_fast.cli", "train", "--config", str(CONFIG), *options]
    command += ["--run.dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("train batch 1/4"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, said
    assert "stopped and saved after batch" in said
    assert said.count("KV cache 0.05 GiB\n") == 1
    assert "Traceback" not in said
    trainer.train(config)
    assert_same_end(config, straight)


def test_a_finished_run_is_left_alone(straight: Config) -> None:
    before = (straight.folder / "metrics.jsonl").read_text()
    trainer.train(straight)
    assert (straight.folder / "metrics.jsonl").read_text() == before


def test_eval_of_a_checkpoint_is_the_run_s_own(straight: Config) -> None:
    last = [row for row in rows_of(straight) if row["kind"] == "eval"][-1]
    rates = trainer.evaluate(straight, None)
    assert {name: rates[name] for name in ("success/unassisted", "success/assisted")} == {
        name: last[name] for name in ("success/unassisted", "success/assisted")
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
    trainer.rollout_only(config)
    assert sorted(path.name for path in config.folder.iterdir()) == [".lock", "rollouts"]
    row = json.loads(
        (config.folder / "rollouts" / "batch_000001.jsonl").read_text().splitlines()[0]
    )
    assert isinstance(row["turns"][0]["advantage"], float)  # what an update would have used


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


def test_a_run_begins_from_another_s_checkpoint_and_then_goes_on_from_its_own(
    straight: Config, tmp_path: Path
) -> None:
    start = latest_checkpoint(straight.folder / "checkpoints")
    config = config_of(tmp_path, run__resume=str(start), run__num_batches=5)
    trainer.train(config)
    assert [row["batch"] for row in rows_of(config) if row["kind"] == "batch"] == [5]
    again = trainer.Trainer(config)
    assert again.resumed_from is not None
    assert again.resumed_from.parent == config.folder / "checkpoints"
    own = config.folder / "checkpoints"
    run = config.run.model_copy(update={"resume": str(own / "update_000001")})
    with pytest.raises(ValueError, match="must be the run's last checkpoint update_000010"):
        trainer.train(config.model_copy(update={"run": run}))


def test_a_new_run_never_overwrites_an_old_one(straight: Config) -> None:
    run = straight.run.model_copy(update={"resume": "never"})
    with pytest.raises(ValueError, match="must be new with run.resume never"):
        trainer.train(straight.model_copy(update={"run": run}))


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    """Unassisted accuracy on held-out questions rises by far more than 15 points; the shipped
    settings, shortened.
    """
    config = load_config(
        CONFIG,
        {"run.dir": str(tmp_path), "run.num_batches": 10, "data.builtin_eval_questions": 100},
    )
    trainer.train(config)
    evals = [row["success/unassisted"] for row in rows_of(config) if row["kind"] == "eval"]
    assert evals[0] < 0.4
    assert evals[-1] > evals[0] + 0.15
