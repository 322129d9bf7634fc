"""`make aot`: it finds every kernel, compiles for every architecture, and fails on what must not be shipped."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.aot import KERNELS

ROOT = Path(__file__).resolve().parent.parent


def run_aot(*args: str, code: str | None = None, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here kernels are the interpreter's, and those cannot be compiled."""
    command = ["-c", code] if code else ["-m", "bench.aot"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | ({} if cache is None else {"TRITON_CACHE_DIR": str(cache)})
    return subprocess.run(
        [sys.executable, *command, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def jit_functions() -> dict[str, ast.FunctionDef]:
    """Every function under @triton.jit in kernels/, read from the sources."""
    functions = [
        node
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert len({function.name for function in functions}) == len(functions)
    return {function.name: function for function in functions}


def test_every_jit_function_is_a_kernel_or_a_part_of_one() -> None:
    functions = jit_functions()
    bodies = {name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} - {name} for name, f in functions.items()}
    for name in functions:
        used = any(name in body for body in bodies.values())
        assert name.endswith("_kernel") != used, f"{name}: a kernel is named *_kernel, a part of one is used by another"


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    done = run_aot("--list")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    kernels = {name for name in jit_functions() if name.endswith("_kernel")}
    assert {(row[0], row[1]) for row in rows} == {(a, name) for a in ("80", "90", "100") for name in kernels}
    assert len({tuple(row) for row in rows}) == len(rows)


def test_a_chunk_may_begin_at_any_row_without_another_compilation() -> None:
    """Numbers a row are slices of the caller's; logits and values are buffers of their own, and may have a variant."""
    code = """
from bench import aot
import os
os.environ.pop("TRITON_INTERPRET", None)
rows = {c.kernel.__name__: c.kernel for c in aot.discover()[0] if "rows" in c.kernel.__name__}
for name, kernel in rows.items():
    aligned = [p.name for p in kernel.params if p.name.endswith("_ptr") and not p.do_not_specialize_on_alignment]
    print(name, *aligned)
"""
    done = run_aot(code=code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "_logprob_rows_backward_kernel logits_ptr grad_ptr",
        "_logprob_rows_kernel logits_ptr values_ptr",
        "_policy_rows_kernel logits_ptr grad_ptr values_ptr",
    ]


def test_resources_are_read_and_faults_are_named(tmp_path: Path) -> None:
    """One kernel as it ships; the same with a tile that cannot but spill, and under a limit that it breaks."""
    code = """
from bench import aot
import json, os
os.environ.pop("TRITON_INTERPRET", None)
configs = [c for c in aot.discover()[0] if c.label == "all terms" and c.architecture == 90][:1]
good = aot.compile_all(configs)
spilling = aot.compile_all([configs[0]._replace(constants={**configs[0].constants, "BLOCK_V": 4096}, num_warps=1)])
aot.SHARED_LIMIT[90] = 1
print(json.dumps([good, spilling, aot.compile_all(configs)]))
"""
    done = run_aot(code=code, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    good, spilling, over_limit = json.loads(lines[-1])
    assert good == []
    assert "spills must be 0 bytes" in spilling[0] and "policy_rows_kernel" in spilling[0] and "sm_90" in spilling[0]
    assert "shared memory must be <= 1 bytes" in over_limit[0]
    summary = json.loads(lines[2])
    assert 16 < summary["launches"][0]["registers"] <= 255 and summary["launches"][0]["spill_bytes"] == 0


def test_a_kernel_without_a_configuration_is_a_fault() -> None:
    code = """
from bench import aot
import os
os.environ.pop("TRITON_INTERPRET", None)
import socpo_fast.kernels.decay_advantage as module
module.aot_configs = lambda: iter(())
print(*aot.discover()[1])
"""
    done = run_aot(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "kernels/decay_advantage.py: aot_configs must yield every kernel, got none for _decay_advantage_kernel"
    )
