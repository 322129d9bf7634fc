"""Damages folders of small models, and checks that loading them is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from socpo_fast.model import load_student


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; a field set to ... is removed."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def edit_tensors(path: Path, **changes: Any) -> None:
    """Sets tensors of a safetensors file; a tensor set to ... is removed."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not ...}, path)


def assert_refused(folder: Path, *parts: str) -> None:
    """Asserts that load_student raises one line with all these parts in it."""
    with pytest.raises(ValueError, match=re.escape(parts[0])) as refusal:
        load_student(folder)
    message = str(refusal.value)
    assert all(text in message for text in parts) and "\n" not in message, message
