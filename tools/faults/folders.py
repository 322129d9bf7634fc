"""Damages run folders: the next start resumes, or names the damaged file and changes nothing.

Read folders, then its four promises. All of them damage copies of one finished run, "whole".
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tools.faults.run import Faults, Promise, differences

KEPT = {"run__num_batches": 4, "run__checkpoint_every_updates": 2, "run__keep_checkpoints": 9}


def folders(faults: Faults) -> list[Promise]:
    """Checks the promises about run folders."""
    outcome = faults.train("whole", **KEPT)
    assert outcome.code == 0, outcome.err
    return [damaged_last(faults), damaged_all(faults), in_use(faults), changed(faults)]


def copy_of(faults: Faults, name: str, num_checkpoints: int) -> Path:
    """Copies the finished run, with only its first `num_checkpoints` checkpoints."""
    folder = faults.folder / name
    shutil.copytree(faults.folder / "whole", folder)
    for path in sorted((folder / "checkpoints").iterdir())[num_checkpoints:]:
        shutil.rmtree(path)
    return folder


def flip(path: Path, faults: Faults) -> None:
    """Flips one random bit."""
    content = bytearray(path.read_bytes())
    content[faults.random.randrange(len(content))] ^= 1 << faults.random.randrange(8)
    path.write_bytes(content)


def cut(path: Path, faults: Faults) -> None:
    """Truncates at a random length."""
    os.truncate(path, faults.random.randrange(path.stat().st_size))


def gone(path: Path, _faults: Faults) -> None:
    path.unlink()


def made_a_folder(path: Path, _faults: Faults) -> None:
    path.unlink()
    path.mkdir()


def made_a_link_to_itself(path: Path, _faults: Faults) -> None:
    path.unlink()
    path.symlink_to(path.name)


# flip and cut leave a readable file; a manifest with hashes must notice them all the same.
DAMAGES: tuple[Callable[[Path, Faults], None], ...] = (
    flip,
    cut,
    gone,
    made_a_folder,
    made_a_link_to_itself,
)


def cases(faults: Faults) -> list[tuple[str, Callable[[Path, Faults], None]]]:
    """Draws (file of a checkpoint, damage to it) pairs, new ones in each call."""
    files = sorted(p.name for p in (faults.folder / "whole/checkpoints/update_000002").iterdir())
    all_cases = [(name, damage) for name in files for damage in DAMAGES]
    return faults.random.sample(all_cases, 2 if faults.short else 15)


def damaged_last(faults: Faults) -> Promise:
    """Damages the newest checkpoint: the run must resume from the one before, bitwise equal."""
    promise = Promise(
        "A damaged checkpoint is passed over with a warning that names its file; the run ends as "
        "if nothing had happened",
        "tests/test_run_folder.py",
    )
    for idx, (name, damage) in enumerate(cases(faults)):
        folder = copy_of(faults, f"damaged_{idx}", 3)
        damage(max((folder / "checkpoints").iterdir()) / name, faults)
        outcome = faults.train(folder.name, **KEPT)
        # The first fault is reported: what comes after it usually follows from it.
        fault = outcome.must_end(0, saying="passed over for update_")
        fault = fault or (None if name in outcome.err else f"{name} is not named: {outcome.err}")
        fault = fault or differences(folder, faults.folder / "whole")
        promise.check(f"{name} {damage.__name__}", fault, faults.audit(folder.name, **KEPT))
        shutil.rmtree(folder)
    return promise


def damaged_all(faults: Faults) -> Promise:
    """Damages the only checkpoint: the start must be refused, and the folder stay as it is."""
    promise = Promise(
        "A start that finds no whole checkpoint where there were some is refused in one line, and "
        "not a byte of the folder changes",
        "tests/test_run_folder.py",
    )
    for idx, (name, damage) in enumerate(cases(faults)):
        folder = copy_of(faults, f"lost_{idx}", 1)
        # copy_of keeps the first one only.
        (checkpoint,) = (folder / "checkpoints").glob("update_*")
        damage(checkpoint / name, faults)
        # After the damage: the refused start must not change even the damaged file.
        old_contents = contents(folder)
        outcome = faults.train(folder.name, **KEPT)
        fault = outcome.must_end(2, saying=name)
        fault = fault or (None if contents(folder) == old_contents else "the folder has changed")
        promise.check(f"{name} {damage.__name__}", fault)
        shutil.rmtree(folder)
    return promise


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file but the lock, which a start empties again."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def in_use(faults: Faults) -> Promise:
    """Starts a second run in a folder that a running process holds."""
    promise = Promise(
        "One process a run folder: another is refused with the holder's number",
        "tests/test_run_folder.py",
    )
    for idx in range(1 if faults.short else 3):
        run = f"in_use_{idx}"
        changes = {"run__num_batches": 200}
        holder, _ = faults.start_and_see(run, **changes)
        outcome = faults.train(run, **changes)
        message = f"is in use by process {holder.pid}"
        promise.check(f"a second process, {idx}", outcome.must_end(2, saying=message))
        holder.kill()
        holder.communicate()
    return promise


def changed(faults: Faults) -> Promise:
    """Resumes with other settings or data: refused first, then accepted with consent."""
    promise = Promise(
        "Changed settings and changed data are listed and need consent; what held stays on record",
        "tests/test_run_changes.py",
    )
    cases = {
        "train.lr": {"train__lr": 1e-3},
        "loss.clip_low": {"loss__clip_low": 0.1},
        "rollout.temperature": {"rollout__temperature": 0.7},
        "questions of data.train": {"data__builtin_train_questions": 63},
    }
    # Each case is refused without consent, then accepted with it.
    for name, change in list(cases.items())[: 1 if faults.short else None]:
        folder = copy_of(faults, f"changed_{promise.injected}", 2)
        refused = faults.train(folder.name, **KEPT | change)
        fault = refused.must_end(2, saying=name)
        consent = KEPT | change | {"run__accept_changes": True}
        ended = faults.train(folder.name, **consent)
        fault = fault or ended.must_end(0, saying=f"changed from update 4 on: {name}")
        record = (folder / "config.toml").read_text(encoding="utf-8")
        is_kept = "until_update = 4" in record and name in record
        promise.check(name, fault, None if is_kept else "config.toml does not tell of it")
    return promise
