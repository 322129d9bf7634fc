"""Stand-ins for the parts of torch.cuda around a capture, which need no card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeGraph:
    """What a CUDA graph does here: the round that was captured, once a replay.

    device and stream are those of the capture, device None when no card was chosen.
    """

    def __init__(self) -> None:
        self.round: Callable[[], None] | None = None
        self.device: Any = None
        self.stream: Any = None

    def replay(self) -> None:
        assert self.round is not None
        self.round()

    def pool(self) -> None:
        return None


class FakeCuda:
    """torch.cuda around a capture; notes on which device each of its steps ran."""

    def __init__(self) -> None:
        self.chosen: list[Any] = []  # the devices of the `with torch.cuda.device(..)` that are open
        self.steps: list[tuple[str, Any]] = []  # (step, current device)

    def note(self, step: str) -> None:
        self.steps.append((step, self.chosen[-1] if self.chosen else None))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.chosen.append(device)
        yield
        self.chosen.pop()

    @contextmanager
    def graph(self, graph: FakeGraph, *, pool: None, stream: SimpleNamespace) -> Iterator[None]:
        graph.device, graph.stream = self.chosen[-1] if self.chosen else None, stream
        self.note("capture")
        yield
        self.note("end of capture")

    def synchronize(self, device: torch.device) -> None:
        assert self.chosen[-1] == device
        self.note("synchronize")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("device", "graph", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
