"""The checkpoint of the best evaluation is kept whatever follows, and `best` names it.

Evaluations are scripted: SUCCESS says which share of answers is right after each update.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socpo_fast import measure, trainer
from socpo_fast.cli import main
from socpo_fast.config import Config
from socpo_fast.run_state import best_checkpoint
from socpo_fast.session import Session
from tests.test_trainer_resume import config_of

# update -> success/unassisted. The start has no checkpoint, so its 0.9 does not count. Of the three
# evaluations with 0.5 the first is the best.
SUCCESS = {0: 0.9, 1: 0.25, 2: 0.5, 3: 0.5, 4: 0.125, 5: 0.25, 6: 0.25, 7: 0.5}
TOLD = "best evaluation so far: {:.1%} unassisted; update {} is kept"
NO_MORE = "run: update_000002 counts no more as the best checkpoint: "
GOES = (
    "; it goes at the next save unless it is one of the newest run.keep_checkpoints, copy it "
    "to keep it"
)


def small(folder: Path, **changes: Any) -> Config:
    """Returns the config of a run with one update a batch, and an evaluation after each.

    Without the rule that is tested here only the checkpoint of the last update would be kept.
    """
    settings = {
        "run__num_batches": 5,
        "run__checkpoint_every_updates": 0,
        "run__keep_checkpoints": 1,
        "rollout__max_attempts": 1,
        "loss__kl_coef": 0.0,
        "loss__old_logprobs": "sampler",
        "train__questions_per_update": 2,
        "train__epochs": 1,
        "train__lr_schedule": "constant",
        "train__min_lr_ratio": 0.0,
        "eval__every_updates": 1,
    }
    return config_of(folder, **settings | changes)


def evaluate(self: Session, questions: Any, on_rollout: Any = None) -> dict[str, float]:
    return {"success/unassisted": SUCCESS[self.engine.policy_version], "time/total_s": 0.0}


@pytest.fixture(scope="module", autouse=True)
def scripted() -> Iterator[None]:
    """Replaces evaluations by SUCCESS, and leaves reports out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "report_note", str)
        patch.setattr(Session, "evaluate", evaluate)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = small(tmp_path_factory.mktemp("finished"))
    trainer.train(config)
    return config


@pytest.fixture
def copied(finished: Config, tmp_path: Path) -> Path:
    """Returns the folder of a copy of the finished run."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path


def checkpoints_of(config: Config) -> dict[str, dict[str, Any]]:
    """Returns the manifest (file -> bytes and hash) of each checkpoint by its name."""
    folders = sorted((config.folder / "checkpoints").iterdir())
    return {path.name: json.loads((path / "manifest.json").read_text()) for path in folders}


def test_the_best_is_kept_beside_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is saved although no save was due then; of equal evaluations the first one counts."""
    config = small(tmp_path)
    trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000002", "update_000005"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "best evaluation" in line]
    assert lines == [TOLD.format(0.25, 1), TOLD.format(0.5, 2)]
    assert best_checkpoint(config.folder) == config.folder / "checkpoints" / "update_000002"


def test_best_can_be_named(finished: Config, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folders: list[Path] = []
    eval_questions: Callable[..., Any] = Session.eval_questions
    monkeypatch.setattr(
        Session,
        "eval_questions",
        lambda self: folders.append(self.student_folder) or eval_questions(self),
    )
    words = ["eval", "--config", str(finished.folder / "config.toml"), "--checkpoint"]
    assert main([*words, "best"]) == 0
    assert main([*words, "none"]) == 0
    assert [folder.name for folder in folders] == ["update_000002", "update_000005"]


def test_no_best_checkpoint_without_evaluation(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="^eval: --checkpoint best must be in .*, got no evaluation with a success behind an "
        "update; ",
    ):
        measure.evaluate(small(tmp_path), "best")
    config = small(tmp_path, data__eval="none", run__num_batches=2)
    trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000002"]
    with pytest.raises(ValueError, match="name a folder, or train with data.eval$"):
        measure.evaluate(config, "best")


@pytest.mark.parametrize("num_batches", [1, 3])
def test_resume_is_bitwise(finished: Config, tmp_path: Path, num_batches: int) -> None:
    trainer.train(small(tmp_path, run__num_batches=num_batches))
    config = small(tmp_path)
    trainer.train(config)
    assert checkpoints_of(config) == checkpoints_of(finished)


class Killed(BaseException):
    """A SIGKILL as far as the code under test can tell: nothing catches it."""


@pytest.mark.parametrize("function_name", ["save_checkpoint", "prune_checkpoints"])
def test_killed_between_evaluation_and_save(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function_name: str
) -> None:
    """The next start repeats an evaluation that was not saved.

    After a kill behind the save, two best checkpoints exist; the next save removes the older one.
    """
    config = small(tmp_path)
    calls = []
    original = getattr(trainer, function_name)

    def killed_at_second_call(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr(trainer, function_name, killed_at_second_call)
    with pytest.raises(Killed):
        trainer.train(config)
    expected = (
        ["update_000001"]
        if function_name == "save_checkpoint"
        else ["update_000001", "update_000002"]
    )
    assert [*checkpoints_of(config)] == expected
    trainer.train(config)
    assert checkpoints_of(config) == checkpoints_of(finished)


def test_interrupted_removal_is_finished_later(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed while it removed a checkpoint removes the rest at the next save."""

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:  # with ignore_errors a write only clears leftovers of its own
            (folder / "config.json").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            trainer.train(small(copied, run__num_batches=6))
    config = small(copied, run__num_batches=7)
    trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000002", "update_000007"]


def remove(folder: Path) -> str:
    shutil.rmtree(folder)
    return r".*/manifest.json is missing or damaged"


def shorten(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return r".*/model.safetensors is missing or not of its \d+ bytes"


def lose_one_file(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return r".*/tokenizer.json is missing or not of its \d+ bytes"


def flip(folder: Path) -> str:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    return r".*/model.safetensors has other bytes than were written"


@pytest.mark.parametrize("damage", [remove, shorten, lose_one_file, flip])
def test_damaged_best_checkpoint_is_replaced(copied: Path, damage: Callable[[Path], str]) -> None:
    """A checkpoint that lacks a file or bytes is left alone: people may still bring them back.

    One with the right sizes but wrong bytes is removed at the next save, with a warning.
    """
    config = small(copied, run__num_batches=6)
    best = config.folder / "checkpoints" / "update_000002"
    reason = damage(best)
    advice = f"bring it back, or name another checkpoint of {best.parent}"
    with pytest.raises(
        ValueError, match=f"^eval: --checkpoint best must be whole, got {reason}; {advice}$"
    ):
        measure.evaluate(config, "best")
    damaged_files = files_of(best)
    with pytest.warns(UserWarning, match=f"^{NO_MORE}{reason}{GOES if damage is flip else ''}$"):
        trainer.train(config)
    assert best_checkpoint(config.folder).name == "update_000006"
    assert files_of(best) == ({} if damage is flip else damaged_files)
    trainer.train(small(copied, run__num_batches=7))  # its best checkpoint is another one by now
    assert files_of(best) == ({} if damage is flip else damaged_files)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_a_run_begins_from_the_best_of_another(finished: Config, tmp_path: Path) -> None:
    checkpoints = finished.folder / "checkpoints"
    config = small(tmp_path, run__resume=str(checkpoints / "update_000002"), run__num_batches=4)
    trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000002", "update_000004"]
    assert best_checkpoint(config.folder) == config.folder / "checkpoints" / "update_000002"
    other = small(
        tmp_path,
        run__name="other",
        run__resume=str(checkpoints / "update_000005"),
        run__num_batches=6,
    )
    with pytest.warns(UserWarning, match=f"^{NO_MORE}it is another run's$"):
        trainer.train(other)
    assert best_checkpoint(other.folder).name == "update_000006"


def test_without_evaluation_the_best_stays(copied: Path) -> None:
    changes = {"data__eval": "none", "run__num_batches": 6, "run__accept_changes": True}
    config = small(copied, **changes)
    with pytest.warns(UserWarning, match="changed from update 5 on: questions of data.eval"):
        trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000002", "update_000006"]


@pytest.mark.parametrize("change", [{"data__builtin_eval_questions": 3}, {"eval__samples": 3}])
def test_other_measurements_are_not_compared(copied: Path, change: dict[str, int]) -> None:
    """After a change of questions or sampling the next evaluation is the best so far."""
    config = small(copied, run__num_batches=6, run__accept_changes=True, **change)
    sampling = "temperature 2.0, top_p 0.95, grader tests.test_trainer_resume:grade at 1.0"
    measured_by = f"2 with hash [0-9a-f]{{12}}, 2 samples of 8 tokens, {sampling}"
    with pytest.warns(UserWarning, match=f"^{NO_MORE}{measured_by} -> . with hash .*{GOES}$"):
        trainer.train(config)
    assert [*checkpoints_of(config)] == ["update_000006"]
    assert best_checkpoint(config.folder).name == "update_000006"
