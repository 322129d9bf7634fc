"""Checks that decode rounds are captured on the card that holds the engine's weights.

The current CUDA device of the calling thread may be another one, for example that of the student
while a local teacher decodes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from socpo_fast.engine.decode import DecodeLoop
from tests.helpers.late_devices import FakeCuda
from tests.helpers.tiny import make_engine, make_student


def test_capture_runs_on_the_engines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines on two cards, as student and local teacher, each capture on their own card."""
    cuda = FakeCuda()
    run_round = DecodeLoop.run_round
    cuda.install(monkeypatch)

    def note_round(self: DecodeLoop, *size: Any) -> None:
        cuda.note("round")
        run_round(self, *size)

    monkeypatch.setattr(DecodeLoop, "run_round", note_round)
    streams = []
    for index in range(2):
        engine = make_engine(make_student(), tokens_per_sync=4)
        device = engine.runner.device = torch.device("cpu", index)  # stands for cuda:index
        cuda.steps.clear()
        first, second = (engine.steps.loop.graph_for(rows, 2, False) for rows in (2, 4))
        steps = ["the capture's stream waits", "round", "capture", "round", "end of capture"]
        steps += ["the caller's stream waits"]
        assert cuda.steps == [(step, device) for step in steps * 2]
        assert first is not second and engine.steps.loop.graph_for(2, 2, False) is first
        assert first.device == second.device == first.stream.device == device
        assert first.stream is second.stream, "graphs that share a pool share a stream"
        streams.append(first.stream)
    assert streams[0] is not streams[1] and not cuda.chosen and not cuda.streams
