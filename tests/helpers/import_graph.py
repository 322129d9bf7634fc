"""Reads from the sources which module imports which, with `ast`; imports none of them.

Read import_graph, then find_circles and find_forbidden. Names are those of modules, such as
`socpo_fast.engine.pages`; `from a import b` is an import of `a.b` where that is a module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Graph = dict[str, set[str]]


def modules_of(package: Path) -> dict[str, Path]:
    """Returns the path of every module of a package by name, also behind symbolic links."""
    paths = [path for path in package.rglob("*.py") if "__pycache__" not in path.parts]
    for link in package.iterdir():
        paths += link.rglob("*.py") if link.is_symlink() else []
    names = {}
    for path in sorted(set(paths)):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def import_graph(package: Path, *, inside_functions: bool) -> Graph:
    """Returns, for each module, the modules of the package that it imports.

    Imports under `if` or `try` count like all others, `if TYPE_CHECKING` included: a reader follows
    them too. Imports inside functions count only with inside_functions.
    """
    modules = modules_of(package)
    graph: Graph = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name for node in _nodes(tree, inside_functions) for name in _names(node, modules)}
        graph[module] = {name for name in names if f"{name}.".startswith(f"{package.name}.")}
    return graph


def _nodes(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Yields all nodes below a node, those inside functions only if asked for."""
    for child in ast.iter_child_nodes(node):
        yield child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside_functions or not is_function:
            yield from _nodes(child, inside_functions)


def _names(node: ast.AST, modules: Mapping[str, Path]) -> set[str]:
    """Returns the modules that an import statement names; other nodes name none."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, f"line {node.lineno}: relative import"
    source = str(node.module)
    members = {f"{source}.{alias.name}" for alias in node.names}
    # A name that is no module stands for the module that holds it.
    return {name if name in modules else source for name in members}


def find_circles(graph: Graph) -> list[list[str]]:
    """Returns groups of modules that import each other in a circle, the smallest first."""
    reached = {module: _reachable(graph, module) for module in graph}
    circles = set()
    for module, reachable in reached.items():
        if module in reachable:
            circle = (other for other in reachable if module in reached.get(other, ()))
            circles.add(tuple(sorted(circle)))
    return [list(circle) for circle in sorted(circles, key=lambda circle: (len(circle), circle))]


def _reachable(graph: Graph, start: str) -> set[str]:
    """Returns the modules that `start` leads to; itself only through a circle."""
    reached: set[str] = set()
    to_visit = [start]
    while to_visit:
        newly_reached = graph.get(to_visit.pop(), set()) - reached
        reached |= newly_reached
        to_visit += newly_reached
    return reached


def find_forbidden(
    graph: Graph,
    layers: Mapping[str, int],
    beside: Mapping[str, Sequence[str]],
    siblings: Mapping[str, Sequence[str]],
) -> list[str]:
    """Returns the imports that the table of layers forbids, each as a line that says why.

    Args:
        graph:    module -> imported modules.
        layers:   part of the package -> its layer; a part may import itself and lower layers.
        beside:   parts that every layer may import -> the parts that they may import themselves.
        siblings: part -> parts of its own layer that it may import nevertheless.
    """
    faults = []
    for module, imported in sorted(graph.items()):
        importing_part = _part(module)
        if not importing_part:
            continue  # the public surface may name everything
        if importing_part not in layers and importing_part not in beside:
            faults.append(
                f"{module}: {importing_part} has no layer; give it one here and in the README"
            )
            continue
        for name in sorted(imported):
            imported_part = _part(name)
            if imported_part == importing_part or imported_part in (
                beside.get(importing_part, ()) if importing_part in beside else beside
            ):
                continue
            if importing_part in beside or imported_part not in layers:
                faults.append(f"{module} imports {name}, which it may not")
            elif layers[imported_part] > layers[importing_part]:
                faults.append(f"{module} (layer {layers[importing_part]}) imports {name} above it")
            elif layers[imported_part] == layers[
                importing_part
            ] and imported_part not in siblings.get(importing_part, ()):
                faults.append(f"{module} imports {name} of its own layer {layers[importing_part]}")
    return faults


def _part(module: str) -> str:
    """Returns the first name behind the package's; "" for the package itself."""
    return f"{module}.".split(".")[1]
