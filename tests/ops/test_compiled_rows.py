"""Reads the PTX of the policy head's row pass, as compiled for a card."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_no_barrier_in_the_loops_over_tiles() -> None:
    """Threads keep partial sums and combine them only once, behind the last tile.

    A barrier in the loop would make all warps wait at every tile.
    """
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from socpo_fast.kernels.linear_policy_loss import aot_configs
from tools.aot import Launch, arguments_of
wanted = (90, "all terms", 4)
(config,) = [x for x in aot_configs() if (x.architecture, x.label, x.dtype.itemsize) == wanted]
source = ASTSource(config.kernel, *arguments_of(Launch(config)))
options = {"num_warps": config.num_warps}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""
    root = Path(__file__).resolve().parent.parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    env.pop("TRITON_INTERPRET", None)  # the interpreter would compile nothing
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    labels = {line.partition(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    jumps = [
        (i, match[0]) for i, line in enumerate(lines) if (match := re.search(r"\$L\w+(?=;)", line))
    ]
    # A jump to a label above it closes a loop.
    loops = [lines[labels[label] : i] for i, label in jumps if labels[label] < i]
    assert sum(any("ex2" in line for line in loop) for loop in loops) == 2  # the sums, the gradient
    assert not any("bar.sync" in line for loop in loops for line in loop)
    assert any("bar.sync" in line for line in lines)
