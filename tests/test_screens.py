"""docs/screens.md names only commands and settings that exist."""

import re
from pathlib import Path

from socpo_fast.cli import COMMANDS
from socpo_fast.config import Config
from socpo_fast.config.text import fields_of

PAGE = (Path(__file__).parent.parent / "docs" / "screens.md").read_text(encoding="utf-8")
OTHER_FLAGS = {"config", "checkpoint", "dry_run", "dry-run"}


def test_screens_name_only_what_exists() -> None:
    commands = re.findall(r"(?:`| )socpo ([a-z]+)([^`\n]*)", PAGE)
    assert {"demo", "env", "eval", "report", "train"} <= {name for name, _ in commands}
    known = fields_of(Config).keys() | OTHER_FLAGS
    for name, words in commands:
        assert name in COMMANDS
        flags = set(re.findall(r"--([\w.-]+)", words))
        # This one is shown for the answer that it gets.
        assert flags - {"train.learning_rate"} <= known, words
