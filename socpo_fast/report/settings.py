"""What a run was made under: config.toml, its history, and which changes need consent.

    [run]                   the settings that hold now, and have since the last until_update below
    ..
    [[history]]             the settings that held before, oldest first, for the updates
    from_update = 0         from_update + 1 .. until_update
    until_update = 12
    changes = ["train.lr: 1e-06 -> 2e-06"]
    [history.run]
    ..

Read settings_text. load_config leaves the history out.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from socpo_fast.config import Config, read_toml
from socpo_fast.config.text import to_text
from socpo_fast.registries import LR_SCHEDULES
from socpo_fast.types import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Settings that may change without consent, and why. All others decide tokens, weights or what is
# measured.
FREE = {
    "run.name": "where the run lies",
    "run.dir": "where the run lies",
    "run.resume": "where it goes on from",
    "run.accept_changes": "the consent itself; it is for one start and never kept",
    "run.num_batches": "how long it goes on; a batch depends on no later one, see deciding",
    "run.checkpoint_every_updates": "what is kept",
    "run.keep_checkpoints": "what is kept",
    "run.threads": "speed; docs/numerics.md says where bits do not depend on it",
    "run.live": "what is shown",
    "run.trace_batches": "what is shown",
    "data.train": "where the questions lie; the questions themselves are compared",
    "data.eval": "where the questions lie; the questions themselves are compared",
    "data.train_split": "the questions themselves are compared",
    "data.eval_split": "the questions themselves are compared",
    "data.subset": "the questions themselves are compared",
    "data.max_prompt_tokens": "the questions themselves are compared",
    "data.builtin_train_questions": "the questions themselves are compared",
    "data.builtin_eval_questions": "the questions themselves are compared",
    "eval.max_questions": "the questions themselves are compared",
    "eval.every_updates": "when it is measured; what is trained does not depend on it",
    "engine.kv_cache_gib": "speed; tokens do not depend on scheduling",
    "engine.max_running": "speed; tokens do not depend on scheduling",
    "engine.token_budget": "speed; tokens do not depend on scheduling",
    "train.checkpointing": "memory and speed; the same bits either way",
    "teacher.url": "where the teacher runs; teacher.model is compared",
    "teacher.api_key_env": "where the key stands",
    "teacher.max_concurrency": "how fast the teacher is asked",
    "teacher.guidance_timeout_s": "how long the teacher is waited for",
    "teacher.timeout_s": "how long the teacher is waited for",
    "teacher.max_retries": "how long the teacher is waited for",
    "grader.timeout_s": "when a run stops; what is trained until then does not depend on it",
    "teacher.on_silence": "when a run stops; what is trained until then does not depend on it",
}


def settings_text(
    config: Config,
    path: Path,
    *,
    now: Mapping[str, Any],
    num_updates: int,
    before: Mapping[str, Any],
    data: Mapping[str, str],
    is_own: bool,
) -> str:
    """The config.toml of a run that goes on after num_updates updates; tells of what has changed.

    Args:
        config:      the settings from now on, as they are asked for.
        now:         those of them that decide results, with what stands for "auto" here.
        path:        config.toml of the run that made the checkpoint; only its history is read, as
                     people edit the rest.
        before:      the checkpoint's own record: "settings", and "drawn_from", what that run drew
                     its prompts from, by name.
        data:        what this one does.
        is_own:      that run is this one, so that changes need consent; who begins another run
                     from a checkpoint has given it.

    Raises:
        ValueError: changes without consent; the file is damaged.
    """
    tables = read_toml(path) if path.is_file() else {}
    history, agreed = _history(path, tables, num_updates)
    now = json.loads(json.dumps(now))  # as it is read back
    changes = _list_changes(before["settings"], now)
    if is_own and not tables:
        changes.append(f"{path}: the history -> missing")
    changed = (name for name, old in before["drawn_from"].items() if data.get(name, old) != old)
    changes += [f"{name}: {before['drawn_from'][name]} -> {data[name]}" for name in changed]
    if not changes:
        # What was agreed to is in force if the checkpoint was made after it.
        return config_text(config, [*history, *[agreed] * bool(_list_changes(agreed, now))])
    listed = "; ".join(changes)
    # Agreed to by an earlier start, which made no checkpoint.
    is_agreed = agreed.get("changes") == changes
    if is_own and not config.run.accept_changes and not is_agreed:
        raise ValueError(
            f"run: {path.parent} must go on as it began, got {listed}; "
            "set them back, or set run.accept_changes true, which keeps what held before on record"
        )
    warnings.warn(f"run: changed from update {num_updates} on: {listed}", stacklevel=2)
    last = {
        "from_update": history[-1]["until_update"] if history else 0,
        "until_update": num_updates,
        "changes": changes,
    }
    held = {section: _table(tables, section) | keys for section, keys in before["settings"].items()}
    return config_text(config, [*history, last | held])


def drawn_from(
    train: Sequence[Question], held_out: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """What decides a run's prompts beside its settings, in words that change when it does."""
    return {
        "questions of data.train": _digest([*map(vars, train)]),
        "questions of data.eval": _digest([*map(vars, held_out)]),
        "tokens of the student": _digest(sorted(tokenizer.get_vocab().items())),
        "chat template of the student": _digest(str(tokenizer.chat_template)),
    }


def measured_by(config: Config, drawn: Mapping[str, str]) -> str:
    """What success/unassisted depends on beside the weights, in words; "": nothing is held out."""
    limits = f"{config.eval.samples} samples of {config.rollout.max_new_tokens} tokens"
    sampling = f"temperature {config.eval.temperature}, top_p {config.eval.top_p}"
    grader = f"grader {config.data.grader} at {config.grader.correct_at}"
    words = f"{drawn['questions of data.eval']}, {limits}, {sampling}, {grader}"
    return "" if config.data.eval is None else words


def _digest(values: Sequence[Any]) -> str:
    """How many there are, and the head of the hash of all."""
    return f"{len(values)} with hash {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]}"


def config_text(config: Config, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """TOML that load_config reads back to an equal Config. Of a key only its variable's name."""
    return "\n".join([_to_toml(_tables(config)), *map(_entry_text, history)])


def read_settings(folder: Path) -> dict[str, Any]:
    """The tables of a run folder's config.toml without its history; none where there is no file."""
    tables = read_toml(folder / "config.toml") if (folder / "config.toml").is_file() else {}
    return {section: table for section, table in tables.items() if isinstance(table, dict)}


def deciding(config: Config) -> dict[str, Any]:
    """The settings that decide tokens, weights or what is measured, for a checkpoint's record.

    The length of the run is one of them where the learning rate depends on it.
    """
    is_constant = LR_SCHEDULES[config.train.lr_schedule] is None
    free = FREE.keys() if is_constant else FREE.keys() - {"run.num_batches"}
    return {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in free}
        for section, table in _tables(config).items()
    }


def _tables(config: Config) -> dict[str, Any]:
    """The settings as they are written; consent holds for one start."""
    tables = config.model_dump()
    tables["run"]["accept_changes"] = False
    return tables


def _history(
    path: Path, tables: Mapping[str, Any], num_updates: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What held until before num_updates updates, oldest first, and what was agreed to change
    there.

    A run that goes on from an older checkpoint loses the entries of what came after it.
    """
    try:
        entries = [
            entry | {"from_update": int(entry["from_update"])}
            for entry in tables.get("history", [])
        ]
        history = [entry for entry in entries if entry["until_update"] < num_updates]
        agreed = [entry for entry in entries if entry["until_update"] == num_updates]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"run: {path} must hold a history as it was written; repair it") from None
    return history, agreed[0] if agreed else {}


def _table(tables: Mapping[str, Any], section: str) -> dict[str, Any]:
    """A section of a file that people may have edited."""
    table = tables.get(section)
    return table if isinstance(table, dict) else {}


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """ "section.key: old -> new" of what both have and what decides results.

    What only one has belongs to another kind of section, which is a change of its own, or to
    another version.
    """
    changes = []
    for section, table in now.items():
        old_table = _table(before, section)
        for key in table:
            name = f"{section}.{key}"
            new = to_text(table[key])
            old = to_text(old_table.get(key, table[key]))
            if old != new:
                changes.append(f"{name}: {old:.100} -> {new:.100}")
    return changes


def _entry_text(entry: Mapping[str, Any]) -> str:
    """One [[history]] table."""
    changes = ", ".join(map(_toml_literal, entry.get("changes", ())))
    tables = {section: table for section, table in entry.items() if isinstance(table, dict)}
    lines = [
        "[[history]]",
        f"from_update = {entry['from_update']}",
        f"until_update = {entry['until_update']}",
        f"changes = [{changes}]",
        "",
        _to_toml(tables, prefix="history."),
    ]
    return "\n".join(lines)


def _to_toml(tables: Mapping[str, Any], prefix: str = "") -> str:
    """One [section] table of key = value lines after the other; prefix begins their names."""
    lines: list[str] = []
    for section, table in tables.items():
        values = (f"{key} = {_toml_literal(value)}" for key, value in table.items())
        lines += [f"[{prefix}{section}]", *values, ""]
    return "\n".join(lines)


def _toml_literal(value: object) -> str:
    """A TOML literal; None, which TOML lacks, is "none"."""
    if isinstance(value, str | None):  # a JSON string is a TOML basic string, but for DEL
        return json.dumps(to_text(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = (f"{_toml_literal(key)} = {_toml_literal(part)}" for key, part in value.items())
        return f"{{ {', '.join(pairs)} }}"
    return (
        f"[{', '.join(map(_toml_literal, value))}]" if isinstance(value, list) else to_text(value)
    )
