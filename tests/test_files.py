"""Files are replaced atomically despite crashes and full disks, and broken JSON is named."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from socpo_fast import files
from socpo_fast.files import RunFailed, new_folder, read_json, replace_file

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("failing", ["fsync", "open"])
def test_full_disk_names_and_keeps_the_old_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    replace_file(path, "old")
    disk_full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "open")), disk_full)
    message = r"run: .*rows.jsonl could not be written \(No space left on device\)"
    with pytest.raises(RunFailed, match=message):
        replace_file(path, "new")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert path.read_text() == "old"


KILLED_AT_FSYNC = """
import os, signal, sys
from pathlib import Path
from socpo_fast.files import new_folder, replace_file

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
if path.is_file():
    replace_file(path, "new")
with new_folder(path) as partial:
    (partial / "file").write_text("new")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_interrupted_write_leaves_the_old(kind: str, tmp_path: Path) -> None:
    """After a SIGKILL before the rename, the next write ignores the leftovers of the first."""
    path = tmp_path / "target"
    content = path
    if kind == "folder":
        path.mkdir()
        content = path / "file"
    content.write_text("old")
    command = [sys.executable, "-c", KILLED_AT_FSYNC, str(path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert content.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    if kind == "folder":
        with new_folder(path) as partial:
            (partial / "file").write_text("new")
    else:
        replace_file(path, "new")
        assert list(tmp_path.iterdir()) == [path]
    assert content.read_text() == "new"


def test_failed_new_folder_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "below" / "target"

    def fail() -> None:
        with new_folder(target) as partial:
            (partial / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "old"], ids=["absent", "empty", "taken"])
def test_folder_is_replaced_as_a_whole(tmp_path: Path, content: str | None) -> None:
    target = tmp_path / "target"
    if content is not None:
        target.mkdir()
    if content:
        (target / "old").write_text(content)
    with new_folder(target) as partial:
        (partial / "new").touch()
        assert partial.parent == target.parent
        assert list(target.glob("*")) == ([target / "old"] if content else [])
    assert list(tmp_path.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_neighbour_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    """A folder with the name of a leftover is removed only if that name is needed."""
    neighbour = tmp_path / f"target{files.REPLACED}"
    neighbour.mkdir()
    with new_folder(tmp_path / "target"):
        pass
    assert neighbour.is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is missing"), ("{", "must be JSON, got"), ("[]", "must be a JSON object, got list")],
)
def test_invalid_json_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_json(path)


@pytest.mark.parametrize("planted", ["link", "folder"])
def test_partial_name_is_never_written_through(planted: str, tmp_path: Path) -> None:
    """A link or folder with the name of the partial file is replaced or refused, never followed."""
    victim = tmp_path / "victim"
    partial = tmp_path / "file.tmp"
    victim.write_text("mine")
    if planted == "link":
        partial.symlink_to(victim)
        replace_file(tmp_path / "file", "new")
        assert (tmp_path / "file").read_text() == "new"
    else:
        partial.mkdir()
        with pytest.raises(RunFailed, match="file could not be written"):
            replace_file(tmp_path / "file", "new")
    assert victim.read_text() == "mine"


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("mine")
    (tmp_path / "target").symlink_to(victim)
    with new_folder(tmp_path / "target") as partial:
        (partial / "new").touch()
    assert not (tmp_path / "target").is_symlink()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert (victim / "kept").read_text() == "mine"


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json: must be JSON, got maximum recursion depth"):
        read_json(tmp_path / "config.json")
