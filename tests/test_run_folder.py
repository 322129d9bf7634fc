"""A run's folder after damage: a start resumes, or says why not and changes nothing."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from socpo_fast.cli import main
from socpo_fast.config import load_config
from socpo_fast.report.tracker import read_metrics
from tests.helpers.bad_input import Words, assert_refused, finished_run, run_dir, snapshot, words_of

__all__ = ["finished_run", "run_dir"]  # fixtures
Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parent.parent
NO_EVAL = {"data.eval": "none", "run.checkpoint_every_updates": 1, "run.keep_checkpoints": 9}


def flip(path: Path) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoints_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "run" / "checkpoints").iterdir())


def without_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def replaced_by_a_file(run: Path) -> None:
    without_checkpoints(run)
    (run / "checkpoints").write_text("")


def replaced_by_a_broken_link(run: Path) -> None:
    without_checkpoints(run)
    (run / "checkpoints").symlink_to("gone")


def emptied(run: Path) -> None:
    without_checkpoints(run)
    (run / "checkpoints" / "update_000001").mkdir(parents=True)


def replaced_by_a_circle(run: Path) -> None:
    without_checkpoints(run)
    (run / "checkpoints").symlink_to("checkpoints")


NO_FOLDER = "run: .*/run/checkpoints must be a folder, got something else"
# Damage to a finished run -> the line that a start prints.
LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoints": (
        without_checkpoints,
        "run: .*/run/checkpoints must hold a checkpoint, as .*metrics.jsonl tells of update 1",
    ),
    "a file": (replaced_by_a_file, NO_FOLDER),
    "a broken link": (replaced_by_a_broken_link, NO_FOLDER),
    "a link to itself": (replaced_by_a_circle, NO_FOLDER),
    "an empty checkpoint": (
        emptied,
        "checkpoint: .*update_000001/manifest.json is missing or damaged, and no other",
    ),
    **{
        f"a bit of {name}": (
            lambda run, name=name: flip(run / "checkpoints" / "update_000001" / name),
            f"checkpoint: .*update_000001/{name} has other bytes than were written, and no other",
        )
        for name in ("config.json", "tokenizer.json", "trainer_state.json", "model.safetensors")
    },
    "a bit of manifest.json": (
        lambda run: flip(run / "checkpoints" / "update_000001" / "manifest.json"),
        "checkpoint: .*update_000001/.* (has|is) .*, and no other checkpoint is whole",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_lost_checkpoints_are_no_fresh_start(case: str, run_dir: Path, capsys: Capture) -> None:
    damage, message = LOST[case]
    damage(run_dir / "run")
    old_files = snapshot(run_dir)
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 2
    assert_refused(capsys.readouterr().err, message)
    assert snapshot(run_dir) == old_files
    if message != NO_FOLDER:  # eval must not fall back to the student that the run began with
        assert main(words_of("eval", run_dir, {})) == 2
        assert_refused(capsys.readouterr().err, message)


def test_damaged_checkpoint_is_skipped(run_dir: Path, capsys: Capture) -> None:
    """A warning names the file, and the run still ends bitwise as an undamaged one."""
    words = NO_EVAL | {"run.name": "run2", "run.num_batches": 4}
    assert main(words_of("train", run_dir, words)) == 0
    folder = run_dir / "run2" / "checkpoints"
    undamaged = snapshot(folder)
    shutil.rmtree(folder / "update_000004")
    flip(folder / "update_000003" / "tokenizer.json")
    damaged_files = snapshot(folder / "update_000003")
    capsys.readouterr()
    stop_at_2 = words | {"run.num_batches": 2, "run.keep_checkpoints": 1}
    message = "update_000003/tokenizer.json has other bytes .*; passed over for update_000002"
    with pytest.warns(UserWarning, match=message):
        assert main(words_of("train", run_dir, stop_at_2)) == 0
    assert "run run2: already finished at batch 2, nothing was done\n" in capsys.readouterr().out
    assert snapshot(folder / "update_000003") == damaged_files
    with pytest.warns(UserWarning, match="passed over"):
        assert main(words_of("train", run_dir, words)) == 0
    assert snapshot(folder) == undamaged


def test_damaged_rows_are_left_out(run_dir: Path, capsys: Capture) -> None:
    """Rows that are no JSON, have another shape or are nested too deeply cost nothing else."""
    run = run_dir / "run"
    bad_rows = ["3", "{}", "[" * 100_000, '{"turns": [3]}', '{"kind": ["eval"]}']
    bad_rows += ['{"kind": "eval", "batch": 1, "update": "x"}']
    bad_rows += ['{"kind": "batch", "batch": 1, "update": 1, "reward/mean": "x"}']
    bad_rows += [f'{{"kind": "batch", "batch": 1, "update": 1, "reward/mean": 1{"0" * 400}}}']
    for path in (run / "metrics.jsonl", run / "rollouts" / "batch_000001.jsonl"):
        with path.open("a") as file:
            file.write("\n".join(bad_rows) + "\n\xff\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl: .* left out") as warnings:
        assert main(["report", str(run)]) == 0
    assert any("batch_000001.jsonl: " in str(warning.message) for warning in warnings)
    with pytest.warns(UserWarning, match=r"metrics.jsonl: .* left out"):
        assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch"] for row in rows if row["kind"] == "batch"] == [1, 2]
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["x = " + "[" * 100_000, "[run", "\xff", "history = 3", "[[history]]\nuntil_update = 0"],
)
def test_a_damaged_config_toml_is_named(content: str, run_dir: Path, capsys: Capture) -> None:
    (run_dir / "run" / "config.toml").write_text(content, encoding="latin-1")
    old_files = snapshot(run_dir)
    assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 2
    assert_refused(capsys.readouterr().err, "(run|config): .*/run/config.toml must ")
    assert snapshot(run_dir) == old_files


def test_links_in_a_run_are_replaced_or_used(run_dir: Path, tmp_path: Path) -> None:
    """Files of a run that are links are replaced; folders that are links are used."""
    run = run_dir / "run"
    victim = tmp_path / "victim"
    disk = tmp_path / "disk"
    for name in ("curves.svg", "report.html", "metrics.jsonl.tmp", "config.toml.tmp"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    disk.mkdir()
    for name in ("checkpoints", "rollouts"):
        shutil.move(run / name, disk / name)
        (run / name).symlink_to(disk / name)
    assert main(words_of("train", run_dir, {"run.num_batches": 2, "run.keep_checkpoints": 1})) == 0
    assert not victim.exists()
    state = json.loads((disk / "checkpoints" / "update_000002" / "trainer_state.json").read_text())
    # Without a success there is no best checkpoint.
    best = state["trainer"]["best"] or {"update": 2}
    expected = {"update_000002", f"update_{best['update']:06d}"}
    assert {path.name for path in (disk / "checkpoints").iterdir()} == expected
    assert "<html" in (run / "report.html").read_text()


def test_lock_that_is_a_link_is_refused(run_dir: Path, tmp_path: Path, capsys: Capture) -> None:
    (run_dir / "run" / ".lock").unlink()
    (run_dir / "run" / ".lock").symlink_to(tmp_path / "victim")
    assert main(words_of("train", run_dir, {})) == 2
    message = "run: .*run must be a writable folder, got Too many levels of .*/.lock; set run.dir"
    assert_refused(capsys.readouterr().err, message)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "words",
    [
        {"student.path": "/nowhere"},
        {"rollout.questions_per_batch": 14, "train.questions_per_update": 14},
        {"run.resume": "/nowhere/update_000001"},
        {"run.resume": "update_000001"},
    ],
)
def test_a_refused_command_leaves_no_folder(words: Words, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "there").mkdir()
    for command in ("train", "rollout") if "run.resume" not in words else ("train",):
        assert main(words_of(command, tmp_path / "there" / "runs" / "mine", words)) == 2
        assert list((tmp_path / "there").iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_damaged_checkpoint_is_refused_as_student(run_dir: Path, capsys: Capture) -> None:
    """This holds for an evaluation of it, and for a run that begins from it."""
    checkpoint = run_dir / "run" / "checkpoints" / "update_000001"
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-200_000:-100_000] = bytes(100_000)
    (checkpoint / "model.safetensors").write_bytes(weights)
    message = "checkpoint: .*update_000001/model.safetensors has other bytes"
    assert main(words_of("eval", run_dir, {"checkpoint": checkpoint})) == 2
    assert_refused(capsys.readouterr().err, message)
    assert main(words_of("train", run_dir, {"run.name": "run2", "student.path": checkpoint})) == 2
    assert_refused(capsys.readouterr().err, message)


def test_run_in_another_thread_works(run_dir: Path) -> None:
    """Python handles signals on the main thread only, so there are no handlers here."""
    codes = []
    words = words_of("train", run_dir, {"run.num_batches": 2})
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert "update_000002" in checkpoints_of(run_dir)


def test_a_moved_run_goes_on(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "run").rename(tmp_path / "moved")
    words = {"run.num_batches": 2, "run.name": "moved"}
    assert main(words_of("train", tmp_path, words)) == 0
    assert "history" not in tomllib.loads((tmp_path / "moved" / "config.toml").read_text())


def test_home_is_written_out_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = ["[run]", 'dir = "~/runs"', 'resume = "~/x"', "[student]", 'path = "~/s"']
    lines += ["[data]", 'train = "~/d"', 'eval = "~/e"']
    lines += ["[teacher]", 'kind = "local"', 'path = "~/t"']
    (tmp_path / "c.toml").write_text("\n".join(lines))
    config = load_config("~/c.toml")
    assert config.folder == tmp_path / "runs" / "run"
    data = config.data
    other_paths = (config.run.resume, config.student.path, config.teacher.path)
    all_paths = (*other_paths, data.train, data.eval)
    assert all_paths == tuple(f"{tmp_path}/{name}" for name in "xstde")
    message = "config: ~ must be a known user's home, got '~nobody-here/x'"
    with pytest.raises(ValueError, match=message):
        load_config(None, {"run.dir": "~nobody-here/x"})


def test_unknown_users_home_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for words in (
        ["train", "--config", "~nobody-here/c.toml"],
        ["report", "~nobody-here/x"],
        words_of("eval", tmp_path, {"checkpoint": "~nobody-here/x"}),
    ):
        assert main(words) == 2
        assert_refused(
            capsys.readouterr().err, "config: ~ must be a known user's home, got '~nobody-here/"
        )


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_tensorboard_never_ends_a_run(
    method: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"torch.utils.tensorboard.SummaryWriter.{method}", fail)
    with pytest.warns(UserWarning, match="run/tb: TensorBoard stops here"):
        assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    assert "update_000002" in checkpoints_of(run_dir)


def test_tensorboard_may_be_absent(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of it: metrics.jsonl has every number."""
    shutil.rmtree(run_dir / "run" / "tb")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with warnings.catch_warnings(action="error"):
        assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
    assert not (run_dir / "run" / "tb").exists()
    assert len(read_metrics(run_dir / "run" / "metrics.jsonl")) >= 2


def test_lost_metrics_are_told(run_dir: Path) -> None:
    (run_dir / "run" / "metrics.jsonl").unlink()
    message = "run/metrics.jsonl: rows of updates 1 to 1 are missing"
    with pytest.warns(UserWarning, match=message):
        assert main(words_of("train", run_dir, {"run.num_batches": 2})) == 0
