"""Which state of the project a figure is of."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "gpu_bundle" / "revision.txt"  # a copy of the tree may come without .git


def revision() -> str:
    """The commit of this checkout, "-dirty" behind it where files have changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return BUNDLED.read_text(encoding="utf-8").strip() if BUNDLED.is_file() else "unknown"
