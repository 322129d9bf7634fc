"""Imports point down only: a module sees lower layers, its own part, and the modules beside the layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "socpo_fast"
LAYERS = {
    "kernels": 0, "_C": 0, "ops": 1, "model": 2, "engine": 3, "train": 3, "socratic": 4, "report": 4,
    "integrations": 5, "trainer": 5, "cli": 6,
}  # fmt: skip
BESIDE = {
    "config",
    "device",
    "files",
    "metrics",
    "stopping",
    "types",
}  # seen by everyone, see only each other
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)


def parts_imported(source: str) -> set[str]:
    """First name behind socpo_fast of every import, those inside functions too; "" is the package itself."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            bare = node.module == "socpo_fast"
            names |= {f"socpo_fast.{alias.name}" for alias in node.names} if bare else {str(node.module)}
    return {f"{name}.".split(".")[1] for name in names if name.split(".")[0] == "socpo_fast"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_down(module: Path) -> None:
    part = module.parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the public surface may name everything
    assert part in LAYERS or part in BESIDE, f"{module}: {part} has no layer; give it one here and in the README"
    for imported in parts_imported((PACKAGE / module).read_text(encoding="utf-8")) - {part} - BESIDE:
        assert part in LAYERS and imported in LAYERS, f"{module} imports socpo_fast.{imported}"
        assert LAYERS[imported] < LAYERS[part], f"{module} (layer {LAYERS[part]}) imports socpo_fast.{imported}"
