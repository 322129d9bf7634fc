"""Settings as text: values from words and back, TOML, the rule of a field in words, and errors.

Errors read `<key> must be <rule>, got <value>` or `unknown key <key>; did you mean <key>?`. All of
it works on any model of sections (a pydantic model whose fields are pydantic models).
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

KINDS = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false", "null": "none"}
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "minLength": "of length >=",
    "pattern": "matching",
}


def sections_of(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {name: cast(type[BaseModel], field.annotation) for name, field in model.model_fields.items()}


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """section.key -> its field, in order."""
    return {
        f"{name}.{key}": field
        for name, section in sections_of(model).items()
        for key, field in section.model_fields.items()
    }


def rule_of(model: type[BaseModel], name: str) -> str:
    """What a value of section.key must be, in words: "a number > 0 and <= 1"."""
    section, _, key = name.partition(".")
    schema = _properties(sections_of(model)[section])[key]
    words = []
    for option in schema.get("anyOf", [schema]):
        choices = option.get("enum") or ([option["const"]] if "const" in option else None)
        limits = " and ".join(f"{word} {option[limit]}" for limit, word in LIMITS.items() if limit in option)
        if choices:
            words.append("one of " + ", ".join(choices) if len(choices) > 1 else choices[0])
        else:
            words.append(f"{KINDS[option['type']]} {limits}".rstrip())
    return " or ".join(words)


@cache
def _properties(section: type[BaseModel]) -> dict[str, Any]:
    return section.model_json_schema()["properties"]


def from_text(model: type[BaseModel], name: str, text: str) -> object:
    """Text of the command line as a value of the field's type; what cannot be read stays text, to be refused."""
    fields = fields_of(model)
    if text == "none" or name not in fields:
        return text
    kind: Any = fields[name].annotation
    try:
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError:
        return text


def to_text(value: object) -> str:
    """The inverse of from_text."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_toml(model: BaseModel) -> str:
    """One [section] table of key = value lines after the other."""
    lines: list[str] = []
    for section, table in model.model_dump().items():
        lines += [f"[{section}]", *(f"{key} = {toml_literal(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def toml_literal(value: object) -> str:
    """A TOML literal; None, which TOML lacks, is "none"."""
    if isinstance(value, str | None):  # a JSON string is a TOML basic string, but for DEL
        return json.dumps(to_text(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return to_text(value)


def unknown_key(model: type[BaseModel], name: str) -> str:
    """The message for a key that no section has, with the nearest known one: the same key elsewhere, a similar name."""
    names = list(fields_of(model))
    same_key = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    nearest = difflib.get_close_matches(name, same_key or names, n=1, cutoff=0.0 if same_key else 0.7)
    return f"config: unknown key {name}; " + (
        f"did you mean {nearest[0]}?" if nearest else "socpo train --help lists all"
    )


def explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first thing pydantic found wrong, in one line."""
    first = error.errors(include_url=False)[0]
    name, value = ".".join(str(part) for part in first["loc"][:2]), first["input"]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":  # of an unknown table the first key says more: trian -> trian.lr
        return unknown_key(model, f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name)
    if "." not in name:
        return f"config: {name} must be a table, got {value!r}; write [{name}] and key = value lines"
    # What stands in a field with repr=False may be a pasted key or password, so it is not shown.
    shown = repr(value) if fields_of(model)[name].repr else "something else"
    return f"config: {name} must be {rule_of(model, name)}, got {shown}"
