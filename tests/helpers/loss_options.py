"""Makes one PolicyLossOptions of the loss settings that a test names one by one.

The ops take them as one argument, `options`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from socpo_fast.ops import PolicyLossOptions

NAMES = {field.name for field in fields(PolicyLossOptions)}


def gathered(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call, with those of the loss gathered in `options`."""
    loss = PolicyLossOptions(**{name: value for name, value in options.items() if name in NAMES})
    return {name: value for name, value in options.items() if name not in NAMES} | {"options": loss}
