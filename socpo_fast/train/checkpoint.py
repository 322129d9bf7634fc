"""Checkpoints: a complete Hugging Face folder plus what a run needs to go on bit for bit.

    checkpoints/update_000010/   config.json, weights, tokenizer files      model.save_student
                                 optimizer.safetensors                      moments, by parameter name
                                 trainer_state.json                         optimizer counts; whatever the trainer gave
                                 manifest.json                              size and SHA-256 of each; written last

Read top-down: save_checkpoint, latest_checkpoint, load_checkpoint, prune_checkpoints. A checkpoint is made in a hidden
sibling, synced to disk and renamed, so that a folder of its name is whole whenever the machine stops. One process
writes to a checkpoints folder at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from socpo_fast.files import REPLACED, RunFailed, new_folder
from socpo_fast.model.decoder import Decoder
from socpo_fast.model.weights import load_student, save_student
from socpo_fast.train.optimizer import Optimizer

OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "trainer_state.json", "manifest.json"
NAME = re.compile(r"update_(\d{6,})(\.replaced)?")  # .replaced: an older one of the same update, about to go


def save_checkpoint(
    folder: str | Path,
    *,
    student: Decoder,
    optimizer: Optimizer,
    trainer_state: Mapping[str, Any],
    tokenizer_from: str | Path | None,
) -> Path:
    """Write folder/update_NNNNNN, N the optimizer's updates so far; one that is there already is replaced.

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
    state = {"optimizer": optimizer.state_counts(), "trainer": dict(trainer_state)}
    state_text = json.dumps(state, indent=1)  # before anything is written: what is not JSON fails here
    target = folder / f"update_{optimizer.num_updates:06d}"
    try:
        _remove_leftovers(folder)  # an interrupted process may have filled the disk
        with new_folder(target) as partial:
            save_student(student, partial, tokenizer_from=tokenizer_from)
            moments = {name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()}
            save_file(moments, partial / OPTIMIZER)
            (partial / STATE).write_text(state_text, encoding="utf-8")
            manifest = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _remove_replaced(target)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"checkpoint: {target} could not be written ({error}); free disk space or lower run.keep_checkpoints, "
            "older checkpoints are intact"
        ) from error
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of most updates; hidden siblings and folders that lack a file do not count."""
    complete = [path for path in _checkpoints(folder) if _is_complete(path)]
    return complete[-1] if complete else None


def load_checkpoint(path: str | Path, student: Decoder, optimizer: Optimizer) -> dict[str, Any]:
    """Copy a checkpoint into a student and its optimizer; storage stays where it is.

    Args:
        path:      what save_checkpoint or latest_checkpoint returned.
        student:   of the same config; whatever weights it has are overwritten.
        optimizer: this student's.

    Returns:
        the trainer_state that was saved.

    Raises:
        ValueError: not a checkpoint, incomplete, damaged, or of another model; nothing has been overwritten then.

    Memory: one more copy of parameters and moments while loading. Bitwise: the same bits as saved.
    """
    path = Path(path)
    if not _is_complete(path):
        raise ValueError(f"checkpoint: {path} must be complete, got a missing or shortened file; use an older one")
    for name, saved in _manifest(path).items():
        if _fingerprint(path / name) != saved:
            raise ValueError(f"checkpoint: {path / name} must be as it was written, got other bytes; use an older one")
    state = json.loads((path / STATE).read_text())
    dtype = str(student.lm_head.weight.dtype).removeprefix("torch.")
    stored = load_student(path, dtype=dtype, device="cpu")
    for field in fields(student.config):
        own, other = getattr(student.config, field.name), getattr(stored.config, field.name)
        if field.compare and own != other:
            raise ValueError(
                f"checkpoint: {path} must be of this student's model, got {field.name} {other} instead of {own}; "
                "start a new run or give the student it was made from"
            )
    optimizer.load_state(load_file(path / OPTIMIZER), state["optimizer"])
    with torch.no_grad():
        for param, saved_param in zip(student.parameters(), stored.parameters(), strict=True):
            param.copy_(saved_param)
    return state["trainer"]


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Remove all but the latest `keep` complete checkpoints, and what interrupted writes left behind."""
    if keep < 1:
        raise ValueError(f"checkpoint: keep must be >= 1, got {keep}; the latest checkpoint is never removed")
    checkpoints = _checkpoints(folder)
    kept = [path for path in checkpoints if _is_complete(path)][-keep:]
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path)
    _remove_leftovers(folder)


def _checkpoints(folder: str | Path) -> list[Path]:
    """Folders named like checkpoints, oldest first; a replaced one comes before its successor."""
    found = []
    for path in Path(folder).glob("update_*"):
        match = NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found)]


def _remove_leftovers(folder: str | Path) -> None:
    """Hidden siblings of writes that were interrupted."""
    for path in Path(folder).glob(".*update_*"):
        shutil.rmtree(path, ignore_errors=True)


def _is_complete(path: Path) -> bool:
    """Every file of the manifest is there in full length."""
    manifest = _manifest(path)
    return STATE in manifest and all(
        (path / name).is_file() and (path / name).stat().st_size == saved["bytes"] for name, saved in manifest.items()
    )


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}; empty when it is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {name: {"bytes": saved["bytes"], "sha256": saved["sha256"]} for name, saved in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remove_replaced(target: Path) -> None:
    """What an earlier save left under its second name when it stopped between two renames."""
    replaced = target.with_name(target.name + REPLACED)
    if replaced.exists():
        shutil.rmtree(replaced)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
