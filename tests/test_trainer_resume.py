"""A run that is killed or stopped anywhere resumes bitwise, and a full disk loses nothing.

The run is small, but has everything that could come back wrong: epochs of three batches with a
question left over, two attempts, two passes over each batch, a frozen reference, recomputed
log-probs, and evaluations that a stop has delayed.
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
from socpo_fast.training import checkpoint
from socpo_fast.training.checkpoint import latest_checkpoint
from socpo_fast.types import Question

# 7 questions make epochs of 3 batches of 2, so the run ends inside the second epoch.
NUM_BATCHES = 5
UPDATES_A_BATCH = 4  # 2 questions, one question an update, 2 passes


def grade(text: str, question: Question) -> bool:
    """Whether the bytes of an answer hash to 0 modulo 3.

    An untrained student is right about one time in three, so that rewards differ.
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
            "rollout.temperature": 2.0,  # below this the first tokens of all rollouts are the same
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
    """Leaves reports out: they are made from the files compared here, and slower than a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "report_note", str)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Returns the run that nothing interrupted."""
    config = config_of(tmp_path_factory.mktemp("uninterrupted"))
    trainer.train(config)
    return config


def rows_of(config: Config) -> list[dict]:
    """Returns all metrics except for times and speeds."""
    rows = read_metrics(config.folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same(config: Config, uninterrupted: Config, *, owed: str = "") -> None:
    """Checks that every checkpoint, metric and rollout is bitwise that of the uninterrupted run.

    The state of checkpoint `owed` may differ: it was saved before the evaluation that was due.
    """
    for path in sorted((uninterrupted.folder / "checkpoints").iterdir()):
        checkpoint = config.folder / "checkpoints" / path.name
        expected, actual = (
            json.loads((folder / "manifest.json").read_text()) for folder in (path, checkpoint)
        )
        assert expected.keys() == actual.keys()
        differing = {name for name in expected if expected[name] != actual[name]}
        assert differing == ({"trainer_state.json"} if path.name == owed else set()), path.name
    assert rows_of(config) == rows_of(uninterrupted)
    for path in (uninterrupted.folder / "rollouts").iterdir():
        assert (config.folder / "rollouts" / path.name).read_text() == path.read_text()


def copy_as_killed(uninterrupted: Config, folder: Path, num_batches: int) -> Config:
    """Returns a copy of the run as SIGKILL leaves it after num_batches.

    It has the checkpoints until then, rows of later updates, half a checkpoint and half a row.
    """
    config = config_of(folder)
    shutil.copytree(uninterrupted.folder, config.folder)
    checkpoints = config.folder / "checkpoints"
    for path in sorted(checkpoints.iterdir())[num_batches:]:
        partial = checkpoints / f".{path.name}.partial"
        path.rename(partial)
        (partial / "manifest.json").unlink()
        with (partial / "optimizer.safetensors").open("r+b") as file:
            file.truncate(1000)
    with (config.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "upd')
    return config


def test_reference_run_exercises_every_feature(uninterrupted: Config) -> None:
    """Updates move the weights, ratios leave 1, and some but not all attempts get guidance."""
    rows = rows_of(uninterrupted)
    updates = [row for row in rows if row["kind"] == "update"]
    assert len(updates) == NUM_BATCHES * UPDATES_A_BATCH
    rates = [row["policy/lr"] for row in updates]
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5] == 3e-4 and len({*rates[5:]}) == len(rates[5:]) and 3e-5 < rates[-1] < 4e-5
    assert sum(row["policy/grad_norm"] > 1e-3 for row in updates) > len(updates) / 2
    assert sum(abs(row["policy/ratio_mean"] - 1) > 1e-6 for row in updates) > len(updates) / 2
    assert 0 < sum(row["guidance/rate"] for row in rows if row["kind"] == "batch") < NUM_BATCHES
    assert [row["update"] for row in rows if row["kind"] == "eval"] == [0, 8, 16, 20]
    question_idxs = [
        json.loads(line)["question_idx"]
        for path in sorted((uninterrupted.folder / "rollouts").iterdir())
        for line in path.read_text().splitlines()
    ]
    assert len(set(question_idxs[:18])) == 6 and set(question_idxs[18:]) & set(question_idxs[:18])


def test_killed_run_resumes_bitwise_in_bf16(tmp_path: Path) -> None:
    """fp32 masters come back from their two halves.

    The config refuses bf16 on a CPU, but only because it is slow, so the check is bypassed.
    """

    def in_bf16(folder: Path) -> Config:
        config = config_of(folder, run__num_batches=3, loss__old_logprobs="auto")
        student = config.student.model_copy(update={"dtype": "bfloat16"})
        return config.model_copy(update={"student": student})

    uninterrupted = in_bf16(tmp_path / "uninterrupted")
    trainer.train(uninterrupted)
    copy_as_killed(uninterrupted, tmp_path / "killed", 1)
    config = in_bf16(tmp_path / "killed")
    with pytest.warns(UserWarning, match="torn"):
        trainer.train(config)
    assert_same(config, uninterrupted)
    updates = [row for row in rows_of(uninterrupted) if row["kind"] == "update"]
    assert updates[0]["policy/ratio_mean"] == 1.0
    assert 0 < updates[0]["policy/sampler_mismatch_mean_nats"] < 0.05


@pytest.mark.parametrize("num_batches", range(1, NUM_BATCHES))
def test_killed_run_resumes_bitwise(
    uninterrupted: Config, tmp_path: Path, num_batches: int
) -> None:
    config = copy_as_killed(uninterrupted, tmp_path, num_batches)
    with pytest.warns(UserWarning, match="torn"):
        trainer.train(config)
    assert_same(config, uninterrupted)


@pytest.mark.parametrize("nth", range(4))
def test_stop_in_any_evaluation_resumes_bitwise(
    uninterrupted: Config, tmp_path: Path, nth: int
) -> None:
    """After SIGTERM in an evaluation it is due in the checkpoint, and the next start runs it."""
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
        assert_same(stopped.config, uninterrupted, owed="")
        return
    assert saved is not None
    assert json.loads((saved / "trainer_state.json").read_text())["trainer"]["eval_due"]
    trainer.train(stopped.config)
    state = json.loads(
        (uninterrupted.folder / "checkpoints" / saved.name / "trainer_state.json").read_text()
    )
    best = state["trainer"]["best"]
    is_best = best is not None and saved.name == f"update_{best['update']:06d}"
    is_saved_again = is_best or nth == 3  # the last checkpoint is saved again as well
    assert_same(stopped.config, uninterrupted, owed="" if is_saved_again else saved.name)


@pytest.mark.parametrize("module", [checkpoint, weights], ids=["moments", "weights"])
def test_full_disk_loses_nothing(
    uninterrupted: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    """The third save finds a full disk and says so; older checkpoints stay, and the run resumes."""
    config = config_of(tmp_path)
    save_file = module.save_file
    calls = []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RuntimeError, match=r"update_000012 could not be written .*No space left.* free disk space"
    ) as caught:
        trainer.train(config)
    assert "\n" not in str(caught.value)
    names = ["update_000004", "update_000008"]
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == names
    trainer.train(config)
    assert_same(config, uninterrupted)


def test_a_grader_that_raises_costs_its_own_batch_only(
    uninterrupted: Config, tmp_path: Path
) -> None:
    """Earlier batches are saved although no checkpoint was due, and the run resumes there."""
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
    expected = uninterrupted.folder / "checkpoints" / "update_000008" / "manifest.json"
    assert (saved / "manifest.json").read_text() == expected.read_text()
    trainer.train(config)
    assert rows_of(config) == rows_of(uninterrupted)


def test_signal_at_the_start_of_a_block_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signals = StopSignals()
    # check() is the last call before the block. The signal comes then, after its own test.
    monkeypatch.setattr(signals, "check", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StopRequested), signals, signals.stop_at(1):
        pytest.fail("the block ran")


def test_run_of_another_record_version_is_refused(
    uninterrupted: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_as_killed(uninterrupted, tmp_path, 2)
    old_files = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(run_state, "RECORD_VERSION", run_state.RECORD_VERSION + 1)
    with pytest.raises(
        ValueError, match="must be of record version 4, got 3, .* choose another run.name"
    ):
        trainer.train(config)
    assert {
        path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()
    } == old_files
