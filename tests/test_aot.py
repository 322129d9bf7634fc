"""`make aot`: it finds every kernel, compiles for every architecture, and fails on what must not be
shipped.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tools.aot import KERNELS, SPILL_ALLOWANCE, Resources, faults_of

ROOT = Path(__file__).resolve().parent.parent


def run_aot(
    *args: str, code: str | None = None, cache: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here kernels are the interpreter's, and those cannot be compiled."""
    command = ["-c", code] if code else ["-m", "tools.aot"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | (
        {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
    )
    return subprocess.run(
        [sys.executable, *command, *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def jit_functions() -> dict[str, ast.FunctionDef]:
    """Every function under @triton.jit in kernels/, read from the sources."""
    functions = [
        node
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert len({function.name for function in functions}) == len(functions)
    return {function.name: function for function in functions}


def test_every_jit_function_is_a_kernel_or_a_part_of_one() -> None:
    functions = jit_functions()
    bodies = {
        name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} - {name}
        for name, f in functions.items()
    }
    for name in functions:
        used = any(name in body for body in bodies.values())
        assert name.endswith("_kernel") != used, (
            f"{name}: a kernel is named *_kernel, a part of one is used by another"
        )


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    done = run_aot("--list")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    kernels = {name for name in jit_functions() if name.endswith("_kernel")}
    assert {(row[0], row[1]) for row in rows} == {
        (a, name) for a in ("80", "90", "100") for name in kernels
    }
    assert len({tuple(row) for row in rows}) == len(rows)


def test_every_number_of_a_kernel_has_its_variants() -> None:
    """Read from the sources: numbers have no annotation and are no pointers."""
    functions = {name: f for name, f in jit_functions().items() if name.endswith("_kernel")}
    labels: dict[str, list[str]] = {name: [] for name in functions}
    for line in run_aot("--list").stdout.splitlines():
        _, name, _, label = line.split("\t")
        labels[name] += re.findall(r"(?:, |^)(any pointers|[a-z]\w+ = 1|\w+ int64)$", label)
    for name, function in functions.items():
        arguments = [a.arg for a in function.args.args if a.annotation is None]
        numbers = [argument for argument in arguments if not argument.endswith("_ptr")]
        exempt = re.findall(r"do_not_specialize=\[(.*?)\]", ast.unparse(function.decorator_list[0]))
        ones = [number for number in numbers if f"'{number}'" not in "".join(exempt)]
        expected = [*(f"{n} int64" for n in numbers), *(f"{n} = 1" for n in ones)]
        # The launchers of these align what they are given (test_tree_attention_triton.py).
        expected += [] if name.startswith("_tree_") else ["any pointers"]
        assert sorted(labels[name]) == sorted(expected), name


def test_launches_are_compiled_as_triton_would() -> None:
    """Arguments that fit each launch, given to the function by which Triton specialises."""
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature
from tools import aot

def value_of(launch, param):
    config, variant = launch
    if param.name in config.constants:
        return config.constants[param.name]
    if param.name in config.pointers:
        dtype = config.pointers[param.name]
        first = 0 if variant.aligned else 1
        return None if dtype is None else torch.empty(16, dtype=dtype)[first:]
    if param.annotation_type:
        return 0.5
    number = 2**33 if param.name == variant.int64 else 32
    return 1 if param.name == variant.one else number + config.odd_sizes

configs, _ = aot.discover()
launches = [*map(aot.Launch, configs), *aot.variants(configs)]
for launch in launches:
    kernel = launch.config.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, BaseBackend)
    values, found, _ = bind(**{param.name: value_of(launch, param) for param in kernel.params})
    signature, constants, attributes = aot.arguments_of(launch)
    constant = [kind == "constexpr" for kind, _ in found]
    assert list(signature.values()) == [kind for kind, _ in found], launch
    assert constants == {n: v for (n, v), is_one in zip(values.items(), constant) if is_one}, launch
    keys = ["" if is_one else key or "" for (_, key), is_one in zip(found, constant)]
    assert list(attributes) == [(i,) for i, key in enumerate(keys) if "D" in key], launch
print(len(launches))
"""
    done = run_aot(code=code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(run_aot("--list").stdout.splitlines())


def test_a_few_bytes_may_spill() -> None:
    assert faults_of(Resources(255, SPILL_ALLOWANCE, 0), 90) == []
    [fault] = faults_of(Resources(255, SPILL_ALLOWANCE + 8, 0), 90)
    assert fault == "spills must be <= 16 bytes a thread, got 24; take a smaller tile or more warps"


def test_a_chunk_may_begin_at_any_row_without_another_compilation() -> None:
    """Numbers a row are slices of the caller's; logits and values are buffers of their own, and may
    have a variant.
    """
    code = """
from tools import aot
import os
os.environ.pop("TRITON_INTERPRET", None)
rows = {c.kernel.__name__: c.kernel for c in aot.discover()[0] if "rows" in c.kernel.__name__}
for name, kernel in rows.items():
    pointers = [p for p in kernel.params if p.name.endswith("_ptr")]
    aligned = [p.name for p in pointers if not p.do_not_specialize_on_alignment]
    print(name, *aligned)
"""
    done = run_aot(code=code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "_logprob_rows_backward_kernel logits_ptr grad_ptr",
        "_logprob_rows_kernel logits_ptr values_ptr",
        "_mark_rows_kernel bounds_ptr",
        "_policy_rows_kernel logits_ptr grad_ptr values_ptr",
        "_sum_rows_kernel x_ptr bounds_ptr out_ptr",
    ]


def test_resources_are_read_and_faults_are_named(tmp_path: Path) -> None:
    """A kernel as it ships; then with a tile that spills, one that is none, a limit it breaks."""
    code = """
from tools import aot
import json, os
os.environ.pop("TRITON_INTERPRET", None)
configs = [c for c in aot.discover()[0] if c.label == "all terms" and c.architecture == 90][:1]

def faults(num_warps=configs[0].num_warps, **constants):
    constants = {**configs[0].constants, **constants}
    config = configs[0]._replace(constants=constants, num_warps=num_warps)
    return aot.compile_all([aot.Launch(config)])

all_faults = [faults(), faults(1, BLOCK_V=4096), faults(BLOCK_V=3)]
aot.SHARED_LIMIT[90] = 1
print(json.dumps([*all_faults, faults()]))
"""
    done = run_aot(code=code, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    good, spilling, impossible, over_limit = json.loads(lines[-1])
    assert good == []
    where = "policy_rows_kernel (float32, all terms) on sm_90: "
    assert spilling[0].startswith(f"{where}spills must be <= {SPILL_ALLOWANCE} bytes a thread")
    assert impossible[0].startswith(f"{where}must compile, got CompilationError: ")
    assert over_limit[0].startswith(f"{where}shared memory must be <= 1 bytes")
    assert lines[2].startswith("1 launches in ") and "0 spill, at most 0 bytes" in lines[2]
    [launch] = json.loads(lines[3])["launches"]
    assert 16 < launch["registers"] <= 255 and launch["spill_bytes"] == 0
    assert 1 <= launch["ctas_of_sm"] <= 32
    spilled = next(line for line in lines[4:] if line.startswith("sm_90"))
    assert int(spilled.split()[-3]) > SPILL_ALLOWANCE  # a row that fails is shown too


def test_a_kernel_without_a_configuration_is_a_fault() -> None:
    code = """
from tools import aot
import os
os.environ.pop("TRITON_INTERPRET", None)
import socpo_fast.kernels.decay_advantage as module
module.aot_configs = lambda: iter(())
print(*aot.discover()[1])
"""
    done = run_aot(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "kernels/decay_advantage.py: aot_configs must yield every kernel, got none for "
        "_decay_advantage_kernel"
    )


DECODE = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from tools import aot, kernels_doc
from socpo_fast.kernels import paged_decode
for config in paged_decode.aot_configs():
    if config.kernel is paged_decode._decode_kernel and config.dtype == torch.bfloat16:
        if config.architecture == 90 and config.label.startswith("32 heads on 8 of 128"):
            print(kernels_doc.compiled_of(aot.Launch(config)))
"""


def test_decode_loads_keys_ahead() -> None:
    """The TTGIR for an H100 has two buffers of keys and of values, and three programs an SM."""
    done = run_aot(code=DECODE)
    assert done.returncode == 0, done.stderr
    assert "2 of 32x128 bf16" in done.stdout, done.stdout
    assert int(re.search(r"num_ctas=(\d+)", done.stdout)[1]) >= 3, done.stdout
