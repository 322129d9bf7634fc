"""Counts statements against the project's budgets; run by `make size`, fails when something has grown too large.

Usage: python tests/size.py. A budget counts Python's statements, docstrings apart, and C++'s semicolons: a budget of
lines was once met by wide lines and packed assignments. The limits on one file and one function count lines.
"""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Core Python had 5,500 until steps were launched and collected apart (engine/steps.py), the local
# teacher got a stream of its own and runs a trace.
BUDGETS = {"core Python": 5800, "kernels": 1800, "csrc": 2000, "integrations and report": 1200}
MAX_FILE = 300
MAX_FUNCTION = 80
MAX_KERNEL = 120


def source_files() -> list[Path]:
    """Python and C++ files of the project, relative to its root; links (socpo_fast/kernels) are not followed."""
    found = []
    for top in ("setup.py", "socpo_fast", "kernels", "csrc", "tests", "bench", "tools"):
        walked = os.walk(ROOT / top) if (ROOT / top).is_dir() else [(ROOT, [], [top])]
        found += [
            Path(folder, name).relative_to(ROOT) for folder, _, names in walked for name in names
        ]
    return sorted(path for path in found if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))


def budget_of(path: Path) -> str | None:
    """The budget a file counts towards; tests, benches and tools have none."""
    if path.parts[0] in ("kernels", "csrc"):
        return path.parts[0]
    if path.parts[0] != "socpo_fast":
        return None
    return (
        "integrations and report"
        if path.parts[1].startswith(("integrations", "report"))
        else "core Python"
    )


def num_statements(path: Path, source: str) -> int:
    """Statements of Python without docstrings; semicolons of C++ without comments."""
    if path.suffix != ".py":
        return sum(line.partition("//")[0].count(";") for line in source.splitlines())
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    docstrings = [
        node
        for node in nodes
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return len(nodes) - len(docstrings)


def long_functions(path: Path, source: str) -> list[str]:
    limit = MAX_KERNEL if path.parts[0] == "kernels" else MAX_FUNCTION
    functions = [
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    sizes = {
        f"{path}:{f.lineno} {f.name}": (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions
    }
    return [
        f"{where} has {size} lines, limit {limit}" for where, size in sizes.items() if size > limit
    ]


def main() -> int:
    totals = dict.fromkeys(BUDGETS, 0)
    faults = []
    for path in source_files():
        source = (ROOT / path).read_text(encoding="utf-8")
        num_lines = len(source.splitlines())
        if num_lines > MAX_FILE:
            faults.append(f"{path} has {num_lines} lines, limit {MAX_FILE}")
        if path.suffix == ".py":
            faults += long_functions(path, source)
        budget = budget_of(path)
        if budget is not None:
            totals[budget] += num_statements(path, source)
    for name, total in totals.items():
        print(f"{name:24}{total:6} of {BUDGETS[name]}")
        if total > BUDGETS[name]:
            faults.append(f"{name} has {total} statements, budget {BUDGETS[name]}")
    for fault in faults:
        print(f"size: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
