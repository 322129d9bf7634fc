"""Counts statements against the project's budgets; `make size` fails where something has grown.

Usage: python tools/size.py. A budget counts statements of Python and semicolons of C++, without
docstrings and comments. It does not count lines: a budget of lines was once met by wide lines and
packed assignments. The limits of a single file and a single function count lines that hold code, so
a comment costs nothing. Read main, then num_statements and code_lines.
"""

from __future__ import annotations

import ast
import io
import os
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The design allows 5,500 for core Python and 1,200 for integrations and report. What has been added
# since: 300 to launch a step apart from collecting it, and for a teacher on a stream of its own
# (engine/steps.py); 113 and 47 when packed assignments, which had counted as one statement, were
# split; 294 and 25 to read files, templates, tokenizers and answers as their authors meant them
# (socratic/data.py, graders.py, vocabulary.py, report/printable.py), and 40 and 19 more for truths,
# message fields and exported rollouts; 310 and 460 for other people's trainers: live models and
# what happens to their weights (model/adopt.py, shared.py, engine/weight_watch.py), event loops
# (socratic/rollout.py, integrations/async_engine.py), and TRL (integrations/trl*.py); 657 and 510
# for who comes new: other columns and files without a library (socratic/data_files.py), models by
# hub name (model/hub.py), training from Python (training_run.py), and what one sees before, during
# and after a run (report/live.py, status.py, run_plan.py, curves.py).
BUDGETS = {"core Python": 7217, "kernels": 1800, "csrc": 2000, "integrations and report": 2255}
MAX_FILE = 300
MAX_FUNCTION = 80
MAX_KERNEL = 120
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def source_files() -> list[Path]:
    """Returns the project's Python and C++ files, relative to its root.

    Symbolic links are not followed, else socpo_fast/kernels would be counted twice.
    """
    paths = []
    for root in ("setup.py", "socpo_fast", "kernels", "csrc", "tests", "bench", "tools"):
        folders = os.walk(ROOT / root) if (ROOT / root).is_dir() else [(ROOT, [], [root])]
        paths += [
            Path(folder, name).relative_to(ROOT) for folder, _, names in folders for name in names
        ]
    return sorted(path for path in paths if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"))


def budget_of(path: Path) -> str | None:
    """Returns the budget that a file counts towards; tests, benches and tools have none."""
    if path.parts[0] in ("kernels", "csrc"):
        return path.parts[0]
    # What `socpo init` copies is the user's.
    if path.parts[0] != "socpo_fast" or path.parts[1] == "starter":
        return None
    return (
        "integrations and report"
        if path.parts[1].startswith(("integrations", "report"))
        else "core Python"
    )


def num_statements(path: Path, source: str) -> int:
    """Counts statements of Python without docstrings, or semicolons of C++ without comments."""
    if path.suffix != ".py":
        return sum(line.partition("//")[0].count(";") for line in source.splitlines())
    tree = ast.parse(source)
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) - len(docstrings_of(tree))


def docstrings_of(tree: ast.AST) -> list[ast.Expr]:
    """Returns the statements that consist of one string."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def code_lines(path: Path, source: str) -> set[int]:
    """Returns the numbers of the lines that hold code, not a docstring, a comment or nothing."""
    lines = source.splitlines()
    if path.suffix != ".py":
        # C++ is not parsed: whole-line comments with // are the only ones in use.
        is_code = (line.strip() and not line.strip().startswith("//") for line in lines)
        return {number for number, code in enumerate(is_code, 1) if code}
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:  # a string over several lines counts all of them
            numbers |= set(range(token.start[0], token.end[0] + 1))
    for node in docstrings_of(ast.parse(source)):
        # A docstring is a token like any other string, so its lines are taken out again.
        numbers -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def long_functions(path: Path, source: str, numbers: set[int]) -> list[str]:
    """Returns a message for each function of a Python file that is too long."""
    limit = MAX_KERNEL if path.parts[0] == "kernels" else MAX_FUNCTION
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            size = len(numbers.intersection(span))
            if size > limit:
                function_name = f"{path}:{node.lineno} {node.name}"
                faults.append(f"{function_name} has {size} lines of code, limit {limit}")
    return faults


def main() -> int:
    totals = dict.fromkeys(BUDGETS, 0)
    faults = []
    for path in source_files():
        source = (ROOT / path).read_text(encoding="utf-8")
        numbers = code_lines(path, source)
        if len(numbers) > MAX_FILE:
            faults.append(f"{path} has {len(numbers)} lines of code, limit {MAX_FILE}")
        if path.suffix == ".py":
            faults += long_functions(path, source, numbers)
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
