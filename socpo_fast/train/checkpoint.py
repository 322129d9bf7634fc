"""Checkpoints: a complete Hugging Face folder plus what a run needs to go on bit for bit.

    checkpoints/update_000010/   config.json, weights, tokenizer files      model.save_student
                                 optimizer.safetensors                      moments and low bits, by
                                 name trainer_state.json                         optimizer counts;
                                 whatever the trainer gave manifest.json
                                 size and SHA-256 of each; written last

Read top-down: save_checkpoint, latest_checkpoint, damage_of, load_checkpoint, prune_checkpoints. A
checkpoint is made in a hidden sibling, synced to disk and renamed, so that a folder of its name is
whole whenever the machine stops. What damages it afterwards is found by the manifest and told. One
process writes to a checkpoints folder at a time.
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
from socpo_fast.train.optimizer import Optimizer

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"
NAME = re.compile(
    r"update_(\d{6,})(\.replaced)?"
)  # .replaced: an older one of the same update, about to go


def save_checkpoint(
    folder: str | Path,
    *,
    student: Decoder,
    optimizer: Optimizer,
    trainer_state: Mapping[str, Any],
    tokenizer_from: str | Path | None,
) -> Path:
    """Write folder/update_NNNNNN, N the optimizer's updates so far; one that is there already is
    replaced.

    Args:
        folder:         the run's checkpoints folder; made if missing.
        trainer_state:  JSON values only; load_checkpoint gives them back.
        tokenizer_from: a Hugging Face folder whose tokenizer files go along; None: none do.

    Returns:
        the checkpoint's path, once it is on the disk.

    Raises:
        ValueError, TypeError: trainer_state is not JSON, or what save_student refuses.
        RunFailed:             the disk is full or fails; older checkpoints are as they were.

    Memory: on a CPU none beyond the parameters. Bitwise: loading it gives back the same bits.
    """
    folder = Path(folder)
    # Before anything is written: what is not JSON fails here.
    state_text = json.dumps(
        {"optimizer": optimizer.state_counts(), "trainer": dict(trainer_state)}, indent=1
    )
    target = checkpoint_path(folder, optimizer.num_updates)
    try:
        for leftover in folder.glob(
            ".*update_*"
        ):  # an interrupted process may have filled the disk
            shutil.rmtree(leftover, ignore_errors=True)
        with new_folder(target) as partial:
            save_student(student, partial, tokenizer_from=tokenizer_from)
            save_file(
                {name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()},
                partial / OPTIMIZER,
            )
            (partial / STATE).write_text(state_text, encoding="utf-8")
            manifest = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        # What an earlier save left when it stopped between two renames.
        remove(target.with_name(target.name + REPLACED))
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"checkpoint: {target} could not be written ({error}); free disk space or lower "
            "run.keep_checkpoints, "
            "older checkpoints are intact"
        ) from error
    return target


def checkpoint_path(folder: Path, num_updates: int) -> Path:
    """Where the checkpoint after so many updates lies."""
    return folder / f"update_{num_updates:06d}"


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of most updates that is whole to the byte; None where there is none at all.

    A warning names the first damaged file of newer ones.

    Raises:
        ValueError: checkpoints are there, and each is damaged; or `folder` is no folder.
    """
    damages = []
    for path in reversed(_checkpoints(folder)):
        if damage := damage_of(path):
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


def damage_of(path: Path, *, thorough: bool = True) -> str | None:
    """What is wrong with a checkpoint, the file first; None: nothing is.

    Whole means: every file of the manifest is as it was written, by its hash, or where not
    `thorough` by its size.
    """
    manifest = _manifest(path)
    if STATE not in manifest:
        return f"{path / MANIFEST} is missing or damaged"
    for name, saved in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != saved["bytes"]:
            return f"{file} is missing or not of its {saved['bytes']} bytes"
        if thorough and _fingerprint(file) != saved:
            return f"{file} has other bytes than were written"
    return None


def check_whole(path: Path) -> None:
    """Refuse a damaged checkpoint; a folder without a manifest is another one's business."""
    if (path / MANIFEST).is_file() and (damage := damage_of(path)):
        raise ValueError(f"checkpoint: {damage}; use another one")


def load_checkpoint(
    path: str | Path, student: Decoder, optimizer: Optimizer, *, thorough: bool = True
) -> dict[str, Any]:
    """Copy a checkpoint into a student and its optimizer; storage stays where it is.

    Args:
        path:      what save_checkpoint or latest_checkpoint returned.
        student:   of the same config; whatever weights it has are overwritten.
        optimizer: this student's.
        thorough:  files are compared by their hash; False where damage_of has just done that.

    Returns:
        the trainer_state that was saved.

    Raises:
        ValueError: no checkpoint, a damaged one, or of another model; nothing is overwritten then.

    Memory: one more copy of parameters and moments while loading. Bitwise: the same bits as saved.
    """
    path = Path(path)
    if damage := damage_of(path, thorough=thorough):
        raise ValueError(f"checkpoint: {damage}; use an older one")
    state = json.loads((path / STATE).read_text())
    stored = load_student(
        path, dtype=str(student.lm_head.weight.dtype).removeprefix("torch."), device="cpu"
    )
    for field in fields(student.config):
        own = getattr(student.config, field.name)
        other = getattr(stored.config, field.name)
        if field.compare and own != other:
            raise ValueError(
                f"checkpoint: {path} must be of this student's model, got {field.name} {other} "
                f"instead of {own}; "
                "start a new run or give the student it was made from"
            )
    optimizer.load_state(load_file(path / OPTIMIZER), state["optimizer"])
    with torch.no_grad():
        for param, saved_param in zip(student.parameters(), stored.parameters(), strict=True):
            param.copy_(saved_param)
    return state["trainer"]


def prune_checkpoints(newest: Path, keep: int, best: int | None = None) -> None:
    """Remove what is older than the `keep` whole checkpoints up to `newest`, which was just saved.

    Damaged ones stay, and so do the one of update `best` and whatever is newer. Whole means here
    that every file has its size: nothing is read.
    """
    if keep < 1:
        raise ValueError(
            f"checkpoint: keep must be >= 1, got {keep}; the latest checkpoint is never removed"
        )
    checkpoints = _checkpoints(newest.parent)
    until_newest = checkpoints[: checkpoints.index(newest) + 1]
    kept = [path for path in until_newest if damage_of(path, thorough=False) is None][-keep:]
    stays = None if best is None else checkpoint_path(newest.parent, best)
    for path in until_newest[: until_newest.index(kept[0])]:
        # A replaced one that lacks something is no damage: a process stopped while it removed that.
        if path != stays and (
            path.name.endswith(REPLACED) or damage_of(path, thorough=False) is None
        ):
            # Hidden first, so that half a removal is not taken for damage; the next save removes
            # the rest.
            remove(path.rename(path.with_name(f".{path.name}")))


def _checkpoints(folder: str | Path) -> list[Path]:
    """What is named like a checkpoint, oldest first; a replaced one comes before its successor."""
    folder = Path(folder)
    if not folder.is_dir() and os.path.lexists(folder):
        raise ValueError(f"checkpoint: {folder} must be a folder, got a file or a broken link")
    paths = [*folder.iterdir()] if folder.is_dir() else []
    found = [(match, path) for path in paths if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), not pair[0][2]))]


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}; empty when it is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {
            name: {"bytes": saved["bytes"], "sha256": saved["sha256"]}
            for name, saved in manifest.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
