"""What importing the package must not do, and what its sources must not contain."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("socpo_fast", "kernels", "bench", "tools")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {
    r"^\s*(import|from) kernels\b": "ours is socpo_fast.kernels; the bare name is a Hugging Face "
    "package",
    r"^\s*(import|from) pickle\b": "weights and states are safetensors and JSON",
    r"\btorch\.load\(": "it reads pickles",
    r"(?<![\w.])(eval|exec)\(": "nothing that was read is ever run",
    r"trust_remote_code\s*=\s*True": "no remote code",
    r"\bos\.system\(|shell=True": "no shell",
}


def run_python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_sources_are_free_of(pattern: str) -> None:
    found = [
        path.name
        for path in SOURCES
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not found, f"{found}: {FORBIDDEN[pattern]}"


def test_transformers_loads_behind_us_from_the_root() -> None:
    """transformers looks for a package named kernels; from the root it finds our folder, which has
    no __init__.py.
    """
    code = (
        "import socpo_fast, transformers; from transformers import AutoModelForCausalLM, "
        "AutoTokenizer"
    )
    run_python(code)


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "socpo_fast" / "kernels").is_symlink()
    assert not [
        path
        for path in (ROOT / "kernels").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ]
    assert run_python("import socpo_fast.kernels as k; print(k.__file__)").strip() == "None"


def test_configuration_needs_no_torch() -> None:
    assert (
        run_python("import socpo_fast.config, sys; print('torch' in sys.modules)").strip()
        == "False"
    )


def test_what_has_no_wheel_has_an_extra_of_its_own() -> None:
    """flash-attn is compiled where it is installed: no other extra may ask for that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    asking = [name for name, needs in extras.items() if any("flash" in need for need in needs)]
    assert asking == ["flash"] and len(extras["flash"]) == 1
