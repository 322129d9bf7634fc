"""A decode round is captured on the card that holds the weights, whichever is the current one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from socpo_fast.engine.decode import DecodeLoop
from tests.helpers.late_devices import FakeCuda
from tests.helpers.tiny import make_engine, make_student


def test_every_step_of_a_capture_is_on_the_engines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines, as student and local teacher are, each on a card of its own."""
    cuda = FakeCuda()
    rounds = DecodeLoop._round
    cuda.install(monkeypatch)

    def note_round(self: DecodeLoop, *given: Any) -> None:
        cuda.note("round")
        rounds(self, *given)

    monkeypatch.setattr(DecodeLoop, "_round", note_round)
    streams = []
    for index in range(2):
        engine = make_engine(make_student(), tokens_per_sync=4)
        device = engine._runner.device = torch.device("cpu", index)  # stands for cuda:index
        cuda.steps.clear()
        first, second = (engine._steps.loop._graph(rows, 2, False) for rows in (2, 4))
        steps = ["the capture's stream waits", "round", "capture", "round", "end of capture"]
        steps += ["the caller's stream waits"]
        assert cuda.steps == [(step, device) for step in steps * 2]
        assert first is not second and engine._steps.loop._graph(2, 2, False) is first
        assert first.device == second.device == first.stream.device == device
        assert first.stream is second.stream, "graphs that share a pool share a stream"
        streams.append(first.stream)
    assert streams[0] is not streams[1] and not cuda.chosen and not cuda.streams
