"""Says where a run that has ended left its weights, and what to type next."""

import shlex
from pathlib import Path
from typing import Any

from socpo_fast.config import Config
from socpo_fast.registries import LR_SCHEDULES
from socpo_fast.training.checkpoint import checkpoint_path


def run_end(
    config: Config,
    *,
    best: dict[str, Any] | None,
    last: Path | None,
    goes_on_to: int | None,
    is_evaluated: bool,
    is_loadable: bool,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (lines of labels and paths, commands) for the card of a run.

    Args:
        config:       of the run.
        best:         the best evaluation (RunState.best), whose checkpoint is kept.
        last:         the checkpoint of the last save.
        goes_on_to:   more batches than a finished run has made; None for one that ended early.
                      Where the learning rate's schedule depends on their number, going on takes
                      consent, so no command is named.
        is_evaluated: whether there are held-out questions.
        is_loadable:  whether the settings name all parts of the run, so that a command can load
                      them. What came from Python has no such name.
    """
    folder = config.folder
    paths = {}
    if best is not None:
        paths["best"] = checkpoint_path(folder / "checkpoints", best["update"])
    if last is not None and last.name not in [path.name for path in paths.values()]:
        paths["last"] = last
    commands = [command("report", folder)]
    if is_loadable:
        if paths and is_evaluated:
            options = ["--checkpoint", "best"] if "best" in paths else []
            commands.insert(0, command("eval", "--config", folder / "config.toml", *options))
        more = [] if goes_on_to is None else ["--run.num_batches", goes_on_to]
        if not more or LR_SCHEDULES[config.train.lr_schedule] is None:
            commands.append(command("train", "--config", folder / "config.toml", *more))
    return [(f"{name} weights", str(path)) for name, path in paths.items()], commands


def command(*words: object) -> str:
    """Returns a command of `socpo` as one types it."""
    return shlex.join(["socpo", *map(str, words)])
