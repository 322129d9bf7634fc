"""Saves and loads checkpoints: a Hugging Face folder plus all that a run needs to resume bitwise.

    checkpoints/
        update_000010/
            config.json, weights, tokenizer files   written by model.save_student
            optimizer.safetensors                   moments and low halves of masters, by name
            trainer_state.json                      optimizer counts, and the trainer's own state
            manifest.json                           size and SHA-256 of each file; written last

Read top-down: save_checkpoint, latest_checkpoint, find_damage, load_checkpoint, prune_checkpoints.
A checkpoint is written to a hidden sibling folder, synced to disk and then renamed. A folder with
the final name is therefore complete, whenever the machine stops. Later damage is detected with the
manifest and reported. Only one process writes to a checkpoints folder at a time.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from socpo_fast.files import REPLACED, RunFailed, new_folder, remove
from socpo_fast.model.decoder import Decoder
from socpo_fast.model.weights import load_student, save_student
from socpo_fast.training.optimizer import Optimizer

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"
# .replaced marks an older checkpoint of the same update, which is about to be removed.
NAME = re.compile(r"update_(\d{6,})(\.replaced)?")


def save_checkpoint(
    folder: str | Path,
    *,
    student: Decoder,
    optimizer: Optimizer,
    trainer_state: Mapping[str, Any],
    tokenizer_from: str | Path | None,
) -> Path:
    """Writes folder/update_NNNNNN, where N is the number of updates; replaces an existing one.

    Args:
        folder:         the run's checkpoints folder; created if missing.
        trainer_state:  JSON values only; load_checkpoint returns them.
        tokenizer_from: a Hugging Face folder whose tokenizer files are copied; None: none are.

    Returns:
        the checkpoint's path, once it is on the disk.

    Raises:
        ValueError, TypeError: trainer_state is not JSON, or save_student refuses.
        RunFailed:             the disk is full or fails; older checkpoints are unchanged.

    Memory: on a CPU none beyond the parameters. Bitwise: loading it gives back the same bits.
    """
    folder = Path(folder)
    # First of all, so that a state that is not JSON fails before anything is written.
    state_text = json.dumps(
        {"optimizer": optimizer.state_counts(), "trainer": dict(trainer_state)}, indent=1
    )
    target = checkpoint_path(folder, optimizer.num_updates)
    try:
        # Half-written folders of an interrupted process may be what fills the disk.
        for leftover in folder.glob(".*update_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with new_folder(target) as partial:
            save_student(student, partial, tokenizer_from=tokenizer_from)
            save_file(
                {name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()},
                partial / OPTIMIZER,
            )
            (partial / STATE).write_text(state_text, encoding="utf-8")
            manifest = {
                str(path.relative_to(partial)): _fingerprint(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        # An earlier save may have left it, when the process stopped between its two renames.
        remove(target.with_name(target.name + REPLACED))
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"checkpoint: {target} could not be written ({error}); free disk space or lower "
            "run.keep_checkpoints, "
            "older checkpoints are intact"
        ) from error
    return target


def checkpoint_path(folder: Path, num_updates: int) -> Path:
    """Returns the path of the checkpoint after num_updates updates."""
    return folder / f"update_{num_updates:06d}"


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the undamaged checkpoint with the most updates; None if there are no checkpoints.

    Every byte is checked. A warning names a damaged file of the newer checkpoints passed over.

    Raises:
        ValueError: all checkpoints are damaged, or `folder` is not a folder.
    """
    damages = []
    for path in reversed(_checkpoints(folder)):
        if damage := find_damage(path):
            damages.append(damage)
            continue
        if damages:
            warnings.warn(
                f"checkpoint: {damages[0]}; passed over for {path.name}, which is whole",
                stacklevel=2,
            )
        return path
    if damages:
        raise ValueError(
            f"checkpoint: {damages[0]}, and no other checkpoint is whole; "
            "bring it back, or set run.name to begin a new run"
        )
    return None


def find_damage(path: Path, *, thorough: bool = True) -> str | None:
    """Returns what is wrong with a checkpoint, the file's name first; None if it is whole.

    Whole means that every file of the manifest is as it was written. `thorough` compares hashes;
    otherwise only the sizes are compared, and nothing is read.
    """
    manifest = _manifest(path)
    if STATE not in manifest:
        return f"{path / MANIFEST} is missing or damaged"
    for name, recorded in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != recorded["bytes"]:
            return f"{file} is missing or not of its {recorded['bytes']} bytes"
        if thorough and _fingerprint(file) != recorded:
            return f"{file} has other bytes than were written"
    return None


def check_undamaged(path: Path) -> None:
    """Refuses a damaged checkpoint; lets any folder without a manifest pass, such as a download."""
    if (path / MANIFEST).is_file() and (damage := find_damage(path)):
        raise ValueError(f"checkpoint: {damage}; use another one")


def load_checkpoint(
    path: str | Path, student: Decoder, optimizer: Optimizer, *, thorough: bool = True
) -> dict[str, Any]:
    """Copies a checkpoint into a student and its optimizer; their storage does not move.

    Args:
        path:      as returned by save_checkpoint or latest_checkpoint.
        student:   of the same config; its weights are overwritten.
        optimizer: of this student.
        thorough:  compare files by their hash. False is for callers that have just done so.

    Returns:
        the trainer_state that was saved.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another model. Nothing is overwritten.

    Memory: one more copy of parameters and moments while loading. Bitwise: the same bits as saved.
    """
    path = Path(path)
    if damage := find_damage(path, thorough=thorough):
        raise ValueError(f"checkpoint: {damage}; use an older one")
    state = json.loads((path / STATE).read_text())
    stored = load_student(
        path, dtype=str(student.lm_head.weight.dtype).removeprefix("torch."), device="cpu"
    )
    for field in fields(student.config):
        expected = getattr(student.config, field.name)
        actual = getattr(stored.config, field.name)
        if field.compare and expected != actual:
            raise ValueError(
                f"checkpoint: {path} must be of this student's model, got {field.name} {actual} "
                f"instead of {expected}; "
                "start a new run or give the student it was made from"
            )
    # The optimizer first: it may still refuse, and it must do so before the weights change.
    optimizer.load_state(load_file(path / OPTIMIZER), state["optimizer"])
    with torch.no_grad():
        for param, saved_param in zip(student.parameters(), stored.parameters(), strict=True):
            param.copy_(saved_param)
    return state["trainer"]


def prune_checkpoints(newest: Path, keep: int, best: int | None = None) -> None:
    """Removes checkpoints older than the last `keep` whole ones; `newest` was just saved.

    Damaged checkpoints stay, and so do the checkpoint of update `best` and any newer than `newest`.
    A checkpoint counts as whole here if every file has its size: nothing is read.
    """
    if keep < 1:
        raise ValueError(
            f"checkpoint: keep must be >= 1, got {keep}; the latest checkpoint is never removed"
        )
    checkpoints = _checkpoints(newest.parent)
    until_newest = checkpoints[: checkpoints.index(newest) + 1]
    to_keep = [path for path in until_newest if find_damage(path, thorough=False) is None][-keep:]
    best_path = None if best is None else checkpoint_path(newest.parent, best)
    for path in until_newest[: until_newest.index(to_keep[0])]:
        # An incomplete .replaced folder is not damage: a process stopped while it removed it.
        if path != best_path and (
            path.name.endswith(REPLACED) or find_damage(path, thorough=False) is None
        ):
            # Renamed to a hidden name first, so that an interrupted removal does not look like a
            # damaged checkpoint. The next save removes what is left.
            remove(path.rename(path.with_name(f".{path.name}")))


def _checkpoints(folder: str | Path) -> list[Path]:
    """Returns the paths named like a checkpoint, oldest first, .replaced before its successor."""
    folder = Path(folder)
    if not folder.is_dir() and os.path.lexists(folder):
        raise ValueError(f"checkpoint: {folder} must be a folder, got a file or a broken link")
    paths = [*folder.iterdir()] if folder.is_dir() else []
    matches = [(match, path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(matches, key=lambda pair: (int(pair[0][1]), not pair[0][2]))]


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the manifest: file name -> {"bytes", "sha256"}; empty if it is missing or damaged."""
    # Damage can turn the file into any JSON at all, or none, so every way in which reading it can
    # fail means the same: damaged. The caller names the file.
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in manifest.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _fingerprint(path: Path) -> dict[str, Any]:
    """Returns a file's entry in the manifest."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
