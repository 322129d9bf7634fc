"""`make aot` finds every kernel, compiles it for every architecture, and fails on bad kernels.

Ahead-of-time compilation needs no GPU, so these tests run the real compiler on any machine.
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
    """Runs tools.aot or `code` in a new process: the interpreter's kernels cannot be compiled."""
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
    """Returns every function under @triton.jit in kernels/ by name, read from the sources."""
    functions = [
        node
        for path in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert len({function.name for function in functions}) == len(functions)
    return {function.name: function for function in functions}


def test_jit_functions_are_kernels_or_called_by_one() -> None:
    functions = jit_functions()
    bodies = {
        name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name)} - {name}
        for name, f in functions.items()
    }
    for name in functions:
        is_called = any(name in body for body in bodies.values())
        assert name.endswith("_kernel") != is_called, (
            f"{name}: a kernel is named *_kernel, a part of one is used by another"
        )


def test_all_kernels_compile_for_all_architectures() -> None:
    result = run_aot("--list")
    assert result.returncode == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    kernels = {name for name in jit_functions() if name.endswith("_kernel")}
    assert {(row[0], row[1]) for row in rows} == {
        (a, name) for a in ("80", "90", "100") for name in kernels
    }
    assert len({tuple(row) for row in rows}) == len(rows)


def test_every_number_argument_has_its_variants() -> None:
    """Triton specialises on 1 and on int64, so both are compiled for every number argument.

    In the sources a number has no annotation, and its name does not end in _ptr.
    """
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
        # The launchers of the tree kernels align their inputs (test_tree_attention_triton.py), so
        # these kernels need no variant for unaligned pointers.
        expected += [] if name.startswith("_tree_") else ["any pointers"]
        assert sorted(labels[name]) == sorted(expected), name


def test_launches_are_compiled_as_triton_would() -> None:
    """Triton's own specialisation of fitting arguments gives the signature that we compile."""
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
    values, specialisations, _ = bind(**{p.name: value_of(launch, p) for p in kernel.params})
    signature, constants, attributes = aot.arguments_of(launch)
    is_constant = [kind == "constexpr" for kind, _ in specialisations]
    assert list(signature.values()) == [kind for kind, _ in specialisations], launch
    named_constants = zip(values.items(), is_constant)
    assert constants == {name: x for (name, x), is_const in named_constants if is_const}, launch
    pairs = zip(specialisations, is_constant)
    keys = ["" if is_const else key or "" for (_, key), is_const in pairs]
    assert list(attributes) == [(i,) for i, key in enumerate(keys) if "D" in key], launch
print(len(launches))
"""
    result = run_aot(code=code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(run_aot("--list").stdout.splitlines())


def test_a_small_register_spill_is_allowed() -> None:
    assert faults_of(Resources(255, SPILL_ALLOWANCE, 0), 90) == []
    [fault] = faults_of(Resources(255, SPILL_ALLOWANCE + 8, 0), 90)
    assert fault == "spills must be <= 16 bytes a thread, got 24; take a smaller tile or more warps"


def test_row_pointers_need_no_alignment_variant() -> None:
    """A chunk may begin at any row of the caller's tensors without a new compilation.

    Pointers to one number a row (targets, advantages) are slices of the caller's tensors, so they
    may be unaligned. Logits and values are our own buffers, which are always aligned.
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
    result = run_aot(code=code)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [
        "_logprob_rows_backward_kernel logits_ptr grad_ptr",
        "_logprob_rows_kernel logits_ptr values_ptr",
        "_mark_rows_kernel bounds_ptr",
        "_policy_rows_kernel logits_ptr grad_ptr values_ptr",
        "_sum_rows_kernel x_ptr bounds_ptr out_ptr",
    ]


def test_resources_are_read_and_faults_are_named(tmp_path: Path) -> None:
    """A shipped kernel has no fault; a spill, an invalid tile and a broken limit are faults."""
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
    result = run_aot(code=code, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    no_faults, spilling, impossible, over_limit = json.loads(lines[-1])
    assert no_faults == []
    prefix = "policy_rows_kernel (float32, all terms) on sm_90: "
    assert spilling[0].startswith(f"{prefix}spills must be <= {SPILL_ALLOWANCE} bytes a thread")
    assert impossible[0].startswith(f"{prefix}must compile, got CompilationError: ")
    assert over_limit[0].startswith(f"{prefix}shared memory must be <= 1 bytes")
    assert lines[2].startswith("1 launches in ") and "0 spill, at most 0 bytes" in lines[2]
    [launch] = json.loads(lines[3])["launches"]
    assert 16 < launch["registers"] <= 255 and launch["spill_bytes"] == 0
    assert 1 <= launch["ctas_of_sm"] <= 32
    spilled = next(line for line in lines[4:] if line.startswith("sm_90"))
    assert int(spilled.split()[-3]) > SPILL_ALLOWANCE  # the table shows failing kernels as well


def test_kernel_without_aot_config_is_a_fault() -> None:
    code = """
from tools import aot
import os
os.environ.pop("TRITON_INTERPRET", None)
import socpo_fast.kernels.decay_advantage as module
module.aot_configs = lambda: iter(())
print(*aot.discover()[1])
"""
    result = run_aot(code=code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (
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


def test_decode_prefetches_keys() -> None:
    """The TTGIR for an H100 has two buffers each of keys and values, and three programs an SM."""
    result = run_aot(code=DECODE)
    assert result.returncode == 0, result.stderr
    assert "2 of 32x128 bf16" in result.stdout, result.stdout
    assert int(re.search(r"num_ctas=(\d+)", result.stdout)[1]) >= 3, result.stdout
