"""Converts settings from and to text, and words the rules of fields and the errors.

Errors read `<key> must be <rule>, got <value>` or `unknown key <key>; did you mean <key>?`. Every
function works on any model of sections (a pydantic model whose fields are pydantic models). Some
sections come in several kinds, told apart by one field, the tag: teacher.kind, reward.schedule.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

KINDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "none",
    "object": "a table",
}
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minLength": "of length >=",
    "pattern": "matching",
}


class Kinds(NamedTuple):
    """The models that a section may have: one, or several told apart by the field `tag`."""

    tag: str  # the field's name; "" if there is only one model
    models: dict[str, type[BaseModel]]  # by the tag's value, or ""; the first is the default


@cache
def sections_of(model: type[BaseModel]) -> dict[str, Kinds]:
    """Returns section -> its kinds."""
    sections = {}
    for name, field in model.model_fields.items():
        tag = field.discriminator if isinstance(field.discriminator, str) else ""
        models = get_args(field.annotation) if tag else (cast(Any, field.annotation),)
        sections[name] = Kinds(
            tag, {kind.model_fields[tag].default if tag else "": kind for kind in models}
        )
    return sections


@cache
def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Returns section.key -> field, in order; keys that all kinds have precede the others."""
    fields: dict[str, FieldInfo] = {}
    for name, (_, models) in sections_of(model).items():
        # If several kinds have a key, the field of the first one is returned: it is written last.
        kinds = reversed(models.values())
        field_of_key = {key: field for kind in kinds for key, field in kind.model_fields.items()}
        keys = dict.fromkeys(key for kind in models.values() for key in kind.model_fields)
        for key in sorted(keys, key=lambda key: bool(owners_of(model, f"{name}.{key}"))):
            fields[f"{name}.{key}"] = field_of_key[key]
    return fields


def owners_of(model: type[BaseModel], name: str) -> list[str]:
    """Returns the kinds of the section that have section.key; [] if all have it."""
    section, _, key = name.partition(".")
    models = sections_of(model)[section].models
    owners = [kind for kind, variant in models.items() if key in variant.model_fields]
    return [] if len(owners) == len(models) else owners


def describe(model: type[BaseModel], name: str) -> str:
    """Returns what section.key means, for --help: "teacher.kind local: KV cache, GiB"."""
    section, _, key = name.partition(".")
    tag, models = sections_of(model)[section]
    if key == tag:
        meanings = {kind: variant.model_fields[key].description for kind, variant in models.items()}
        return "; ".join(f"{kind} = {meaning}" for kind, meaning in meanings.items())
    owners = owners_of(model, name)
    prefix = f"{section}.{tag} {' or '.join(owners)}: " if owners else ""
    return f"{prefix}{fields_of(model)[name].description}"


def rule_of(model: type[BaseModel], name: str) -> str:
    """Returns the rule for values of section.key in words: "a number > 0 and <= 1"."""
    section, _, key = name.partition(".")
    tag, models = sections_of(model)[section]
    if key == tag:
        return "one of " + ", ".join(models)
    # The JSON schema is the one description in which pydantic merges types, limits and choices.
    schema = next(s for s in map(_properties, models.values()) if key in s)[key]
    words = []
    for option in schema.get("anyOf", [schema]):
        choices = option.get("enum") or ([option["const"]] if "const" in option else None)
        limits = " and ".join(
            f"{word} {option[limit]}" for limit, word in LIMITS.items() if limit in option
        )
        if choices:
            words.append("one of " + ", ".join(choices) if len(choices) > 1 else choices[0])
        else:
            words.append(f"{KINDS[option['type']]} {limits}".rstrip())
    return " or ".join(words)


@cache
def _properties(section: type[BaseModel]) -> dict[str, Any]:
    """Returns key -> JSON schema of the section's fields."""
    return section.model_json_schema()["properties"]


def choose_kinds(
    model: type[BaseModel], tables: dict[str, Any], overrides: Mapping[str, object]
) -> None:
    """Fills in the kind of each section that has several, if the file does not name it.

    If an override chooses another kind than the file, the keys that only the file's kind has are
    dropped. So `--teacher.kind retry` is enough to replace the teacher of a file.
    """
    for section, (tag, models) in sections_of(model).items():
        table = tables.setdefault(section, {})
        if not tag or not isinstance(table, dict):
            continue
        file_kind = table.get(tag, next(iter(models)))
        chosen_kind = overrides.get(f"{section}.{tag}", file_kind)
        if chosen_kind != file_kind and chosen_kind in models:
            chosen_fields = models[str(chosen_kind)].model_fields
            for key in [
                key
                for key in table
                if key not in chosen_fields and owners_of(model, f"{section}.{key}")
            ]:
                del table[key]
        table[tag] = chosen_kind


def from_text(model: type[BaseModel], name: str, text: str) -> object:
    """Converts text of the command line to the field's type; unreadable text stays text."""
    # Validation then refuses that text with the field's rule, as it refuses any wrong value.
    fields = fields_of(model)
    if text == "none" or name not in fields:
        return text
    kind: Any = fields[name].annotation
    try:
        return (
            json.loads(text)
            if get_origin(kind) is dict
            else TypeAdapter(kind).validate_strings(text)
        )
    except (ValueError, RecursionError):  # ValidationError is one
        return text


def to_text(value: object) -> str:
    """Converts a value to the text that from_text reads back."""
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


def unknown_key(model: type[BaseModel], name: str) -> str:
    """Returns the error message for a key that no section has, with the nearest known key.

    The nearest key is the same key in another section or its initials (lr for learning_rate), a key
    that this one extends by a word, or a key with a similar spelling.
    """
    names = list(fields_of(model))
    key = name.rpartition(".")[2]
    keys = (key, "".join(word[:1] for word in key.split("_")))
    related = [
        known for known in names if known.rpartition(".")[2] in keys or name.startswith(f"{known}_")
    ]
    # Related keys are offered however different the whole name is; others only if they are similar.
    near = did_you_mean(name, related or names, cutoff=0.0 if related else 0.7)
    return f"config: unknown key {name}{near or '; socpo train --help lists all'}"


def did_you_mean(name: str, names: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """Returns "; did you mean PREFIX-NAME?" with the most similar of `names`; "" if none is near.

    Args:
        prefix: stands in front of the offered name.
        cutoff: least similarity, from 0 (any name) to 1 (this name only).
    """
    nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """Returns the first error that pydantic found, in one line."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    section, *path = [str(loc) for loc in first["loc"]]
    tag = sections_of(model)[section].tag if section in sections_of(model) else ""
    value = first["input"]
    # In a section with kinds, pydantic puts the kind in front of the key.
    path = path[1:] if tag else path
    name = ".".join([section, *path[:1]])
    if first["type"].startswith("union_tag"):
        name = f"{section}.{tag}"
        value = value.get(tag)
    if first["type"] == "extra_forbidden":
        if name in fields_of(model):
            tag = f"{section}.{tag}"
            owners = " or ".join(owners_of(model, name))
            return (
                f"config: {tag} must be {owners} for {name}, got {first['loc'][1]}; set {tag} "
                f"or leave {name} out"
            )
        # For an unknown table the first key finds a better suggestion: [trian] lr -> train.lr.
        return unknown_key(
            model, f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
        )
    if "." not in name:
        # The value itself is not shown: it may be a pasted key or password.
        return (
            f"config: {name} must be a table, got {type(value).__name__}; write [{name}] and "
            "key = value lines"
        )
    if first["type"] == "missing":
        return f"config: {name} must be {rule_of(model, name)}, got nothing; set {name}"
    # A value of a field with repr=False may be a pasted key or password, so it is not shown.
    value_text = repr(value) if fields_of(model)[name].repr else "something else"
    return f"config: {name} must be {rule_of(model, name)}, got {value_text}"


def one_of(
    names: Iterable[str],
    *,
    or_function: bool = False,
) -> tuple[AfterValidator, WithJsonSchema]:
    """Returns the type of a word of a table, or "module:function": Annotated[str, *one_of(T)]."""
    known = tuple(names)

    def check(word: str) -> str:
        if word not in known and not (or_function and ":" in word):
            raise PydanticCustomError("choice", "not a known word")
        return word

    choices = [*known, *["module:function"] * or_function]
    # Literal would do for a fixed list; these words come from a table. The schema feeds rule_of.
    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": choices})


def expand_home(path: str) -> str:
    """Returns the path with ~ expanded: in a file, no shell does that."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"config: ~ must be a known user's home, got {path!r}; write it out")
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]
