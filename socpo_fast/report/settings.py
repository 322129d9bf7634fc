"""Records a run's settings in config.toml, keeps their history, and asks consent for changes.

A run that goes on from a checkpoint with other settings is a different experiment. So changes need
run.accept_changes, and config.toml keeps the settings that were in force before:

    [run]                   the current settings, in force since the last until_update below
    ..
    [[history]]             earlier settings, oldest first; this entry was in force for the updates
    from_update = 0         from_update + 1 .. until_update
    until_update = 12
    changes = ["train.lr: 1e-06 -> 2e-06"]       what changed after update 12
    [history.run]
    ..

Read settings_text. load_config ignores the history.
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

# Settings that may change without consent, and why. All others decide which tokens are sampled,
# what the weights become, or what is measured.
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
    "run.quiet": "what is shown",
    "run.trace_batches": "what is shown",
    "data.train": "where the questions lie; the questions themselves are compared",
    "data.eval": "where the questions lie; the questions themselves are compared",
    "data.train_split": "the questions themselves are compared",
    "data.eval_split": "the questions themselves are compared",
    "data.subset": "the questions themselves are compared",
    "data.question_column": "the questions themselves are compared",
    "data.ground_truth_column": "the questions themselves are compared",
    "data.reference_solution_column": "the questions themselves are compared",
    "data.system_column": "the questions themselves are compared",
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
    """Returns the config.toml of a run that goes on after num_updates updates; warns of changes.

    Args:
        config:      the settings from now on, as the user gave them.
        now:         those that decide results (see deciding), with values in place of "auto".
        path:        config.toml of the run that made the checkpoint. Only its history is read, as
                     people edit the rest.
        before:      what the checkpoint recorded: "settings", and "drawn_from", the sources of
                     that run's prompts by name (see drawn_from).
        data:        the sources of this run's prompts, by name.
        is_own:      the checkpoint is this run's own, so changes need consent. Whoever begins a new
                     run from a checkpoint changes settings on purpose.

    Raises:
        ValueError: settings changed without consent, or the file is damaged.
    """
    tables = read_toml(path) if path.is_file() else {}
    history, agreed = _history(path, tables, num_updates)
    # The checkpoint's settings were read from JSON, where a tuple is a list.
    now = json.loads(json.dumps(now))
    changes = _list_changes(before["settings"], now)
    if is_own and not tables:
        changes.append(f"{path}: the history -> missing")
    changed = (name for name, old in before["drawn_from"].items() if data.get(name, old) != old)
    changes += [f"{name}: {before['drawn_from'][name]} -> {data[name]}" for name in changed]
    if not changes:
        # An entry that ends at this update was written when its change was accepted. It belongs to
        # the history if the checkpoint was made under the changed settings.
        return config_text(config, [*history, *[agreed] * bool(_list_changes(agreed, now))])
    listed = "; ".join(changes)
    # An earlier start got consent for the same changes but ended before it made a checkpoint.
    is_agreed = agreed.get("changes") == changes
    if is_own and not config.run.accept_changes and not is_agreed:
        raise ValueError(
            f"run: {path.parent} must go on as it began, got {listed}; "
            "set them back, or set run.accept_changes true, which keeps what held before on "
            "record, or begin another run by another run.name"
        )
    warnings.warn(f"run: changed from update {num_updates} on: {listed}", stacklevel=2)
    entry = {
        "from_update": history[-1]["until_update"] if history else 0,
        "until_update": num_updates,
        "changes": changes,
    }
    # The file has settings that decide nothing as well; the checkpoint is right about the others.
    old_tables = {
        section: _table(tables, section) | keys for section, keys in before["settings"].items()
    }
    return config_text(config, [*history, entry | old_tables])


def drawn_from(
    train: Sequence[Question], held_out: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Returns, by name, text that changes whenever something changes a run's prompts.

    That is what settings do not show: the questions themselves, the tokenizer, the chat template.
    """
    return {
        "questions of data.train": _digest([*map(vars, train)]),
        "questions of data.eval": _digest([*map(vars, held_out)]),
        "tokens of the student": _digest(sorted(tokenizer.get_vocab().items())),
        "chat template of the student": _digest(str(tokenizer.chat_template)),
    }


def measured_by(config: Config, drawn: Mapping[str, str]) -> str:
    """Returns text that changes whenever success/unassisted is measured differently.

    Two evaluations with the same text can be compared. "" if no questions are held out.
    """
    limits = f"{config.eval.samples} samples of {config.rollout.max_new_tokens} tokens"
    sampling = f"temperature {config.eval.temperature}, top_p {config.eval.top_p}"
    grader = f"grader {config.data.grader} at {config.grader.correct_at}"
    words = f"{drawn['questions of data.eval']}, {limits}, {sampling}, {grader}"
    return "" if config.data.eval is None else words


def _digest(values: Sequence[Any]) -> str:
    """Returns the number of values and the first digits of the hash of all of them."""
    return f"{len(values)} with hash {hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]}"


def config_text(config: Config, history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns TOML that load_config reads back to an equal Config; API keys are never in it."""
    # A config names the environment variable that holds a key, not the key.
    return "\n".join([_to_toml(_tables(config)), *map(_entry_text, history)])


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads a run folder's config.toml without its history; {} where there is no file."""
    tables = read_toml(folder / "config.toml") if (folder / "config.toml").is_file() else {}
    return {section: table for section, table in tables.items() if isinstance(table, dict)}


def deciding(config: Config) -> dict[str, Any]:
    """Returns the settings that decide results, for a checkpoint's record: all but those of FREE.

    run.num_batches is among them if the learning rate's schedule depends on it.
    """
    is_constant = LR_SCHEDULES[config.train.lr_schedule] is None
    free = FREE.keys() if is_constant else FREE.keys() - {"run.num_batches"}
    return {
        section: {key: value for key, value in table.items() if f"{section}.{key}" not in free}
        for section, table in _tables(config).items()
    }


def _tables(config: Config) -> dict[str, Any]:
    """Returns the settings as config.toml shows them."""
    tables = config.model_dump()
    # Consent is for one start. In the file it would silently accept all later changes as well.
    tables["run"]["accept_changes"] = False
    return tables


def _history(
    path: Path, tables: Mapping[str, Any], num_updates: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the entries that ended before update num_updates, and the one that ends at it or {}.

    Entries of later updates are dropped: a run that goes on from an older checkpoint makes these
    updates anew.
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
    """Returns a section of a file that people may have edited; {} if it is no table."""
    table = tables.get(section)
    return table if isinstance(table, dict) else {}


def _list_changes(old_settings: Mapping[str, Any], new_settings: Mapping[str, Any]) -> list[str]:
    """Returns "section.key: old -> new" for every key that both have with different values.

    A key that only one of them has belongs to another kind of teacher or reward, and then the
    section's `kind` has changed as well; or it belongs to another version of this package.
    """
    changes = []
    for section, table in new_settings.items():
        old_table = _table(old_settings, section)
        for key in table:
            name = f"{section}.{key}"
            new = to_text(table[key])
            old = to_text(old_table.get(key, table[key]))
            if old != new:
                changes.append(f"{name}: {old:.100} -> {new:.100}")
    return changes


def _entry_text(entry: Mapping[str, Any]) -> str:
    """Writes one [[history]] table."""
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
    """Writes [section] tables of key = value lines; `prefix` stands in front of their names."""
    lines: list[str] = []
    for section, table in tables.items():
        values = (f"{key} = {_toml_literal(value)}" for key, value in table.items())
        lines += [f"[{prefix}{section}]", *values, ""]
    return "\n".join(lines)


def _toml_literal(value: object) -> str:
    """Returns a TOML literal; None, which TOML lacks, becomes "none"."""
    if isinstance(value, str | None):  # a JSON string is a TOML basic string, but for DEL
        return json.dumps(to_text(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = (
            f"{_toml_literal(key)} = {_toml_literal(element)}" for key, element in value.items()
        )
        return f"{{ {', '.join(pairs)} }}"
    return (
        f"[{', '.join(map(_toml_literal, value))}]" if isinstance(value, list) else to_text(value)
    )
