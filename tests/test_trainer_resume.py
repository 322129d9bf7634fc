"""From every checkpoint of a run the rest is bit for bit the same; kills and full disks on the way
lose nothing.

A small run with everything on that could come back wrong: epochs of three batches and a question
left over, two attempts, two epochs an update order, a frozen reference, recomputed log-probs,
evaluations that are due or owed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from socpo_fast import run_state, trainer
from socpo_fast.config import Config, load_config
from socpo_fast.model import weights
from socpo_fast.report.tracker import read_metrics
from socpo_fast.stopping import StopRequested, StopSignals
from socpo_fast.train import checkpoint
from socpo_fast.train.checkpoint import latest_checkpoint
from socpo_fast.types import Question

NUM_BATCHES = (
    5  # of 2 questions; 7 questions make epochs of 3 batches, so the run ends inside the second
)
UPDATES_A_BATCH = 4  # 2 questions, one an update, 2 epochs


def grade(text: str, question: Question) -> bool:
    """About one answer in three, by its bytes: an untrained student that stops early still earns
    something.
    """
    return zlib.crc32(text.encode()) % 3 == 0


def config_of(folder: Path, **changes: Any) -> Config:
    return load_config(
        None,
        {
            "run.dir": str(folder),
            "run.num_batches": NUM_BATCHES,
            "run.checkpoint_every_updates": 1,
            "run.keep_checkpoints": 99,
            "run.live": False,
            "data.builtin_train_questions": 7,
            "data.builtin_eval_questions": 2,
            "data.grader": f"{__name__}:grade",
            "rollout.questions_per_batch": 2,
            "rollout.group_size": 3,
            "rollout.max_attempts": 2,
            "rollout.temperature": 2.0,  # otherwise the first tokens of all rollouts are the same
            "rollout.max_new_tokens": 8,
            "rollout.attempt_limit": 6,
            "rollout.guidance_limit": 16,
            "loss.kl_coef": 0.1,
            "loss.entropy_coef": 0.01,
            "loss.tis_clip": 2.0,
            "loss.old_logprobs": "recompute",
            "train.questions_per_update": 1,
            "train.epochs": 2,
            "train.lr": 3e-4,
            "train.warmup_updates": 6,
            "train.lr_schedule": "cosine",
            "train.min_lr_ratio": 0.1,
            "engine.kv_cache_gib": 0.02,
            "eval.every_updates": 8,
            "eval.samples": 2,
            "eval.temperature": 2.0,
        }
        | {name.replace("__", "."): value for name, value in changes.items()},
    )


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    """The report is drawn from what is compared here, and costs more than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "report_note", str)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run that nobody disturbed."""
    config = config_of(tmp_path_factory.mktemp("straight"))
    trainer.train(config)
    return config


def rows_of(config: Config) -> list[dict]:
    """All metrics but clocks and speeds."""
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same(config: Config, straight: Config, *, owed: str = "") -> None:
    """Every checkpoint, metric and rollout is the undisturbed run's, but that `owed` still owes its
    evaluation.
    """
    for path in sorted((straight.folder / "checkpoints").iterdir()):
        other = config.folder / "checkpoints" / path.name
        one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (path, other))
        assert one.keys() == two.keys()
        differ = {name for name in one if one[name] != two[name]}
        assert differ == ({"trainer_state.json"} if path.name == owed else set()), path.name
    assert rows_of(config) == rows_of(straight)
    for path in (straight.folder / "rollouts").iterdir():
        assert (config.folder / "rollouts" / path.name).read_text() == path.read_text()


def copy_as_killed(straight: Config, folder: Path, num_batches: int) -> Config:
    """The run as SIGKILL left it: its last checkpoint, rows of later updates, half a checkpoint,
    half a row.
    """
    config = config_of(folder)
    shutil.copytree(straight.folder, config.folder)
    checkpoints = config.folder / "checkpoints"
    for path in sorted(checkpoints.iterdir())[num_batches:]:
        half = checkpoints / f".{path.name}.partial"
        path.rename(half)
        (half / "manifest.json").unlink()
        with (half / "optimizer.safetensors").open("r+b") as file:
            file.truncate(1000)
    with (config.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "upd')
    return config


def test_the_run_is_worth_comparing(straight: Config) -> None:
    """Updates move the weights, ratios leave 1, help is asked for, evaluations differ."""
    rows = rows_of(straight)
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == NUM_BATCHES * UPDATES_A_BATCH
    rates = [row["policy/lr"] for row in updates]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5] == 3e-4 and len({*rates[5:]}) == len(rates[5:]) and 3e-5 < rates[-1] < 4e-5
    assert sum(row["policy/grad_norm"] > 1e-3 for row in updates) > len(updates) / 2
    assert sum(abs(row["policy/ratio_mean"] - 1) > 1e-6 for row in updates) > len(updates) / 2
    assert 0 < sum(row["guidance/rate"] for row in rows if row["kind"] == "batch") < NUM_BATCHES
    assert [row["update"] for row in rows if row["kind"] == "eval"] == [0, 8, 16, 20]
    asked = [
        json.loads(line)["question_idx"]
        for path in sorted((straight.folder / "rollouts").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(set(asked[:18])) == 6 and set(asked[18:]) & set(asked[:18])


def test_killed_in_bf16(tmp_path: Path) -> None:
    """Masters come back from their halves; the settings refuse bf16 on a CPU for its speed only."""

    def in_bf16(folder: Path) -> Config:
        config = config_of(folder, run__num_batches=3, loss__old_logprobs="auto")
        student = config.student.model_copy(update={"dtype": "bfloat16"})
        return config.model_copy(update={"student": student})

    straight = in_bf16(tmp_path / "straight")
    trainer.train(straight)
    copy_as_killed(straight, tmp_path / "killed", 1)
    config = in_bf16(tmp_path / "killed")
    with pytest.warns(UserWarning, match="torn"):
        trainer.train(config)
    assert_same(config, straight)
    updates = [row for row in rows_of(straight) if row["kind"] == "update"]
    assert updates[0]["policy/ratio_mean"] == 1.0
    assert 0 < updates[0]["policy/sampler_mismatch_mean_nats"] < 0.05


@pytest.mark.parametrize("num_batches", range(1, NUM_BATCHES))
def test_killed_after_any_checkpoint(straight: Config, tmp_path: Path, num_batches: int) -> None:
    config = copy_as_killed(straight, tmp_path, num_batches)
    with pytest.warns(UserWarning, match="torn"):
        trainer.train(config)
    assert_same(config, straight)


@pytest.mark.parametrize("nth", range(4))
def test_stopped_in_any_evaluation(straight: Config, tmp_path: Path, nth: int) -> None:
    """SIGTERM while it evaluates: the checkpoint owes it, and the next start makes it first."""
    stopped = trainer.Trainer(config_of(tmp_path))
    evaluate = stopped.session.evaluate
    calls = []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == nth + 1:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **options)

    stopped.session.evaluate = stop
    with pytest.raises(SystemExit) as stop_code:
        stopped.run()
    assert stop_code.value.code == 128 + signal.SIGTERM
    saved = latest_checkpoint(stopped.config.folder / "checkpoints")
    if nth == 0:  # before the first update there is nothing to save
        assert saved is None
        trainer.train(stopped.config)
        assert_same(stopped.config, straight, owed="")
        return
    assert saved is not None
    assert json.loads((saved / "trainer_state.json").read_text())["trainer"]["eval_due"]
    trainer.train(stopped.config)
    state = json.loads(
        (straight.folder / "checkpoints" / saved.name / "trainer_state.json").read_text()
    )
    best = state["trainer"]["best"]
    is_best = best is not None and saved.name == f"update_{best['update']:06d}"
    is_saved_again = is_best or nth == 3  # the last one is, too
    assert_same(stopped.config, straight, owed="" if is_saved_again else saved.name)


@pytest.mark.parametrize("where", [checkpoint, weights], ids=["moments", "weights"])
def test_full_disk(
    straight: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType
) -> None:
    """The third save finds no room: it says so, what was there before is whole, and with room again
    the run goes on.
    """
    config = config_of(tmp_path)
    save_file = where.save_file
    calls = []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    monkeypatch.setattr(where, "save_file", full)
    with pytest.raises(
        RuntimeError, match=r"update_000012 could not be written .*No space left.* free disk space"
    ) as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)
    names = ["update_000004", "update_000008"]
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == names
    trainer.train(config)
    assert_same(config, straight)


def test_a_grader_that_raises_costs_its_own_batch_only(straight: Config, tmp_path: Path) -> None:
    """No checkpoint was due yet: what was trained before is saved all the same, and the run goes on
    from there.
    """
    config = config_of(tmp_path, run__checkpoint_every_updates=0)
    run = trainer.Trainer(config)

    def break_in_batch_3(text: str, question: Question) -> bool:
        if run.state.batch == 2 and not run.state.eval_due:
            raise KeyError(text)
        return grade(text, question)

    run.session.grader = break_in_batch_3
    with pytest.raises(
        ValueError, match=r"break_in_batch_3 raised KeyError: .* \(test_trainer_resume.py line"
    ):
        run.run()
    [saved] = (config.folder / "checkpoints").iterdir()
    there = straight.folder / "checkpoints" / "update_000008" / "manifest.json"
    assert (saved / "manifest.json").read_text() == there.read_text()
    trainer.train(config)
    assert rows_of(config) == rows_of(straight)


def test_a_signal_as_a_block_begins_does_not_wait_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = StopSignals()
    monkeypatch.setattr(
        signals, "check", lambda: signals._handle(signal.SIGTERM, None)
    )  # comes just after the check
    with pytest.raises(StopRequested), signals.stop_at(1):
        pytest.fail("the block ran")


def test_a_run_of_another_layout_is_refused_in_words(
    straight: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_as_killed(straight, tmp_path, 2)
    before = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(run_state, "RECORD_VERSION", run_state.RECORD_VERSION + 1)
    with pytest.raises(
        ValueError, match="must be of record version 4, got 3, .* choose another run.name"
    ):
        trainer.train(config)
    assert {
        path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()
    } == before
