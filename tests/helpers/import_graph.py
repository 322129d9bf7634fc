"""Which module imports which, read from the sources with `ast`; nothing is imported for it.

Read import_graph, then find_circles and find_forbidden. Names are those of modules, such as
`socpo_fast.engine.pages`; `from a import b` is an import of `a.b` where that is a module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Graph = dict[str, set[str]]


def modules_of(package: Path) -> dict[str, Path]:
    """Every module of a package by name, those behind symbolic links included."""
    paths = [path for path in package.rglob("*.py") if "__pycache__" not in path.parts]
    for link in package.iterdir():
        paths += link.rglob("*.py") if link.is_symlink() else []
    names = {}
    for path in sorted(set(paths)):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def import_graph(package: Path, *, inside_functions: bool) -> Graph:
    """Module -> what it imports of the package.

    Imports under `if` or `try` count as the others do, `if TYPE_CHECKING` included: a reader
    follows them too. Those inside functions count where inside_functions says so.
    """
    modules = modules_of(package)
    graph: Graph = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name for node in _nodes(tree, inside_functions) for name in _names(node, modules)}
        graph[module] = {name for name in names if f"{name}.".startswith(f"{package.name}.")}
    return graph


def _nodes(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside_functions or not is_function:
            yield from _nodes(child, inside_functions)


def _names(node: ast.AST, modules: Mapping[str, Path]) -> set[str]:
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
    """Groups of modules that reach each other by imports, the smallest first."""
    reached = {module: _reachable(graph, module) for module in graph}
    circles = set()
    for module, others in reached.items():
        if module in others:
            circle = (other for other in others if module in reached.get(other, ()))
            circles.add(tuple(sorted(circle)))
    return [list(circle) for circle in sorted(circles, key=lambda circle: (len(circle), circle))]


def _reachable(graph: Graph, start: str) -> set[str]:
    """What the imports of a module lead to; the module itself only by way of a circle."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - reached
        reached |= new
        waiting += new
    return reached


def find_forbidden(
    graph: Graph,
    layers: Mapping[str, int],
    beside: Mapping[str, Sequence[str]],
    siblings: Mapping[str, Sequence[str]],
) -> list[str]:
    """Imports that the table of layers does not allow, each as a line that says why.

    Args:
        graph:    module -> imported modules.
        layers:   part of the package -> its layer; a part may import itself and lower layers.
        beside:   parts that every layer may import -> the parts that they may import themselves.
        siblings: part -> parts of its own layer that it may import nevertheless.
    """
    faults = []
    for module, imported in sorted(graph.items()):
        part = _part(module)
        if not part:
            continue  # the public surface may name everything
        if part not in layers and part not in beside:
            faults.append(f"{module}: {part} has no layer; give it one here and in the README")
            continue
        for name in sorted(imported):
            target = _part(name)
            if target == part or target in (beside.get(part, ()) if part in beside else beside):
                continue
            if part in beside or target not in layers:
                faults.append(f"{module} imports {name}, which it may not")
            elif layers[target] > layers[part]:
                faults.append(f"{module} (layer {layers[part]}) imports {name} above it")
            elif layers[target] == layers[part] and target not in siblings.get(part, ()):
                faults.append(f"{module} imports {name} of its own layer {layers[part]}")
    return faults


def _part(module: str) -> str:
    """The first name behind the package's; "" is the package itself."""
    return f"{module}.".split(".")[1]
