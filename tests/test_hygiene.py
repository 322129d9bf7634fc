"""Checks what importing the package does, and that sources are free of forbidden code."""

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
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_sources_are_free_of(pattern: str) -> None:
    file_names = [
        path.name
        for path in SOURCES
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not file_names, f"{file_names}: {FORBIDDEN[pattern]}"


def test_transformers_works_from_root() -> None:
    """transformers looks for a package named kernels, and from the root it finds our folder.

    Our folder has no __init__.py, so transformers does not take it for that package.
    """
    code = """
import socpo_fast.kernels.swiglu, transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))"""
    run_python(code)


def test_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    linked = ROOT / "socpo_fast" / "kernels"  # a folder with the same files in an sdist
    assert {path.name for path in linked.glob("*.py")} == {
        path.name for path in (ROOT / "kernels").glob("*.py")
    }
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


def test_flash_attn_has_an_extra_of_its_own() -> None:
    """flash-attn has no wheel and is compiled at installation, so no other extra may need it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    asking = [name for name, needs in extras.items() if any("flash" in need for need in needs)]
    assert asking == ["flash"] and len(extras["flash"]) == 1
