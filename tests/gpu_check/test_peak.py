"""Checks the peak memory of an update: logs written by hand, and a tiny update on the fake card.

The latter needs a CUDA build of torch, but no card.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tools.gpu_check import peak
from tools.gpu_check.memory import Memory
from tools.gpu_check.revision import ROOT

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of torch; no card"
)


def test_the_peak_of_each_phase_is_found() -> None:
    """A log of (storage, bytes, tensor) gives the peak of each phase and the tensors alive then."""
    log = [
        (1, 999, "f32[9]"),  # before the first phase
        (1, 0, ""),
        (0, 0, "forward"),
        (1, 100, "f32[1]"),
        (2, 30, "f32[2]"),
        (3, 30, "f32[2]"),
        (2, 0, ""),
        (0, 0, "head"),
        (7, 0, ""),  # a storage from before the log began is freed
        (2, 10, "f32[3]"),  # the number of a freed storage is used again
        (0, 0, "forward"),
        (3, 0, ""),
    ]
    peaks = peak.peaks_of(log, resident=1000)
    assert peaks == {
        "forward": peak.Peak(1160, (("f32[1]", 1, 100), ("f32[2]", 2, 60))),
        "head": peak.Peak(1140, (("f32[1]", 1, 100), ("f32[2]", 1, 30), ("f32[3]", 1, 10))),
    }


def test_memory_keeps_a_log_if_it_has_one() -> None:
    """An allocation and the freeing of its storage are logged; a view is not."""
    memory = Memory()
    memory.add(torch.empty(2))
    memory.log = log = []
    memory.add(x := torch.empty(3, 5))
    memory.add(x[1])
    del x
    [(key, num_bytes, tensor_name), freed] = log
    assert (num_bytes, tensor_name) == (512, "f32[3, 5]") and freed == (key, 0, "")


def test_peak_without_a_cuda_build_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert peak.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "a CUDA build of torch" in printed.err


TINY = """
import json
import torch
from tools.gpu_check.models import MODELS
from tools.gpu_check.peak import memory_of_engine, peak_of_update

config = MODELS["tiny"]
found = {}
for tokens in (256, 512):
    for checkpointing in (False, True):
        used = peak_of_update(
            config, dtype=torch.bfloat16, tokens=tokens, checkpointing=checkpointing
        )
        peaks = {phase: peak.num_bytes for phase, peak in used.peaks.items()}
        sizes = used.parameters, used.low_bits, used.moments
        tensors = [what for what, _, _ in used.peaks["step"].tensors]
        found[f"{tokens} {checkpointing}"] = [sizes, peaks, tensors]
engine = memory_of_engine(config, dtype=torch.bfloat16, kv_cache_gib=0.1, max_running=16)
print(json.dumps([found, vars(engine)]))
"""


@needs_cuda_build
def test_a_tiny_update_takes_what_it_must() -> None:
    """Peaks and sizes of a tiny update are in the order that they must have.

    They grow with the number of tokens, and checkpointing lowers them.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", TINY], cwd=ROOT, env=environ, capture_output=True, check=True
    )
    updates, engine = json.loads(process.stdout)
    (parameters, low_bits, moments), peaks, tensors = updates["256 False"]
    assert low_bits <= parameters <= moments / 4 + 2**14  # small tensors are rounded up
    assert updates["512 True"][0] == [parameters, low_bits, moments]
    assert set(peaks) == {"forward", "head", "backward", "step"}
    assert "gradient f32[211, 32]" in tensors
    for phase in ("forward", "backward"):
        # 256 tokens with and without checkpointing, then 512 tokens.
        sizes = [updates[f"{n} {c}"][1][phase] for n in (256, 512) for c in (True, False)]
        assert sizes[0] < sizes[1] < sizes[3] and sizes[0] < sizes[2] < sizes[3]
    assert 0.09 * 2**30 < engine["pages"] <= 0.1 * 2**30
    assert engine["peak"] >= engine["pages"] + engine["rest"] > engine["pages"]
