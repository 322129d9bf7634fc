"""Settings as text: values from words and back, the rule of a field in words, and errors.

Errors read `<key> must be <rule>, got <value>` or `unknown key <key>; did you mean <key>?`. All of
it works on any model of sections (a pydantic model whose fields are pydantic models).
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
    """What a section may be: one model, or one of several that a field tells apart."""

    tag: str  # the field's name; "" where there is one model
    models: dict[str, type[BaseModel]]  # by the field's value, or ""; the first is the default


@cache
def sections_of(model: type[BaseModel]) -> dict[str, Kinds]:
    """section -> what it may be."""
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
    """section.key -> its field, in order; of a section with kinds what all have comes first."""
    fields: dict[str, FieldInfo] = {}
    for name, (_, models) in sections_of(model).items():
        kinds = reversed(models.values())  # so that of a key in several the first kind's stays
        own = {key: field for kind in kinds for key, field in kind.model_fields.items()}
        keys = dict.fromkeys(key for kind in models.values() for key in kind.model_fields)
        for key in sorted(keys, key=lambda key: bool(owners_of(model, f"{name}.{key}"))):
            fields[f"{name}.{key}"] = own[key]
    return fields


def owners_of(model: type[BaseModel], name: str) -> list[str]:
    """The kinds of its section that have section.key; none when all have it."""
    section, _, key = name.partition(".")
    models = sections_of(model)[section].models
    owners = [kind for kind, variant in models.items() if key in variant.model_fields]
    return [] if len(owners) == len(models) else owners


def describe(model: type[BaseModel], name: str) -> str:
    """What section.key is, for --help: "teacher.kind local: KV cache, GiB"."""
    section, _, key = name.partition(".")
    tag, models = sections_of(model)[section]
    if key == tag:
        meanings = {kind: variant.model_fields[key].description for kind, variant in models.items()}
        return "; ".join(f"{kind} = {meaning}" for kind, meaning in meanings.items())
    owners = owners_of(model, name)
    whose = f"{section}.{tag} {' or '.join(owners)}: " if owners else ""
    return f"{whose}{fields_of(model)[name].description}"


def rule_of(model: type[BaseModel], name: str) -> str:
    """What a value of section.key must be, in words: "a number > 0 and <= 1"."""
    section, _, key = name.partition(".")
    tag, models = sections_of(model)[section]
    if key == tag:
        return "one of " + ", ".join(models)
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
    return section.model_json_schema()["properties"]


def choose_kinds(
    model: type[BaseModel], tables: dict[str, Any], overrides: Mapping[str, object]
) -> None:
    """Fill in the kind of each section that has some, where a file does not say it.

    An override that chooses another kind than the file leaves out what only the file's kind has, so
    that one word on the command line is enough.
    """
    for section, (tag, models) in sections_of(model).items():
        table = tables.setdefault(section, {})
        if not tag or not isinstance(table, dict):
            continue
        in_file = table.get(tag, next(iter(models)))
        chosen = overrides.get(f"{section}.{tag}", in_file)
        if chosen != in_file and chosen in models:
            known = models[str(chosen)].model_fields
            for key in [
                key for key in table if key not in known and owners_of(model, f"{section}.{key}")
            ]:
                del table[key]
        table[tag] = chosen


def from_text(model: type[BaseModel], name: str, text: str) -> object:
    """Text of the command line as a value of the field's type; what cannot be read stays text, to
    be refused.
    """
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
    """The inverse of from_text."""
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, bool | dict) else str(value)


def unknown_key(model: type[BaseModel], name: str) -> str:
    """The message for a key that no section has, with the nearest known one.

    That is the same key elsewhere, one that this one only adds a word to, or a similar name.
    """
    names = list(fields_of(model))
    key = name.rpartition(".")[2]
    akin = [
        known for known in names if known.rpartition(".")[2] == key or name.startswith(f"{known}_")
    ]
    nearest = difflib.get_close_matches(name, akin or names, n=1, cutoff=0.0 if akin else 0.7)
    return f"config: unknown key {name}; " + (
        f"did you mean {nearest[0]}?" if nearest else "socpo train --help lists all"
    )


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing pydantic found wrong, in one line."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    section, *path = [str(part) for part in first["loc"]]
    tag = sections_of(model)[section].tag if section in sections_of(model) else ""
    value = first["input"]
    path = path[1:] if tag else path  # of a section with kinds the kind stands first
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
        # of an unknown table the first key says more: trian -> trian.lr
        return unknown_key(
            model, f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name
        )
    if "." not in name:
        # Not the value itself: what stands in it may be a pasted key or password.
        return (
            f"config: {name} must be a table, got {type(value).__name__}; write [{name}] and "
            "key = value lines"
        )
    if first["type"] == "missing":
        return f"config: {name} must be {rule_of(model, name)}, got nothing; set {name}"
    # What stands in a field with repr=False may be a pasted key or password, so it is not shown.
    shown = repr(value) if fields_of(model)[name].repr else "something else"
    return f"config: {name} must be {rule_of(model, name)}, got {shown}"


def one_of(
    names: Iterable[str],
    *,
    or_function: bool = False,
) -> tuple[AfterValidator, WithJsonSchema]:
    """A word of a table, or "module:function"; as a type: Annotated[str, *one_of(TABLE)]."""
    known = tuple(names)

    def check(word: str) -> str:
        if word not in known and not (or_function and ":" in word):
            raise PydanticCustomError("choice", "not a known word")
        return word

    shown = [*known, *["module:function"] * or_function]
    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": shown})


def expand_home(path: str) -> str:
    """A path whose ~ is written out; in a file no shell does that."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"config: ~ must be a known user's home, got {path!r}; write it out")
    return expanded


LocalPath = Annotated[str, AfterValidator(expand_home)]
