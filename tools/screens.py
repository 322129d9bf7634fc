"""Writes docs/screens.md: what one sees on a terminal, taken from a short run of the built-in task.

    python -m tools.screens [--batches 6]

The run and the commands are real; their times are those of the machine, and differ each time. The
two pictures of the live display are drawn as on a terminal of WIDTH by HEIGHT, while the run goes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from socpo_fast.config import load_config
from socpo_fast.report.folder import run_folder
from socpo_fast.report.live import escaped, picture_of
from socpo_fast.report.status import Exchange, Status
from socpo_fast.trainer import Trainer

ROOT = Path(__file__).parent.parent
WIDTH = 90
HEIGHT = 24
BATCH = 4  # the one whose pictures are taken
# A short run on any machine, whose updates have several microbatches.
CHANGES = {"run.threads": 1, "data.builtin_eval_questions": 50, "train.token_budget": 2048}
MOMENTS: dict[str, Callable[[Status], bool]] = {
    "rollout": lambda s: s.phase == "rollout" and s.batch == BATCH and s.done > 0.8 * s.total,
    "update": lambda s: s.batch == BATCH and s.done == 1 and s.work is not None,
}


class Camera(threading.Thread):
    """Takes a picture of a run's display at each of MOMENTS."""

    def __init__(self, trainer: Trainer):
        super().__init__(daemon=True)
        self.trainer = trainer
        self.pictures: dict[str, str] = {}
        self.exchange: Exchange | None = None

    def run(self) -> None:
        """Looks at the run until all pictures are taken."""
        while len(self.pictures) < len(MOMENTS):
            time.sleep(0.001)
            if hasattr(self.trainer, "progress"):
                self.look(self.trainer.progress.status)

    def look(self, status: Status) -> None:
        """Takes the pictures whose moment has come."""
        if newer := status.next_exchange(time.monotonic()):
            self.exchange = escaped(newer, "utf-8")
        for name, has_come in MOMENTS.items():
            if name not in self.pictures and has_come(status):
                lines = picture_of(
                    status, self.exchange, width=WIDTH, height=HEIGHT, ascii_only=False
                )
                self.pictures[name] = "\n".join(line.plain.rstrip() for line in lines)


def run_of(num_batches: int) -> tuple[dict[str, str], str]:
    """Makes a run in the current folder; returns pictures of it, and what it printed."""
    changes = {"run.num_batches": num_batches, **CHANGES}
    config = load_config(ROOT / "configs" / "molar_mass.toml", changes)
    with run_folder(config.folder), redirect_stdout(io.StringIO()) as printed:
        trainer = Trainer(config)
        camera = Camera(trainer)
        camera.start()
        trainer.run()
    camera.join(timeout=5)
    return camera.pictures, printed.getvalue()


def output_of(words: str) -> str:
    """Returns what a command prints."""
    result = subprocess.run(
        [sys.executable, "-m", "socpo_fast.cli", *words.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    lines = result.stdout.splitlines()
    return "\n".join(line for line in lines if not line.startswith("git_revision"))


def block(text: str) -> str:
    """Returns text as a block of Markdown."""
    return f"```text\n{text.strip()}\n```"


def page(num_batches: int) -> str:
    """Returns the page."""
    plan = output_of("demo --dry-run")
    pictures, printed = run_of(num_batches)
    wrong = "train --train.learning_rate 1e-4"
    changes = {"run.num_batches": num_batches, **CHANGES}
    options = " ".join(f"--{name} {value}" for name, value in changes.items())
    parts = [
        "# What one sees",
        "Written by `python -m tools.screens` from a run of the built-in task on one core.",
        "## A run on a terminal",
        "While students answer. The dialogue at the bottom changes every few seconds, and shows a "
        "student that the teacher rescued if there is one.",
        block(pictures["rollout"]),
        "Within an update:",
        block(pictures["update"]),
        "## A run elsewhere",
        f"`socpo demo {options}` into a file. It begins with the plan and ends with a card, as on "
        "a terminal. `--run.quiet true` prints warnings and one line at the end.",
        block(printed),
        "## Before anything is computed",
        "`socpo demo --dry-run`",
        block(plan),
        "## A mistake",
        f"`socpo {wrong}`",
        block(output_of(wrong)),
        "## The machine",
        "`socpo env`",
        block(output_of("env")),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        text = page(options.batches)
    (ROOT / "docs" / "screens.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
