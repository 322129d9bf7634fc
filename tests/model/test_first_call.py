"""A process's first forward has the bits of its second one."""

from __future__ import annotations

import subprocess
import sys

import pytest

NUM_PROCESSES = 10  # torch alone fails in about half of them on an Intel processor
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
    for _ in range(NUM_PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
