"""Checks that the first forward of a process equals its second one, bitwise.

MKL chooses its vector functions (torch's cos, exp, log) at the first call. If two threads make that
call together, one of them may compute with errors of 1e-4. So each try needs a fresh process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

# Plain torch fails in about half of the processes on an Intel processor.
NUM_PROCESSES = 10
CODE = """
import torch
from socpo_fast.model.decoder import rotary_tables
from tests.helpers.tiny import make_student

torch.set_num_threads(2)
make_student()
x = torch.randn(2048, 2048)
x @ x  # the second thread is there, as after a model was loaded
positions, frequencies = torch.arange(2048) % 190, torch.rand(32)
first, second = (rotary_tables(positions, frequencies) for _ in range(2))
assert all(map(torch.equal, first, second)), [(a - b).abs().max() for a, b in zip(first, second)]
"""


@pytest.mark.slow
def test_first_call_equals_second() -> None:
    """Rotary tables of the first call in a process equal those of the second call."""
    for _ in range(NUM_PROCESSES):
        process = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120
        )
        assert process.returncode == 0, process.stderr
