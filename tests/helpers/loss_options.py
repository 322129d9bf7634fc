"""Tests name the numbers of a loss one by one; the ops take them as one PolicyLossOptions."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from socpo_fast.ops import PolicyLossOptions

NAMES = {field.name for field in fields(PolicyLossOptions)}


def gathered(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, those of the loss among them put together."""
    loss = PolicyLossOptions(**{name: value for name, value in options.items() if name in NAMES})
    return {name: value for name, value in options.items() if name not in NAMES} | {"options": loss}
