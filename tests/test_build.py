"""The build of csrc/: which compilers and which releases of torch it refuses, in words."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("script", "named"),
    [
        (None, "got none "),
        ("exit 1", "got none "),
        ("echo '#define __GNUC__ 11'", "got gcc 11;"),
        ("echo '#define _MSC_VER 1940'", "got another one "),
    ],
    ids=["absent", "broken", "old gcc", "unknown"],
)
def test_unfit_compiler_is_refused(script: str | None, named: str, tmp_path: Path) -> None:
    """The refusal comes before anything is compiled, and names the build without a compiler."""
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "build")],
        cwd=ROOT,
        env=os.environ | {"CXX": str(compiler)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("setup.py: ")]
    assert named in line and "SOCPO_BUILD=none" in line
    assert not (tmp_path / "build").exists()


def test_extension_names_its_torch() -> None:
    """By this text an extension of another torch is refused before it is loaded."""
    library = ROOT / "socpo_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        pytest.skip("the extension is not built")
    text = f"socpo_fast._C is built for torch {Version(torch.__version__).base_version}\0"
    assert text.encode() in library.read_bytes()
