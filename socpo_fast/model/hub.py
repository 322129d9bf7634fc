"""Finds the folder of a model, which may be one of the Hugging Face hub. Read model_folder.

Downloads go through huggingface_hub, so its settings apply: HF_HOME (where the cache lies),
HF_TOKEN (for private models) and HF_HUB_OFFLINE (only the cache). Fetched are the files that our
loaders read, safetensors and text, and never pickle or code.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from socpo_fast.config import Config, LocalTeacherConfig, Section, StudentConfig
from socpo_fast.model.weights import INDEX, TOKENIZER_FILES

# As in git, no part of a revision is empty or begins with a dot: "..", which leaves the cache.
HUB_NAME = re.compile(
    r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?", re.ASCII
)
TEXTS = ["config.json", "adapter_config.json", INDEX, *TOKENIZER_FILES]
WEIGHTS = "model*.safetensors"
# Error of huggingface_hub -> what the name must be, and what to do; the first that fits.
REFUSALS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        GatedRepoError,
        "a model that you may read",
        "accept its terms on the hub, and set HF_TOKEN in the environment",
    ),
    (
        RepositoryNotFoundError,
        "a folder, or a model of the hub",
        "check the name; if it is private, set HF_TOKEN in the environment",
    ),
    (RevisionNotFoundError, "OWNER/NAME@REVISION of the hub", "check the revision"),
    (HFValidationError, "a folder, or OWNER/NAME of the hub", "check the name"),
    (
        LocalEntryNotFoundError,
        "in the cache, {cache}, where the hub is out of reach",
        "check the name, the network and HF_HUB_OFFLINE",
    ),
    (
        Exception,
        "a model that can be downloaded to {cache}",
        "check the network and the disk, and start again",
    ),
)
# Folders that this process has fetched, by repository, commit and whether they have weights. What a
# commit names never changes, so it is not asked for again.
_fetched: dict[tuple[str, str, bool], Path] = {}


def model_folder(setting: str, name: str, *, weights: bool = True, quiet: bool = False) -> Path:
    """Returns the folder of a model, which is downloaded if need be.

    Args:
        setting: what names the model; errors begin with it.
        name:    a folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub. A folder that is there
                 goes before a model of the hub.
        weights: False fetches config and tokenizer only.
        quiet:   shows no bars of the download.

    Raises:
        ValueError: the hub has no such model, does not show it or is out of reach, the disk is
            full, or the model has no safetensors. No message has a token.
    """
    hub_name = _hub_name(name)
    if hub_name is None:
        return Path(name)
    repository, revision = hub_name.groups()
    if (repository, revision, weights) in _fetched:
        return _fetched[repository, revision, weights]
    patterns = [*TEXTS, WEIGHTS] if weights else TEXTS
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=patterns,
                # A * of the hub's patterns also stands for the / of folders.
                ignore_patterns="*/*.safetensors",
                tqdm_class=_NoBar if quiet else None,
            )
        )
    # Its own errors, those of two HTTP libraries, of the disk, and of a Rust library.
    except Exception as error:  # noqa: BLE001 - each becomes a ValueError
        rule, advice = next(words for kind, *words in REFUSALS if isinstance(error, kind))
        # Neither its text nor itself as the cause: it names addresses, which may hold a password.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(
            f"{setting} must be {rule.format(cache=constants.HF_HUB_CACHE)}, "
            f"got {name} ({reason}); {advice}"
        ) from None
    if weights and not any(folder.glob(WEIGHTS)):
        raise ValueError(
            f"{setting} must be a model with files {WEIGHTS}, got {name} without; convert it with "
            "save_pretrained and give the folder"
        )
    _fetched[repository, folder.name, weights] = folder
    return folder


def pin(setting: str, name: str, *, quiet: bool = False) -> str:
    """Returns the name of a model with the commit of the hub that it means now; downloads it.

    Names of folders stay as they are.
    """
    hub_name = _hub_name(name)
    return f"{hub_name[1]}@{model_folder(setting, name, quiet=quiet).name}" if hub_name else name


def pin_models(config: Config) -> Config:
    """Returns the config with the commits of the hub that names of models mean now.

    A checkpoint records them, so a run does not go on with what has changed on the hub unseen. With
    one attempt the teacher is never asked, so it is not downloaded.
    """
    sections: dict[str, Section] = {"student": config.student}
    if config.rollout.max_attempts > 1:
        sections["teacher"] = config.teacher
    return config.model_copy(
        update={
            name: section.model_copy(
                update={"path": pin(f"{name}.path", section.path, quiet=config.run.quiet)}
            )
            for name, section in sections.items()
            if isinstance(section, StudentConfig | LocalTeacherConfig)
        }
    )


class _NoBar(tqdm):
    """A progress bar that is not drawn."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})


def _hub_name(name: str) -> re.Match[str] | None:
    """Returns the match of a name that is no folder but might be one of the hub."""
    return None if Path(name).exists() else HUB_NAME.fullmatch(name)
