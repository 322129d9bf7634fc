"""Names the revision of the project that is being measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "gpu_bundle" / "revision.txt"  # for a copy of the tree without .git


def revision() -> str:
    """Returns this checkout's commit, with "-dirty" behind it where files have changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        result = None
    if result is not None and result.returncode == 0:
        return result.stdout.strip()
    return BUNDLED.read_text(encoding="utf-8").strip() if BUNDLED.is_file() else "unknown"
