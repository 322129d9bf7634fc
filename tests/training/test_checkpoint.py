"""Checks that loading gives back what was saved, and that a partial save is never loaded."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from socpo_fast.model import load_student
from socpo_fast.model.decoder import Decoder
from socpo_fast.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from socpo_fast.training.optimizer import Optimizer
from tests.helpers.made_rollouts import make_student

STATE = {"batch": 3, "question_order_seed": 2**63 - 1, "lr": 0.1 + 0.2, "name": "tés\n"}
DTYPES = [torch.float32, torch.bfloat16]


def trained(
    seed: int, num_updates: int, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Optimizer]:
    """Returns a student and its optimizer after some updates with random gradients."""
    student = make_student(seed, dtype)
    optimizer = Optimizer(student, lr=1e-2)
    train(student, optimizer, num_updates)
    return student, optimizer


def train(student: Decoder, optimizer: Optimizer, num_updates: int) -> None:
    for _ in range(num_updates):
        generator = torch.Generator().manual_seed(optimizer.num_updates)
        for param in student.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def save(folder: Path, student: Decoder, optimizer: Optimizer) -> Path:
    return save_checkpoint(
        folder, student=student, optimizer=optimizer, trainer_state=STATE, tokenizer_from=None
    )


def bits(student: Decoder, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    named = student.state_dict() | optimizer.state_tensors()
    return {name: tensor.clone().view(torch.uint8) for name, tensor in named.items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_bitwise_and_in_place(dtype: torch.dtype, tmp_path: Path) -> None:
    """Loading restores weights and optimizer bitwise, into the tensors that are there already.

    Two further updates of the loaded student equal those of the saved one.
    """
    student, optimizer = trained(seed=0, num_updates=3, dtype=dtype)
    path = save(tmp_path / "checkpoints", student, optimizer)
    assert path == tmp_path / "checkpoints" / "update_000003"
    files = [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    assert sorted(file.name for file in path.iterdir()) == files
    other, other_optimizer = trained(seed=1, num_updates=1, dtype=dtype)
    tensors = [*other.parameters(), *other_optimizer.state_tensors().values()]
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert load_checkpoint(path, other, other_optimizer) == STATE
    tensors = [*other.parameters(), *other_optimizer.state_tensors().values()]
    assert pointers == [tensor.data_ptr() for tensor in tensors]
    assert_same_bits(bits(other, other_optimizer), bits(student, optimizer))
    train(student, optimizer, 2)
    train(other, other_optimizer, 2)
    assert_same_bits(bits(other, other_optimizer), bits(student, optimizer))
    assert optimizer.state_counts() == other_optimizer.state_counts()


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoint_is_a_model_folder(dtype: torch.dtype, tmp_path: Path) -> None:
    """load_student and transformers load a checkpoint, with the parameters' own dtype."""
    student, optimizer = trained(0, 1, dtype)
    path = save(tmp_path, student, optimizer)
    loaded = load_student(path, dtype=str(dtype).removeprefix("torch."))
    assert all(
        torch.equal(actual, expected)
        for actual, expected in zip(loaded.parameters(), student.parameters(), strict=True)
    )
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert theirs.dtype == dtype
    assert torch.equal(theirs.model.norm.weight, student.norm.weight)


def test_latest_skips_damaged_ones_with_a_warning(tmp_path: Path) -> None:
    """latest_checkpoint returns the newest intact checkpoint and names the damage of newer ones.

    The files of five checkpoints are damaged one after the other, newest first.
    """
    assert latest_checkpoint(tmp_path / "absent") is None
    student, optimizer = trained(seed=0, num_updates=1)
    paths = []
    for _ in range(5):
        paths.append(save(tmp_path, student, optimizer))
        train(student, optimizer, 1)
    (tmp_path / ".update_000010.partial").mkdir()
    (tmp_path / "update_last").write_text("")
    assert latest_checkpoint(tmp_path) == paths[4]
    flip(paths[4] / "config.json")
    expect_latest(tmp_path, paths[3], "update_000005/config.json has other bytes than were written")
    (paths[4] / "config.json").unlink()
    expect_latest(tmp_path, paths[3], "update_000005/config.json is missing or not of its .*")
    (paths[3] / "optimizer.safetensors").unlink()
    with (paths[2] / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    expect_latest(tmp_path, paths[1], "update_000005/config.json is missing or not of its .*")
    (tmp_path / "update_000009").write_text("a file")
    expect_latest(tmp_path, paths[1], "update_000009/manifest.json is missing or damaged")
    (paths[1] / "manifest.json").write_text("[" * 100_000)
    expect_latest(tmp_path, paths[0], "update_000009/manifest.json is missing or damaged")
    (paths[0] / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="update_000009/manifest.json is .*, and no other"):
        latest_checkpoint(tmp_path)
    for path in paths:
        with pytest.raises(ValueError, match=f"checkpoint: .*{path.name}/.*; use an older one"):
            load_checkpoint(path, student, optimizer)


def expect_latest(folder: Path, path: Path, message: str) -> None:
    """Asserts which checkpoint is the latest, and what is wrong with the newer ones."""
    with pytest.warns(UserWarning, match=f"checkpoint: .*{message}; passed over for {path.name}"):
        assert latest_checkpoint(folder) == path


def flip(path: Path) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["a file", "a broken link", "a link to itself"])
def test_checkpoints_that_are_no_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    if kind == "a file":
        folder.write_text("")
    else:
        folder.symlink_to(folder if kind == "a link to itself" else tmp_path / "gone")
    with pytest.raises(ValueError, match="must be a folder, got a file or a broken link"):
        latest_checkpoint(folder)


def test_more_than_a_million_updates_sort_by_number(tmp_path: Path) -> None:
    """Checkpoints are ordered by number, not by name, which gets longer at a million updates."""
    student, optimizer = trained(seed=0, num_updates=1)
    for num_updates in (999_999, 1_000_000):
        optimizer.num_updates = num_updates
        path = save(tmp_path, student, optimizer)
    assert latest_checkpoint(tmp_path) == path == tmp_path / "update_1000000"


def test_saving_one_update_twice_replaces(tmp_path: Path) -> None:
    """A second save of an update replaces the first, by two renames.

    If a process stops between the renames, the older one is still found under another name.
    """
    student, optimizer = trained(seed=0, num_updates=2)
    path = save(tmp_path, student, optimizer)
    state = {"batch": 4}
    assert path == save_checkpoint(
        tmp_path, student=student, optimizer=optimizer, trainer_state=state, tokenizer_from=None
    )
    assert load_checkpoint(path, student, optimizer) == state
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    path.rename(tmp_path / "update_000002.replaced")  # as after the first rename
    assert latest_checkpoint(tmp_path) == tmp_path / "update_000002.replaced"
    assert save(tmp_path, student, optimizer) == latest_checkpoint(tmp_path) == path
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_prune_keeps_the_latest_intact_ones(tmp_path: Path) -> None:
    """Pruning removes older intact checkpoints; it leaves damaged ones and other files alone.

    A checkpoint newer than the given one, which the run did not continue from, stays as well.
    """
    student, optimizer = trained(seed=0, num_updates=1)
    paths = []
    for _ in range(6):
        paths.append(save(tmp_path, student, optimizer))
        train(student, optimizer, 1)
    (tmp_path / "update_000001.replaced").mkdir()  # a removal that was interrupted
    (tmp_path / "notes.txt").write_text("mine")
    (paths[2] / "trainer_state.json").unlink()
    flip(paths[5] / "model.safetensors")  # the run went on from an older one
    prune_checkpoints(paths[4], keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "notes.txt",
        "update_000003",
        "update_000004",
        "update_000005",
        "update_000006",
    }
    prune_checkpoints(paths[4], keep=1)
    assert {path.name for path in tmp_path.iterdir()} == names - {"update_000004"}
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        prune_checkpoints(paths[4], keep=0)


def test_prune_removes_a_link_but_not_its_target(tmp_path: Path) -> None:
    student, optimizer = trained(seed=0, num_updates=1)
    elsewhere = save(tmp_path / "other", student, optimizer)
    train(student, optimizer, 1)
    newest = save(tmp_path / "checkpoints", student, optimizer)
    (newest.parent / elsewhere.name).symlink_to(elsewhere)
    prune_checkpoints(newest, keep=1)
    assert [path.name for path in newest.parent.iterdir()] == [newest.name]
    assert latest_checkpoint(elsewhere.parent) == elsewhere


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "got num_layers 2 instead of 3"),
        ({"tie_word_embeddings": False}, "got tie_word_embeddings True instead of False"),
        ({"rope_theta": 5000.0}, "got rope_theta 10000.0 instead of 5000.0"),
        (
            {"dtype": torch.bfloat16},
            "low_bits.embed.weight first; .* its own model and student.dtype",
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused(
    tmp_path: Path, changes: dict, message: str
) -> None:
    """A checkpoint of another model changes no weight and no moment, and the error is one line."""
    path = save(tmp_path, *trained(seed=0, num_updates=1))
    student = make_student(seed=1, **changes)
    optimizer = Optimizer(student, lr=1e-2)
    old_bits = bits(student, optimizer)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path, student, optimizer)
    assert "\n" not in str(caught.value)
    assert_same_bits(bits(student, optimizer), old_bits)


def test_flipped_bit_is_refused(tmp_path: Path) -> None:
    """One flipped bit in a large file is found by its SHA-256; flipped back, the file loads."""
    student, optimizer = trained(seed=0, num_updates=1)
    path = save(tmp_path, student, optimizer)
    for name in ("model.safetensors", "optimizer.safetensors"):
        content = bytearray((path / name).read_bytes())
        content[-5] ^= 1
        (path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} has other bytes .*; use an older one"):
            load_checkpoint(path, student, optimizer)
        content[-5] ^= 1
        (path / name).write_bytes(content)
    load_checkpoint(path, student, optimizer)


def test_non_json_state_is_refused_before_writing(tmp_path: Path) -> None:
    student, optimizer = trained(seed=0, num_updates=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(
            tmp_path,
            student=student,
            optimizer=optimizer,
            trainer_state={"x": {1}},
            tokenizer_from=None,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 100_000])  # fails in the weights, in the moments
def test_full_disk_leaves_older_checkpoints(tmp_path: Path, limit: int) -> None:
    """A save that runs out of space leaves nothing, and the checkpoint before it loads.

    A limit on the size of a file stands in for a full disk.
    """
    student, optimizer = trained(seed=0, num_updates=1)
    path = save(tmp_path, student, optimizer)
    sizes = [
        (path / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors")
    ]
    assert 1000 < sizes[0] < 100_000 < sizes[1]
    train(student, optimizer, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            RuntimeError, match=r"update_000002 could not be written .* free disk space"
        ):
            save(tmp_path, student, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    load_checkpoint(path, student, optimizer)


KILLED = """
import os, signal, sys
from pathlib import Path
from socpo_fast import files
from socpo_fast.training import checkpoint
from tests.training.test_checkpoint import save, trained

def killing(original):
    def wrapper(*args):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    return wrapper

for step in map(int, sys.argv[2:]):
    folder, calls = Path(sys.argv[1]) / str(step), 0
    save(folder, *trained(seed=0, num_updates=1))
    if os.fork() == 0:
        points_of_death = (checkpoint, "_fingerprint"), (files, "sync"), (files, "replace_folder")
        for module, name in points_of_death:
            setattr(module, name, killing(getattr(module, name)))
        save(folder, *trained(seed=0, num_updates=2))
        os._exit(0)
    print(os.WTERMSIG(os.wait()[1]))
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """SIGKILL at any moment of a save leaves an intact checkpoint: the old one, or the new one.

    The numbers are calls of the patched functions: while weights are written, before the manifest,
    during the sync, at the rename, and after it. Only after the rename the new one is found.
    """
    first = "update_000001"
    second = "update_000002"
    names = {2: first, 4: first, 7: first, 10: first, 16: first, 17: second}
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, names)]
    # The script forks, and a child of fork has no thread pool.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    child = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert child.stdout.split() == [str(int(signal.SIGKILL))] * len(names)
    for step, name in names.items():
        folder = tmp_path / str(step)
        latest = latest_checkpoint(folder)
        assert latest == folder / name
        student, optimizer = trained(seed=3, num_updates=0)
        assert load_checkpoint(latest, student, optimizer) == STATE
        train(student, optimizer, 2)
        save(folder, student, optimizer)  # works in spite of leftovers, and removes them
        assert not list(folder.glob(".*"))
