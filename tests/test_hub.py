"""Models of the hub: what is fetched, what is refused in words, and what works without a network.

The hub is a server on loopback; the client is huggingface_hub's own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from socpo_fast.cli import main
from socpo_fast.config import LocalTeacherConfig, load_config
from socpo_fast.model import load_student
from socpo_fast.model.hub import model_folder, pin, pin_models
from socpo_fast.socratic.bridge import load_tokenizer
from socpo_fast.socratic.tasks.molar_mass import STUDENT_DIR
from tests.helpers.fake_hub import COMMIT, REPOSITORY, FakeHub, fake_hub

NEVER = (
    "pytorch_model.bin",
    "models/big.safetensors",
    "modeling_tiny.py",
    "training_args.bin",
    "onnx/model.onnx",
    "a.md",
)
TRAIN = {
    "student.path": REPOSITORY,
    "run.num_batches": 1,
    "data.eval": "none",
    "rollout.questions_per_batch": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "train.questions_per_update": 2,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the built-in student, beside files that are never wanted."""
    folder = tmp_path / "repository"
    shutil.copytree(STUDENT_DIR, folder)
    for name in NEVER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("never")
    monkeypatch.chdir(tmp_path)
    with fake_hub(folder, tmp_path / "cache", monkeypatch) as server:
        yield server


def test_a_model_is_fetched_without_code_or_pickle(hub: FakeHub, tmp_path: Path) -> None:
    folder = model_folder("student.path", REPOSITORY)
    assert folder.is_relative_to(tmp_path / "cache") and folder.name == COMMIT
    assert hub.fetched == {path.name for path in STUDENT_DIR.iterdir()}
    assert load_tokenizer(folder) and load_student(folder)
    assert pin("student.path", REPOSITORY) == f"{REPOSITORY}@{COMMIT}"
    hub.refusal = (500, "")
    assert model_folder("student.path", f"{REPOSITORY}@{COMMIT}") == folder


def test_nothing_is_written_outside_of_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    """A revision is a path in the cache, so one that leaves it is no name of the hub."""
    before = {*tmp_path.rglob("*")}
    for revision in ("../../../../evil", "/etc/evil", "a//b", "a/", "..", "a/../../../evil"):
        name = f"{REPOSITORY}@{revision}"
        assert model_folder("student.path", name) == Path(name)
    assert not hub.fetched and {*tmp_path.rglob("*")} == before
    assert pin("student.path", f"{REPOSITORY}@refs/pr-1/v1.0") == f"{REPOSITORY}@{COMMIT}"


def test_a_quiet_run_downloads_without_bars(
    hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    pin_models(load_config(None, {"student.path": REPOSITORY, "run.quiet": True}))
    assert "model.safetensors" in hub.fetched
    assert capfd.readouterr() == ("", "")


def test_a_plan_needs_no_weights(hub: FakeHub) -> None:
    folder = model_folder("student.path", REPOSITORY, weights=False)
    assert (folder / "config.json").exists() and "model.safetensors" not in hub.fetched


def test_a_cached_model_needs_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("student.path", REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.fetched.clear()
    for name in (REPOSITORY, f"{REPOSITORY}@main", f"{REPOSITORY}@{COMMIT}"):
        assert model_folder("student.path", name) == folder
    assert not hub.fetched
    with pytest.raises(ValueError, match="teacher.path must be in the cache, .*/cache, where"):
        model_folder("teacher.path", "owner/other")


def test_a_folder_goes_before_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / REPOSITORY).mkdir(parents=True)
    for name in (REPOSITORY, str(tmp_path), "/nowhere", "a/b/c", "builtin"):
        assert model_folder("student.path", name) == Path(name)
        assert pin("student.path", name) == name
    assert not hub.fetched


@pytest.mark.parametrize(
    ("name", "refusal", "said"),
    [
        ("owner/none", None, "must be a folder, or a model of the hub, got owner/none (Repo"),
        (f"{REPOSITORY}@gone", None, "must be OWNER/NAME@REVISION of the hub, got"),
        ("owner/two--dashes", None, "must be a folder, or OWNER/NAME of the hub, got"),
        (REPOSITORY, (403, "GatedRepo"), "must be a model that you may read, got"),
        (REPOSITORY, (401, "RepoNotFound"), "set HF_TOKEN in the environment"),
        (REPOSITORY, (500, ""), "must be in the cache, "),
    ],
    ids=["unknown", "revision", "name", "gated", "private", "broken hub"],
)
def test_refusals_say_what_to_do(
    name: str,
    refusal: tuple[int, str] | None,
    said: str,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line, which does not have the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refusal = refusal
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        model_folder("student.path", name)
    message = str(refused.value)
    assert message.startswith("student.path must be ") and "\n" not in message
    assert refused.value.__suppress_context__, "a traceback of Python would show the addresses"
    assert "hf_secret" not in message
    assert hub.tokens <= {"Bearer hf_secret"}


def test_an_unreachable_hub_is_told(hub: FakeHub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ValueError, match="student.path must be in the cache, .* check the name"):
        model_folder("student.path", REPOSITORY)


def test_a_full_disk_is_told(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(ValueError, match=r"\(No space left on device\); check the network and"):
        model_folder("student.path", REPOSITORY)


def test_a_model_without_safetensors_is_refused(hub: FakeHub) -> None:
    """Nothing large is fetched before."""
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"files model\*.safetensors, got owner/tiny without"):
        model_folder("student.path", REPOSITORY)
    assert not hub.fetched & {*NEVER}


def test_student_and_teacher_are_pinned(hub: FakeHub) -> None:
    names = {"student.path": REPOSITORY, "teacher.path": f"{REPOSITORY}@main"}
    config = pin_models(load_config(None, {**names, "teacher.kind": "local"}))
    assert isinstance(config.teacher, LocalTeacherConfig)
    assert config.student.path == config.teacher.path == f"{REPOSITORY}@{COMMIT}"


def test_a_teacher_that_is_never_asked_is_not_fetched(hub: FakeHub) -> None:
    settings = {"teacher.kind": "local", "teacher.path": REPOSITORY, "rollout.max_attempts": 1}
    config = pin_models(load_config(None, settings))
    assert isinstance(config.teacher, LocalTeacherConfig) and config.teacher.path == REPOSITORY
    assert not hub.fetched


def test_a_run_notices_that_its_model_has_moved(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokenizer and reference come from the hub again, so another commit needs consent."""
    words = [word for key, value in TRAIN.items() for word in (f"--{key}", str(value))]
    assert main(["train", *words]) == 0
    hub.commit = "f" * 40
    assert main(["train", *words, "--run.num_batches", "2"]) == 2
    moved = f"student.path: {REPOSITORY}@{COMMIT} -> {REPOSITORY}@{'f' * 40}; set them back"
    assert moved in capsys.readouterr().err
    pinned = ["--run.num_batches", "2", "--student.path", f"{REPOSITORY}@{COMMIT}"]
    assert main(["train", *words, *pinned]) == 0
