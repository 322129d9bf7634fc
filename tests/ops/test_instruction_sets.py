"""Tests the other instruction sets of the extension.

It carries its hot code once per instruction set, and each copy that this machine can run must be
right.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from socpo_fast.ops import available_impls

TESTS = Path(__file__).parent
SETS = ["DEFAULT", "AVX2", "AVX512"]
NATIVE = torch.backends.cpu.get_cpu_capability()


@pytest.mark.skipif("cpp" not in available_impls().values(), reason="extension not built")
@pytest.mark.parametrize("instruction_set", SETS[: SETS.index(NATIVE)] if NATIVE in SETS else [])
def test_lower_instruction_sets_pass_op_tests(instruction_set: str) -> None:
    """The tests of the ops pass with every lower instruction set.

    All other tests run with the machine's own set. -k selects by words of the tests' names.
    """
    names = [
        "sample",
        "paged_attention",
        "linear_policy_loss_rows",
        "linear_policy_loss_fused",
        "linear_logprob",
    ]
    names += ["linear", "linear_sample", "rms_norm", "swiglu", "rotary", "paged_attention_cascade"]
    names += ["tree_attention"]
    files = [str(TESTS / f"test_{name}.py") for name in names]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *files,
            "-k",
            "cpp_draws or cpp_is_as_right or autograd or vocabular or log_softmax or (bits or "
            "bitwise or invariant or as_right) and not triton",
        ],
        env=os.environ | {"ATEN_CPU_CAPABILITY": instruction_set.lower(), "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
