"""Imports point down only, as in the table of the README, and never in a circle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.helpers.import_graph import Graph, find_circles, find_forbidden, import_graph

PACKAGE = Path(__file__).parent.parent / "socpo_fast"
LAYERS = {
    "cli": 7,
    "arguments": 6,
    "session": 6,
    "run_state": 6,
    "stopping": 6,
    "trainer": 6,
    "measure": 6,
    "training_run": 6,
    "integrations": 6,
    "socratic": 5,
    "report": 5,
    "engine": 4,
    "training": 4,
    "model": 3,
    "ops": 2,
    "kernels": 1,
    "_C": 1,
}
# Part -> parts of its own layer that it may import. Only what a command runs imports others of its
# layer.
SIBLINGS = {
    "trainer": ("measure", "session", "run_state", "stopping"),
    "measure": ("session", "run_state"),
    "training_run": ("trainer", "session", "run_state"),
}
# Parts that every layer may import -> parts that they may import themselves.
BESIDE: dict[str, tuple[str, ...]] = {
    "config": ("types", "registries"),
    "types": (),
    "registries": (),
    "metrics": (),
    "device": (),
    "files": (),
    "extras": (),
    "starter": ("types",),
    "trace": ("files",),
}


def forbidden(graph: Graph) -> list[str]:
    return find_forbidden(graph, LAYERS, BESIDE, SIBLINGS)


def test_imports_point_down() -> None:
    """The rule holds for imports inside functions as well."""
    assert forbidden(import_graph(PACKAGE, inside_functions=True)) == []


def test_no_import_circles() -> None:
    graph = import_graph(PACKAGE, inside_functions=False)
    assert find_circles(graph) == []
    parts = {f"{module}.".split(".")[1] for module in graph}
    assert parts - {""} == {*LAYERS, *BESIDE} - {"_C"}, (
        "every part has a row, and every row its part"
    )


def plant(folder: Path, sources: Mapping[str, str]) -> Path:
    """Writes a package `socpo_fast` of these files (path -> source)."""
    package = folder / "socpo_fast"
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    "back_import",
    [
        "from socpo_fast.engine import pages",
        "from socpo_fast.engine.pages import Page",
        "import socpo_fast.engine.pages",
        "if TYPE_CHECKING:\n    from socpo_fast.engine.pages import Page",
        "from socpo_fast.engine.runner import Runner",
    ],
    ids=["module", "name", "import", "type checking", "by way of a third"],
)
def test_a_planted_circle_is_found(tmp_path: Path, back_import: str) -> None:
    """Modules of one part may import each other, but not in a circle."""
    sources = {
        "engine/pages.py": "from socpo_fast.engine.scheduler import Scheduler",
        "engine/scheduler.py": back_import,
        "engine/runner.py": "from socpo_fast.engine import pages",
        "engine/decode.py": "from socpo_fast.engine import pages",  # outside the circle
    }
    graph = import_graph(plant(tmp_path, sources), inside_functions=False)
    circle = ["socpo_fast.engine.pages", "socpo_fast.engine.scheduler"]
    if "runner" in back_import:
        circle.insert(1, "socpo_fast.engine.runner")
    assert find_circles(graph) == [circle]
    assert forbidden(graph) == []


def test_a_late_import_is_no_circle(tmp_path: Path) -> None:
    sources = {
        "engine/pages.py": "from socpo_fast.engine import scheduler",
        "engine/scheduler.py": "def f():\n    from socpo_fast.engine import pages",
    }
    graph = import_graph(plant(tmp_path, sources), inside_functions=False)
    assert find_circles(graph) == []


@pytest.mark.parametrize(
    ("path", "imported", "fault"),
    [
        ("ops/x.py", "socpo_fast.model", "(layer 2) imports socpo_fast.model above it"),
        ("engine/x.py", "socpo_fast.training", "imports socpo_fast.training of its own layer 4"),
        ("session.py", "socpo_fast.trainer", "imports socpo_fast.trainer of its own layer 6"),
        ("config/x.py", "socpo_fast.files", "imports socpo_fast.files, which it may not"),
        ("types.py", "socpo_fast.config", "imports socpo_fast.config, which it may not"),
        ("metrics.py", "socpo_fast.ops", "imports socpo_fast.ops, which it may not"),
        ("ops/x.py", "socpo_fast", "imports socpo_fast, which it may not"),
        ("new.py", "socpo_fast.ops", "new has no layer"),
    ],
)
@pytest.mark.parametrize("inside_function", [False, True])
def test_a_planted_forbidden_import_is_found(
    tmp_path: Path,
    path: str,
    imported: str,
    fault: str,
    inside_function: bool,
) -> None:
    source = (
        f"def f():\n    import {imported}" if inside_function else f"from {imported} import name"
    )
    parts = ("", "ops/", "model/", "training/", "config/")
    empty_modules = (
        "trainer.py",
        "types.py",
        "files.py",
        *(f"{folder}__init__.py" for folder in parts),
    )
    package = plant(tmp_path, {**dict.fromkeys(empty_modules, ""), path: source})
    [actual] = forbidden(import_graph(package, inside_functions=True))
    assert fault in actual


def test_imports_of_the_table_are_allowed(tmp_path: Path) -> None:
    sources = {
        "trainer.py": "from socpo_fast import session\nfrom socpo_fast.files import sync",
        "session.py": "from socpo_fast.engine import Engine",
        "config/sections.py": "from socpo_fast.types import Question",
        "config/text.py": "from socpo_fast.config import sections",
        "types.py": "import torch",
    }
    assert forbidden(import_graph(plant(tmp_path, sources), inside_functions=True)) == []
